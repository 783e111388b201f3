"""SampledCrossEntropyLoss: cross-entropy over the batch's classes and a sample of the others."""
from typing import Literal

import torch

from ..head import NUM_SAMPLED, DL2PAHead
from ..values import real_number, whole_number
from .head_loss import HeadLoss
from .targets import Reduction

__all__ = ['SampledCrossEntropyLoss']


class SampledCrossEntropyLoss(HeadLoss):
    """Computes the cross-entropy of the scaled cosines over the batch's classes and a sample of the others.

    For very many classes: its cost does not grow with their number. With the embeddings z_i of a batch, the scale s,
    the set Y of the batch's classes and the set N of the n sampled classes that are not in Y, the loss of a sample is

        log(sum_{c in Y} exp(s <z_i, p_a(c)>) + w sum_{c in N} exp(s <z_i, p_a(c)>)) - s <z_i, p_a(y_i)>,

    where w = (C - |Y|) / |N|, so that the sum is an unbiased estimate of the softmax's denominator (sampled softmax:
    Jean et al. 2015; keeping the positive classes: Partial FC, An et al. 2022). Its logarithm is a little too small on
    average, by about half the estimate's relative variance, which falls as 1 / n; with n >= C the loss and its gradient
    are those of the full cross-entropy. See `ClassSampler` for how classes are sampled: alike in all processes.

    It takes the embeddings of a head with `train_output='embeddings'`, and gives a learned scale its gradient. The
    logits of any other head, of evaluation, and soft targets (mixup, cutmix) get the full cross-entropy, whose cost
    grows with C: for very many classes use hard labels, with `label_smoothing` at will. In a warm-up whose class
    vectors stand in for the prototypes, those are taken.

    Buffer, in the state dict: `sampler.step`, the number of batches. Save and load the loss's state dict to resume with
    the samples that an unbroken training would have drawn, as the plugin for timm's scripts does; without it, they
    begin again from the first.

    Args:
        head: The head whose output this takes. Held, but not registered: its parameters are not this module's. The
            samples are drawn with its seed.
        num_sampled: n, at least 1: number of classes that are sampled for a batch, besides its own.
        reduction: 'mean' or 'sum' over the batch, or 'none'.
        label_smoothing: Share of each target that is spread over all classes, 0 to 1.
        class_weights: (C,) weights of the classes, or 'auto' for the inverse of their frequencies; see `ClassWeights`.
            The mean divides by the samples' weights, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: The label of samples that are left out.

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: An argument is out of range.

    Example:
        >>> head = DL2PAHead(512, 1000, 32, prototypes=make_prototypes(1000, 32, method='bch'), learn_scale=True,
        ...                  train_output='embeddings')
        >>> criterion = SampledCrossEntropyLoss(head, num_sampled=100)
        >>> loss = criterion(head(torch.randn(8, 512)), torch.arange(8))
    """

    def __init__(
            self,
            head: DL2PAHead,
            num_sampled: int = NUM_SAMPLED,
            reduction: Reduction = 'mean',
            label_smoothing: float = 0.0,
            class_weights: torch.Tensor | Literal['auto'] | None = None,
            ignore_index: int = -100,
    ):
        super().__init__(head, reduction, class_weights, ignore_index, whole_number('num_sampled', num_sampled, 1))
        self.label_smoothing: float = real_number('label_smoothing', label_smoothing, 0, 1)

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, float32: () or, with reduction 'none', (B,).

        Args:
            output: What the head returned: embeddings (B, d), or logits (B, C).
            targets: Class indices (B,), or soft targets (B, C).

        Raises:
            ValueError: The shapes or dtypes do not fit.
        """
        output, targets = self._checked(output, targets)
        return self._cross_entropy(output, targets, self.class_weights(targets), self.label_smoothing)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, label_smoothing={self.label_smoothing:g}'
