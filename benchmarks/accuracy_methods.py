"""The methods that the accuracy runs compare: their classifiers, losses, and rules for the assignment.

softmax         nn.Linear(features, d), nn.Linear(d, C); `--dim 0`: nn.Linear(features, C)
cosine_softmax  as softmax, with both sides normalised and the head's scale, or a learned one
static          fixed prototypes, random assignment (Hyperspherical Prototype Networks)
etf             static, where d >= C - 1 makes the prototypes a regular simplex
paper           re-solved once an epoch by the authors' moving average: it starts from random vectors, as does the first
                assignment; of several samples of a class in a batch one counts; momentum 0.9 is about 0.95, since 0.9 q
                is added to q before normalising. Their saved checkpoints (re-solved after validation), their unbuffered
                prototypes and their unsynchronised processes do not change a run on one device, and are left out.
dl2pa           this library's defaults, as in train.py
"""
import math

import cifar_resnet  # noqa: F401  registers the models
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from accuracy_recipe import Recipe
from dl2pa_recipes import scheduler_arguments
from image_arrays import Images

from timm_dl2pa import (
    AssignmentScheduler,
    BalancedSoftmaxLoss,
    DotRegressionLoss,
    SquaredCosineLoss,
    default_scale,
    solve_assignment,
    wrap_dl2pa,
)
from timm_dl2pa.head.numerics import slowly_learned
from timm_dl2pa.options import PluginOptions

__all__ = ['CosineClassifier', 'PaperRule', 'make_criterion', 'make_model', 'make_scheduler']

# Where a learned scale starts, as the head's does.
_LEARNED_SCALE_START = 4.0


class CosineClassifier(nn.Module):
    """Learned class vectors; logits are scaled cosines.

    Args:
        dim: d.
        num_classes: C.
        scale: Factor on the cosines.
        learn_scale: Make it a parameter, in the log domain and as slowly learned as the head's.
    """

    def __init__(self, dim: int, num_classes: int, scale: float, learn_scale: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, dim) / math.sqrt(dim))
        self.scale = scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learn_scale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            cosines = F.normalize(x.float(), dim=1) @ F.normalize(self.weight.float(), dim=1).t()
        return (self.scale if self.log_scale is None else slowly_learned(self.log_scale).exp()) * cosines


class PaperRule:
    """The authors' moving average and their re-solve at the end of each epoch."""

    def __init__(self, head: nn.Module, generator: torch.Generator):
        self.head = head
        draw = torch.randn(head.num_classes, head.dim, generator=generator)
        self.table = F.normalize(draw, dim=1).to(head.prototypes.device)
        self.moved: list[int] = []
        self.resolve()
        head.training_view.on_forward = self._observe

    def _observe(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        self.embeddings = embeddings

    def step(self, targets: torch.Tensor) -> None:
        """q <- q + (0.9 q + 0.1 z), normalised; where a class occurs twice the last sample counts."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        self.table[labels] += 0.9 * self.table[labels] + 0.1 * self.embeddings
        self.table = F.normalize(self.table, dim=1)

    def resolve(self) -> None:
        result = solve_assignment(
            class_means=self.table, prototypes=self.head.prototypes, start=self.head.assignment)
        self.head.assign(result.assignment)
        self.moved.append(result.moved)


def make_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the backbone with the method's classifier, on the CPU. Draws from the global generator."""
    kwargs = {'shortcut': recipe.shortcut} if recipe.model.startswith('cifar_resnet') else {}
    model = timm.create_model(recipe.model, num_classes=num_classes, **kwargs)
    scale = recipe.scale or (_LEARNED_SCALE_START if recipe.learn_scale else default_scale(num_classes))
    neck_kind = recipe.neck or 'linear'
    if recipe.method.endswith('softmax'):
        if recipe.dim == 0:
            return model
        features = model.num_features
        neck = [nn.Linear(features, recipe.dim)]
        if neck_kind == 'linear_bn':
            neck = [nn.Linear(features, recipe.dim, bias=False), nn.BatchNorm1d(recipe.dim)]
        model.fc = nn.Sequential(*neck, nn.Linear(recipe.dim, num_classes) if recipe.method == 'softmax'
                                 else CosineClassifier(recipe.dim, num_classes, scale, recipe.learn_scale))
        return model
    if recipe.method == 'etf' and recipe.dim < num_classes - 1:
        raise ValueError(f'etf needs dim >= {num_classes - 1} for {num_classes} classes, not {recipe.dim}.')
    if recipe.method == 'dl2pa':
        loss = 'criterion' if recipe.loss == 'cross_entropy' else recipe.loss
        given = {name: getattr(recipe, name) for name in ('neck', 'scale') if getattr(recipe, name) is not None}
        wrap_dl2pa(model, **PluginOptions(dim=recipe.dim, seed=recipe.seed, loss=loss, **given).head_arguments())
    else:
        wrap_dl2pa(model, recipe.dim, neck=neck_kind, scale=scale, seed=recipe.seed)
    head = model.get_classifier()
    head.assign(torch.randperm(num_classes, generator=torch.Generator().manual_seed(recipe.seed)))
    return model


def make_criterion(recipe: Recipe, head: nn.Module | None, images: Images) -> nn.Module:
    """Return the recipe's loss, on the images' device, for the head or, where there is none, for any logits."""
    weight = {} if recipe.loss_weight is None else {'weight': recipe.loss_weight}
    if recipe.loss == 'squared_cosine':
        return SquaredCosineLoss(head, **weight)
    if recipe.loss == 'dot_regression':
        return DotRegressionLoss(head, **weight)
    if recipe.loss == 'balanced_softmax':
        counts = torch.bincount(images.y_train, minlength=images.num_classes)
        return BalancedSoftmaxLoss(images.num_classes, counts.clamp(min=1)).to(counts.device)
    return nn.CrossEntropyLoss()


def make_scheduler(recipe: Recipe, model: nn.Module) -> AssignmentScheduler:
    """Return the scheduler of a model of the method dl2pa: its recipe's, then what `recipe.dl2pa` says of it."""
    return AssignmentScheduler(model, **scheduler_arguments(recipe.dl2pa_recipe, recipe.epochs, recipe.dl2pa))
