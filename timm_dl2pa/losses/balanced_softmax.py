"""BalancedSoftmaxLoss: cross-entropy that allows for the frequencies of the classes."""
from typing import Literal

import torch

from .targets import Reduction, counted
from .weighted_cross_entropy import WeightedCrossEntropyLoss

__all__ = ['BalancedSoftmaxLoss']


class BalancedSoftmaxLoss(WeightedCrossEntropyLoss):
    """Computes the cross-entropy of `logits_c + log n_c`, with the number n_c of samples of class c, for long tails.

    (Balanced softmax, Ren et al., NeurIPS 2020; logit adjustment, Menon et al., ICLR 2021.) The term tells the softmax
    the frequency of the classes, so that the logits need not learn it: in evaluation, without the term, they classify
    as if all classes were equally frequent. For equally frequent classes it is the cross-entropy.

    It takes the logits of any classifier, a DL2PA head's or a linear one's. Without `class_counts` it counts the
    targets that it is given while gradients are enabled, one more for each class; soft ones by their shares. Each
    process of a distributed run counts its own, which are about proportional.

    Buffer, in the state dict: `class_counts` (C,) float32.

    Args:
        num_classes: C.
        class_counts: (C,) positive numbers, proportional to the numbers of samples. Default: counted in training.
        reduction: 'mean' or 'sum' over the batch, or 'none'.
        class_weights: (C,) weights of the classes, or 'auto'; see `ClassWeights`. (Both allow for the frequencies:
            'auto' on top of this loss does so twice.)
        ignore_index: The label of samples that are left out.

    Raises:
        ValueError: The counts are not C positive, finite numbers, or `reduction` is unknown.

    Example:
        >>> criterion = BalancedSoftmaxLoss(num_classes=3, class_counts=torch.tensor([500, 50, 5]))
        >>> loss = criterion(torch.randn(8, 3), torch.randint(0, 3, (8,)))
    """

    class_counts: torch.Tensor

    def __init__(
            self,
            num_classes: int,
            class_counts: torch.Tensor | None = None,
            reduction: Reduction = 'mean',
            class_weights: torch.Tensor | Literal['auto'] | None = None,
            ignore_index: int = -100,
    ):
        super().__init__(num_classes, class_weights, ignore_index=ignore_index, reduction=reduction)
        self.counting: bool = class_counts is None
        counts = torch.as_tensor([1.0] * self.num_classes if class_counts is None else class_counts).float()
        if counts.shape != (self.num_classes,) or not bool((counts.isfinite() & (counts > 0)).all()):
            raise ValueError(f'class_counts must be {self.num_classes} positive numbers: count a class without samples '
                             f'as 1.')
        self.register_buffer('class_counts', counts.clone())

    def _adjusted(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Count the targets, and return `logits_c + log n_c`."""
        if self.class_counts.device != logits.device:
            self.to(logits.device)
        if self.counting and torch.is_grad_enabled():
            self.class_counts = counted(self.class_counts, targets, self.ignore_index)
        return logits + self.class_counts.log()

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, reduction={self.reduction!r}'
