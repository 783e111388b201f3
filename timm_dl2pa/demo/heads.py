"""The five heads of the demo: what each one is, and one model with each of them."""
import torch
import torch.nn as nn

from ..finetune.backbone import make_backbone
from ..head import DL2PAHead
from ..head.numerics import maps_as_rows, rows_as_maps
from ..models import wrap_dl2pa
from ..models.wrapping import set_module
from .letters import SIDE

__all__ = ['HEADS', 'RECIPES_OF', 'make_models']

HEADS = {
    'linear': 'linear classifier',
    'linear_neck': 'linear classifier after the neck',
    'static': 'static prototypes',
    'paper': "the paper's rule",
    'dl2pa': 'DL2PA, the default',
}
# Static prototypes are those of 'even', which the demo's scheduler never moves.
RECIPES_OF = {'static': 'even', 'paper': 'paper', 'dl2pa': 'placed'}


class _LinearAfterNeck(nn.Module):
    """A linear classifier after the neck of a DL2PA head, whose place in a model it takes."""

    def __init__(self, head: DL2PAHead):
        super().__init__()
        self.before, self.neck, self.channels_first = head.before, head.neck, head.channels_first
        self.linear = nn.Linear(head.dim, head.num_classes, device=head.prototypes.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.before(maps_as_rows(x) if self.channels_first else x)
        logits = self.linear(self.neck(rows))
        return rows_as_maps(logits, x) if self.channels_first else logits


def make_models(name: str, num_classes: int, dim: int, seed: int, letters: bool) -> dict[str, nn.Module]:
    """Return a model for each of `HEADS`, all with the same weights of the backbone. Seeds torch's global generator.

    Args:
        name: The name of a timm model.
        num_classes: C.
        dim: d.
        seed: Of the weights and the prototypes.
        letters: Whether the images are letters, which are smaller than those that most models are made for.

    Raises:
        ValueError: The model is unknown, or the prototypes do not fit in `dim` dimensions.
    """
    models = {}
    for kind in HEADS:
        torch.manual_seed(seed)
        model = make_backbone(name, num_classes, pretrained=False, image_size=SIDE if letters else None)
        if kind != 'linear':
            wrap_dl2pa(model, dim, recipe=RECIPES_OF.get(kind, 'placed'), seed=seed)
        if kind == 'linear_neck':
            heads = {path: module for path, module in model.named_modules() if isinstance(module, DL2PAHead)}
            for path, head in heads.items():
                set_module(model, path, _LinearAfterNeck(head))
        models[kind] = model
    return models
