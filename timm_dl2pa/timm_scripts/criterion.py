"""The loss of a training: the script's criterion or one of our losses, and class weights by the classes' frequency."""
from typing import Any

import torch.nn as nn
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from ..head import DL2PAHead
from ..losses import (
    BalancedSoftmaxLoss,
    DotRegressionLoss,
    SampledCrossEntropyLoss,
    SquaredCosineLoss,
    WeightedCrossEntropyLoss,
)
from ..options import PluginOptions

__all__ = ['HEAD_LOSSES', 'OUR_LOSSES', 'make_criterion']

# Those that take embeddings too.
HEAD_LOSSES: dict[str, type[nn.Module]] = {
    'squared_cosine': SquaredCosineLoss, 'dot_regression': DotRegressionLoss,
    'sampled_cross_entropy': SampledCrossEntropyLoss}
OUR_LOSSES: tuple[type[nn.Module], ...] = (
    *HEAD_LOSSES.values(), WeightedCrossEntropyLoss)  # balanced softmax is one of the latter


def make_criterion(criterion: nn.Module, options: PluginOptions, head: DL2PAHead) -> tuple[nn.Module, str]:
    """Return the loss that the options ask for in place of a script's criterion.

    Args:
        criterion: The script's. With class weights, PyTorch's and timm's kinds of cross-entropy become ours. The
            sampled cross-entropy takes over their label smoothing.
        options: The options of the training.
        head: The main head of the model.

    Returns:
        The loss, and a remark for the log.

    Raises:
        ValueError: The criterion is none that may be replaced, or that takes class weights.
    """
    weights = options.class_weights
    weighted = ', classes weighted by their frequency' if weights else ''
    name = getattr(criterion, '__name__', type(criterion).__name__)
    if options.loss == 'criterion':
        remark = f' ({name}{weighted})'
        return (_weighted(criterion, head, weights) if weights else criterion), remark
    if isinstance(criterion, (BinaryCrossEntropy, JsdCrossEntropy)):
        raise ValueError(f'dl2pa_loss={options.loss} replaces the criterion, here {name}: leave out either it or '
                         f'--bce-loss / --jsd-loss.')
    remark = f' (in place of {name}{weighted})'
    if options.loss == 'balanced_softmax':
        return BalancedSoftmaxLoss(head.num_classes, class_weights=weights).to(head.prototypes.device), remark
    arguments = options.loss_arguments()
    if options.loss == 'sampled_cross_entropy':
        arguments |= _cross_entropy_arguments(criterion) or {}
        smoothing = arguments.get('label_smoothing')
        remark = f' (in place of {name}{f", with its smoothing {smoothing:g}" if smoothing else ""}{weighted})'
    return HEAD_LOSSES[options.loss](head, **arguments, class_weights=weights), remark


def _cross_entropy_arguments(criterion: nn.Module) -> dict[str, Any] | None:
    """Return the arguments with which our cross-entropies are a script's criterion; None if it is no cross-entropy."""
    kind = type(criterion)
    if kind is LabelSmoothingCrossEntropy:
        return {'label_smoothing': criterion.smoothing}
    if kind is nn.CrossEntropyLoss and criterion.weight is None:
        return {'label_smoothing': criterion.label_smoothing, 'ignore_index': criterion.ignore_index,
                'reduction': criterion.reduction}
    return {} if kind is SoftTargetCrossEntropy else None


def _weighted(criterion: nn.Module, head: DL2PAHead, class_weights: str) -> nn.Module:
    """Return a script's criterion with class weights, or raise a ValueError if it is no cross-entropy."""
    arguments = _cross_entropy_arguments(criterion)
    if arguments is None:
        kind = type(criterion)
        name = getattr(criterion, '__name__', kind.__name__)
        reason = 'has weights of its own' if kind is nn.CrossEntropyLoss else \
            'is no cross-entropy, which alone takes them'
        raise ValueError(f'dl2pa_class_weights: the criterion {name} {reason}: leave the weights out, or --bce-loss '
                         f'and --jsd-loss, or choose one of our losses by dl2pa_loss.')
    return WeightedCrossEntropyLoss(head.num_classes, class_weights, **arguments).to(head.prototypes.device)
