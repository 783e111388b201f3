"""WeightedCrossEntropyLoss: cross-entropy in which classes weigh differently."""
from typing import Literal

import torch
import torch.nn as nn

from ..head import plain_tensor
from ..values import real_number, whole_number
from .class_weights import ClassWeights
from .targets import Reduction, check_reduction, checked_targets, reduced

__all__ = ['WeightedCrossEntropyLoss']


class WeightedCrossEntropyLoss(nn.Module):
    """Computes the cross-entropy of logits with weights for the classes, of hard and soft targets alike.

    For hard targets it is `torch.nn.CrossEntropyLoss(weight=...)`. For soft targets the mean divides by the weights of
    the samples too, so that one-hot targets give what hard ones do.

    Args:
        num_classes: C.
        class_weights: See `ClassWeights`. With 'auto' they follow from the targets.
        label_smoothing: Share of each target that is spread over all classes, 0 to 1.
        ignore_index: The label of samples that are left out.
        reduction: 'mean' or 'sum' over the batch, or 'none'.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> criterion = WeightedCrossEntropyLoss(num_classes=3, class_weights='auto')
        >>> loss = criterion(torch.randn(8, 3), torch.randint(0, 3, (8,)))
    """

    def __init__(
            self,
            num_classes: int,
            class_weights: torch.Tensor | Literal['auto'] | None = 'auto',
            label_smoothing: float = 0.0,
            ignore_index: int = -100,
            reduction: Reduction = 'mean',
    ):
        super().__init__()
        self.num_classes: int = whole_number('num_classes', num_classes, least=1)
        self.class_weights: ClassWeights = ClassWeights(self.num_classes, class_weights, ignore_index)
        self.label_smoothing: float = real_number('label_smoothing', label_smoothing, 0, 1)
        self.ignore_index: int = whole_number('ignore_index', ignore_index)
        self.reduction = check_reduction(reduction)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, float32: () or, with reduction 'none', (B,).

        Args:
            logits: (B, C).
            targets: Class indices (B,), or soft targets (B, C).

        Raises:
            ValueError: The shapes or dtypes do not fit.
        """
        logits = plain_tensor(logits)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f'logits must be (B, {self.num_classes}), not {tuple(logits.shape)}.')
        targets = checked_targets(targets, logits, self.num_classes)
        weights = self.class_weights(targets)
        logits = self._adjusted(logits.float(), targets)
        losses = nn.functional.cross_entropy(logits, targets, weight=weights, ignore_index=self.ignore_index,
                                             label_smoothing=self.label_smoothing, reduction='none')
        return reduced(losses, targets, self.reduction, weights, self.ignore_index)

    def _adjusted(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, C), float32, whose cross-entropy it is, for checked targets."""
        return logits

    def extra_repr(self) -> str:
        return f'label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}'
