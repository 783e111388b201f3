"""`fold_dl2pa`: folds the DL2PA heads of a model into linear classifiers of a plain timm model."""
import copy

import torch
import torch.nn as nn

from ..head import DL2PAHead, heads_of
from .classifiers import unregistered_tensors
from .reparameterization import fuse_everything
from .wrapping import Model, RemovedLinear, record_registry_entry, set_module

__all__ = ['fold_dl2pa']


def fold_dl2pa(model: Model, *, normalize: bool = False, images: torch.Tensor | None = None) -> Model:
    """Fold the DL2PA heads of a model into linear classifiers, and return a plain timm model.

    The folded model ranks the classes of every image in the same order.
    The neck (with its batch norm in evaluation mode) and the prototypes are linear maps. Their product is one linear
    layer, as timm itself makes it. Only the division by the embedding's length |z| is left out, which is one positive
    number for all classes of an image (DL2PA, section 3). The folded logits are |z| times the original ones: the order
    of the classes is the same, their probabilities differ.

    A model with several classifiers adds their logits. The embeddings of each classifier have another length, and the
    order is preserved only approximately. For such a model `images` must be given: each classifier is divided by the
    mean length of its embeddings, and the share of images with the same predicted class is measured.

    Args:
        model: A wrapped timm model. It is not changed.
        normalize: Whether to keep the division, and with it the exact logits and probabilities. The classifier is then
            an `nn.Sequential` of PyTorch layers, and its checkpoint does not load into a plain timm model.
        images: A batch of model inputs, at least some dozen typical images.

    Returns:
        A copy of the model without any part of this package. Its state dict loads into `timm.create_model(name,
        num_classes=C)`, unless `normalize` is set. If `images` are given, its attribute `fold_agreement` is the share
        of them with the same predicted class.

    Raises:
        ValueError: The model has no DL2PA head, or it has several and neither `images` nor `normalize=True` is given.

    Example:
        >>> plain = fold_dl2pa(model)
        >>> type(plain.get_classifier())
        <class 'torch.nn.modules.linear.Linear'>
        >>> torch.save(plain.state_dict(), 'plain.pth')
        >>> loaded = timm.create_model('test_resnet', num_classes=100, checkpoint_path='plain.pth')  # needs timm alone
        >>> bool((loaded.eval()(images).argmax(1) == model.eval()(images).argmax(1)).all())
        True
    """
    heads = heads_of(model)
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: there is nothing to fold.')
    if len(heads) > 1 and not normalize and images is None:
        raise ValueError(f'{type(model).__name__} combines the logits of {len(heads)} classifiers, so that the folded '
                         f'model preserves the order of the classes only approximately: give images, a batch to '
                         f'measure the agreement on, or normalize=True, which is exact.')
    for head in heads:
        head.settle()  # an average, as of EMA weights
    expected = lengths = None
    if images is not None:
        expected, lengths = _measure(model, heads, images)
    folded = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in unregistered_tensors(model)
                                   if not tensor.is_leaf})
    for name in ('reset_classifier', 'get_classifier', 'dl2pa_options'):
        folded.__dict__.pop(name, None)
    record_registry_entry(folded, None)
    reference_weight = next(model.parameters())
    for path, head in [(path, module) for path, module in folded.named_modules() if isinstance(module, DL2PAHead)]:
        length = 1.0 if lengths is None or normalize else lengths[path]
        weight = next(head.neck.parameters(), reference_weight)
        fold = _fold_exactly if normalize else _fold_to_linear
        layer = fold(head, length).to(weight.device, weight.dtype).train(head.training)
        removed = next((name for name, part in head.before.named_modules() if isinstance(part, RemovedLinear)), None)
        if removed:
            set_module(head.before, removed, layer)
            layer = head.before
        set_module(folded, path, layer)
    fuse_everything(folded)
    if images is not None:
        folded.fold_agreement = (_evaluate(folded, images).argmax(1) == expected.argmax(1)).float().mean().item()
    return folded


@torch.no_grad()
def _evaluate(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the outputs in evaluation mode, and restore the mode of each module."""
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

    def record_length(neck: nn.Module, _, z: torch.Tensor) -> None:
        lengths[neck] = z.float().norm(dim=-1).mean().clamp(min=1e-6).item()

    hooks = [head.neck.register_forward_hook(record_length) for head in heads]
    try:
        logits = _evaluate(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {path: lengths[module.neck] for path, module in model.named_modules()
                    if isinstance(module, DL2PAHead)}


def _neck_as_linear(head: DL2PAHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neck in evaluation mode as a matrix (d, in_features) and a bias (d,), float64."""
    if head.config.neck == 'none':
        eye = torch.eye(head.dim, dtype=torch.float64, device=head.prototypes.device)
        return eye, eye.new_zeros(head.dim)
    if head.config.neck == 'linear':
        return head.neck.weight.detach().double(), head.neck.bias.detach().double()
    linear, norm = head.neck
    gain = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    return gain[:, None] * linear.weight.detach().double(), norm.bias.detach().double() - gain * norm.running_mean


def _linear_layer(weight: torch.Tensor, bias: torch.Tensor | None, convolution: bool = False) -> nn.Module:
    """Return a linear layer, or a 1x1 convolution, with the given weight (out, in) and bias (out,)."""
    rows, columns = weight.shape
    # Created on the meta device, so that no random numbers are drawn.
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
    """Return the scaled prototype of each class, (C, d) float64."""
    return head.current_scale().detach().double() * head.class_prototypes.double()


def _fold_to_linear(head: DL2PAHead, length: float) -> nn.Module:
    """Return one linear layer for embeddings of this length."""
    weight, bias = _neck_as_linear(head)
    vectors = _class_vectors(head) / length
    return _linear_layer(vectors @ weight, vectors @ bias, convolution=head.channels_first)


def _fold_exactly(head: DL2PAHead, _: float) -> nn.Sequential:
    """Return a linear layer, the normalisation and another linear layer."""
    weight, bias = _neck_as_linear(head)
    # Layer norm makes rows whose mean is zero sqrt(d + 1) long. All exporters know it, which is not so of RMS norm. Its
    # eps amounts to 1e-18 on |z|^2, nothing to the shortest embeddings that the head takes for more than zero (1e-6).
    isometry = _zero_mean_isometry(weight)
    width = head.dim + 1
    norm = nn.LayerNorm(width, eps=1e-18 / width, elementwise_affine=False)
    vectors = _class_vectors(head) @ isometry.T / width ** 0.5
    layers = [_linear_layer(isometry @ weight, isometry @ bias), norm, _linear_layer(vectors, None)]
    if head.channels_first:
        layers = [nn.Flatten(1), *layers, nn.Unflatten(1, (head.num_classes, 1, 1))]
    return nn.Sequential(*layers)


def _zero_mean_isometry(like: torch.Tensor) -> torch.Tensor:
    """Return a matrix (d + 1, d) with orthonormal columns of mean zero, for a matrix (d, ...) of the same kind.

    It is the part of a reflection that maps the last axis to the direction (1, ..., 1).
    """
    width = len(like) + 1
    normal = like.new_full((width,), width ** -0.5)
    normal[-1] -= 1
    return torch.eye(width, dtype=like.dtype, device=like.device)[:, :-1] \
        - 2 / normal.dot(normal) * normal[:, None] * normal[:-1]
