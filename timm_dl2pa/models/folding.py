"""fold_dl2pa: the way back, to a plain timm model."""
import copy

import torch
import torch.nn as nn

from ..head import DL2PAHead, heads_of
from .wrapping import RemovedLinear, loose_tensors, record_in_registrys_terms, set_module

__all__ = ['fold_dl2pa']


def fold_dl2pa(model: nn.Module, *, normalize: bool = False, images: torch.Tensor | None = None) -> nn.Module:
    """Return a plain timm model that ranks the classes of every image as the wrapped model does.

    Neck, its batch norm as in evaluation, and prototypes are linear maps: their product is one layer, as timm itself
    would have made it. Only the division by the embedding's length |z| is left out, one positive number for all classes
    of an image (DL2PA, section 3). So the folded logits are |z| times ours: the order of the classes is the same,
    their probabilities are not.

    A model with several classifiers adds up logits, and there each has a length of its own: the order is kept only
    nearly. Then `images` must be given: each classifier is divided by the mean length of its embeddings, and the
    share of images whose first class is the same is measured.

    Args:
        model: A wrapped timm model. It stays as it is.
        normalize: Keep the division, and with it the exact logits and probabilities. The classifier is then an
            `nn.Sequential` of PyTorch's own layers, so that its checkpoint fits no model that timm makes by itself.
        images: What the model takes, as a batch of at least some dozen typical images.

    Returns:
        A copy without any part of this package: its state dict loads into `timm.create_model(name, num_classes=C)`,
        unless `normalize` is set. Where `images` were given, its attribute `fold_agreement` is the measured share.

    Raises:
        ValueError: The model has no DL2PA head; or it has several, and neither `images` nor `normalize=True` are given.

    Example:
        >>> plain = fold_dl2pa(model)
        >>> torch.save(plain.state_dict(), 'plain.pth')
        >>> timm.create_model('resnet50', num_classes=100, checkpoint_path='plain.pth')  # needs timm alone
    """
    heads = heads_of(model)
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: there is nothing to fold.')
    if len(heads) > 1 and not normalize and images is None:
        raise ValueError(f'{type(model).__name__} combines the logits of {len(heads)} classifiers, so that the folded '
                         f'model ranks classes only nearly the same: give images=, a batch to measure how nearly on, '
                         f'or normalize=True, which is exact.')
    expected = lengths = None
    if images is not None:
        expected, lengths = _measure(model, heads, images)
    folded = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in loose_tensors(model)
                                   if not tensor.is_leaf})
    for name in ('reset_classifier', 'get_classifier', 'dl2pa_options'):
        folded.__dict__.pop(name, None)
    record_in_registrys_terms(folded, None)
    like = next(model.parameters())
    for path, head in [(path, module) for path, module in folded.named_modules() if isinstance(module, DL2PAHead)]:
        length = 1.0 if lengths is None or normalize else lengths[path]
        weight = next(head.neck.parameters(), like)
        layer = (_exact if normalize else _linear)(head, length).to(weight.device, weight.dtype).train(head.training)
        slot = next((name for name, part in head.before.named_modules() if isinstance(part, RemovedLinear)), None)
        if slot:
            set_module(head.before, slot, layer)
            layer = head.before
        set_module(folded, path, layer)
    if images is not None:
        folded.fold_agreement = (_evaluate(folded, images).argmax(1) == expected.argmax(1)).float().mean().item()
    return folded


@torch.no_grad()
def _evaluate(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits in evaluation. Each module's mode is afterwards what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return model.eval()(images)
    finally:
        for module, training in modes:
            module.training = training


def _measure(
        model: nn.Module,
        heads: list[DL2PAHead],
        images: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the logits (B, C), and the mean length of each head's embeddings by the head's path."""
    lengths: dict[nn.Module, float] = {}

    def note(neck: nn.Module, _, z: torch.Tensor) -> None:
        lengths[neck] = z.float().norm(dim=-1).mean().clamp(min=1e-6).item()

    hooks = [head.neck.register_forward_hook(note) for head in heads]
    try:
        logits = _evaluate(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {path: lengths[module.neck] for path, module in model.named_modules()
                    if isinstance(module, DL2PAHead)}


def _neck(head: DL2PAHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neck as in evaluation, as a matrix (d, in_features) and a bias (d,), in float64."""
    if head.config.neck == 'none':
        eye = torch.eye(head.dim, dtype=torch.float64, device=head.prototypes.device)
        return eye, eye.new_zeros(head.dim)
    if head.config.neck == 'linear':
        return head.neck.weight.detach().double(), head.neck.bias.detach().double()
    linear, norm = head.neck
    gain = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return gain[:, None] * linear.weight.detach().double(), norm.bias.detach().double() - gain * norm.running_mean


def _layer(weight: torch.Tensor, bias: torch.Tensor | None, convolution: bool = False) -> nn.Module:
    rows, columns = weight.shape
    # On the meta device, so that no random numbers are drawn for weights that are given.
    if convolution:
        layer: nn.Module = nn.Conv2d(columns, rows, 1, device='meta')
        weight = weight[:, :, None, None]
    else:
        layer = nn.Linear(columns, rows, bias=bias is not None, device='meta')
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _class_vectors(head: DL2PAHead) -> torch.Tensor:
    """Return the scaled prototype of each class, (C, d), in float64."""
    return head.current_scale().detach().double() * head.class_prototypes.double()


def _linear(head: DL2PAHead, length: float) -> nn.Module:
    weight, bias = _neck(head)
    classes = _class_vectors(head) / length
    return _layer(classes @ weight, classes @ bias, convolution=head.channels_first)


def _exact(head: DL2PAHead, _: float) -> nn.Sequential:
    weight, bias = _neck(head)
    # sqrt(d) z / |z|, as PyTorch has it; its eps is 1e-12 on |z|^2, where a head takes shorter ones than 1e-6 for zero.
    norm = nn.RMSNorm(head.dim, eps=1e-12 / head.dim, elementwise_affine=False)
    layers = [_layer(weight, bias), norm, _layer(_class_vectors(head) / head.dim ** 0.5, None)]
    if head.channels_first:
        layers = [nn.Flatten(1), *layers, nn.Unflatten(1, (head.num_classes, 1, 1))]
    return nn.Sequential(*layers)
