"""The loss of a training: the script's criterion or one of our losses, and class weights by the classes' frequency."""
from typing import Any

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from ..head import DL2PAHead
from ..losses import BalancedSoftmaxLoss, DotRegressionLoss, SquaredCosineLoss
from ..options import PluginOptions

__all__ = ['PROTOTYPE_LOSSES', 'ClassWeights', 'make_criterion']

# Those that take embeddings too.
PROTOTYPE_LOSSES = {'squared_cosine': SquaredCosineLoss, 'dot_regression': DotRegressionLoss}


class ClassWeights:
    """Weighs each class by the inverse of its number of samples so far.

    `w_c = N / (C n_c)` with the number n_c of samples of class c, one more than were seen, and their sum N: the mean
    weight of a sample is 1. As in `BalancedSoftmaxLoss`, soft targets count by their shares, and each process of a
    distributed run counts its own samples, which are about proportional.

    Args:
        num_classes: C.
        device: The device of the weights.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self.counts = torch.ones(num_classes, device=device)

    @property
    def weights(self) -> torch.Tensor:
        """The weights (C,), float32."""
        return self.counts.sum() / (len(self.counts) * self.counts)

    def add(self, targets: torch.Tensor) -> None:
        """Count a batch.

        Args:
            targets: (B,) class indices, of which negative ones (`ignore_index`) do not count, or (B, C) soft targets.
        """
        targets = targets.to(self.counts.device)
        if targets.ndim == 2:
            self.counts = self.counts + targets.sum(dim=0)
        else:
            self.counts = self.counts.index_add(0, targets.long().clamp(min=0), (targets >= 0).to(self.counts.dtype))

    def apply_to(self, criterion: nn.Module) -> None:
        """Set the weights of a loss.

        Args:
            criterion: A loss with the buffer `weight` (C,).
        """
        # A new tensor: the backward pass of an earlier batch may need the old one.
        criterion.weight = self.weights

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, on the CPU."""
        return {'counts': self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts.

        Args:
            state: What `state_dict` returned.
        """
        self.counts = state['counts'].to(self.counts)


def make_criterion(
        criterion: nn.Module,
        options: PluginOptions,
        head: DL2PAHead,
        class_weights: ClassWeights | None,
) -> tuple[nn.Module, str]:
    """Return the loss that the options ask for in place of a script's criterion.

    Args:
        criterion: The script's.
        options: The options of the training.
        head: The main head of the model.
        class_weights: The weights of the classes. With weights, timm's kinds of cross-entropy become PyTorch's.

    Returns:
        The loss, and a remark for the log.

    Raises:
        ValueError: The criterion is none that may be replaced, or that takes class weights.
    """
    weights = {} if class_weights is None else {'weight': class_weights.weights}
    weighted = ', classes weighted by their frequency' if weights else ''
    name = getattr(criterion, '__name__', type(criterion).__name__)
    if options.loss == 'criterion':
        return _weighted(criterion, **weights) if weights else criterion, f' ({name}{weighted})'
    if isinstance(criterion, (BinaryCrossEntropy, JsdCrossEntropy)):
        raise ValueError(f'dl2pa_loss={options.loss} replaces the criterion, here {name}: leave out either it or '
                         f'--bce-loss / --jsd-loss.')
    remark = f' (in place of {name}{weighted})'
    if options.loss == 'balanced_softmax':
        return BalancedSoftmaxLoss(head.num_classes, **weights).to(head.prototypes.device), remark
    return PROTOTYPE_LOSSES[options.loss](head, **options.loss_arguments(), **weights), remark


def _weighted(criterion: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Return a script's criterion with class weights (C,), or raise a ValueError if it is no cross-entropy."""
    kind = type(criterion)
    if kind is LabelSmoothingCrossEntropy:
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=criterion.smoothing)
    if kind is SoftTargetCrossEntropy:
        return nn.CrossEntropyLoss(weight=weight)
    if kind is nn.CrossEntropyLoss and criterion.weight is None:
        return nn.CrossEntropyLoss(weight=weight, ignore_index=criterion.ignore_index, reduction=criterion.reduction,
                                   label_smoothing=criterion.label_smoothing)
    name = getattr(criterion, '__name__', kind.__name__)
    reason = 'has weights of its own' if kind is nn.CrossEntropyLoss else 'is no cross-entropy, which alone takes them'
    raise ValueError(f'dl2pa_class_weights: the criterion {name} {reason}: leave the weights out, or --bce-loss and '
                     f'--jsd-loss, or choose one of our losses by dl2pa_loss.')
