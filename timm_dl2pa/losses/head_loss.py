"""HeadLoss: what the losses of a DL2PA head share, the cross-entropy of its logits or of its embeddings among it."""
from typing import Literal

import torch
import torch.nn as nn

from ..head import ClassSampler, DL2PAHead, plain_tensor
from ..head.numerics import cosines
from ..values import whole_number
from .class_weights import ClassWeights
from .targets import Reduction, check_reduction, checked_targets, reduced

__all__ = ['HeadLoss']


class HeadLoss(nn.Module):
    """A loss of what a head returns: logits (B, C), or in training with `train_output='embeddings'` embeddings (B, d).

    Which of the two an output is, is decided by the head's `train_output` and mode, never by its shape.

    Args:
        head: The head whose output this takes. Held, but not registered: its parameters are not this module's.
        reduction: 'mean' or 'sum' over the batch, or 'none'.
        class_weights: See `ClassWeights`.
        ignore_index: The label of samples that are left out.
        num_sampled: Number of classes that `_cross_entropy` samples for a batch of embeddings. None: it takes all.

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: An argument is out of range.
    """

    def __init__(self, head: DL2PAHead, reduction: Reduction, class_weights: torch.Tensor | Literal['auto'] | None,
                 ignore_index: int, num_sampled: int | None):
        super().__init__()
        if not isinstance(head, DL2PAHead):
            raise TypeError(f'head must be a DL2PAHead, not {type(head).__name__}: of a wrapped model, take '
                            f'model.get_classifier() (the first of them, if it has several).')
        self._head = (head,)  # in a tuple, so that the head's parameters do not become the loss's
        self.reduction = check_reduction(reduction)
        self.ignore_index: int = whole_number('ignore_index', ignore_index)
        self.class_weights: ClassWeights = ClassWeights(head.num_classes, class_weights, self.ignore_index)
        self.sampler: ClassSampler | None = None if num_sampled is None else \
            ClassSampler(head.num_classes, num_sampled, head.config.seed).to(head.prototypes.device)

    @property
    def head(self) -> DL2PAHead:
        return self._head[0]

    def _takes_embeddings(self) -> bool:
        return self.head.training and self.head.train_output == 'embeddings'

    def _checked(self, output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and targets as plain tensors, or raise a ValueError if shapes or dtypes do not fit."""
        output = plain_tensor(output)
        embedded = self._takes_embeddings()
        width = self.head.dim if embedded else self.head.num_classes
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[1] != width:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f'output must be the {"embeddings" if embedded else "logits"} (B, {width}) that the head '
                             f'returns now, not {what}.')
        return output, checked_targets(targets, output, self.head.num_classes)

    def _cross_entropy(self, output: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None,
                       label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy of checked output and targets, with the weights (C,) of the classes.

        It is over the batch's classes and a sample of the others where the output is embeddings, the targets are hard
        and there is a sampler; otherwise over all classes.
        """
        if self.sampler is not None and self._takes_embeddings() and targets.ndim == 1:
            losses = self._sampled(output, targets, weights, label_smoothing)
        else:
            logits = self.head.current_scale() * self.head.cosines(output) if self._takes_embeddings() else output
            losses = nn.functional.cross_entropy(
                logits.float(), targets, weight=weights, ignore_index=self.ignore_index,
                label_smoothing=label_smoothing, reduction='none')
        return reduced(losses, targets, self.reduction, weights, self.ignore_index)

    def _sampled(self, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None,
                 label_smoothing: float) -> torch.Tensor:
        kept = labels != self.ignore_index
        labels = labels.where(kept, 0)
        classes, log_weights, _ = self.sampler(labels, kept)
        logits = self.head.current_scale() * cosines(embeddings, self.head.vectors_of(classes))
        log_total = (logits + log_weights).logsumexp(dim=1)
        losses = log_total - logits.diagonal()  # column i is of the class of sample i
        if weights is not None:
            losses = weights[labels] * losses
        if label_smoothing:
            # The mean over all classes is estimated as the sum is.
            shares = log_weights.exp() / self.head.num_classes
            if weights is not None:
                shares = weights[classes] * shares
            spread = log_total * shares.sum() - (logits * shares).sum(dim=1)
            losses = (1 - label_smoothing) * losses + label_smoothing * spread
        return torch.where(kept, losses, 0.0)

    def extra_repr(self) -> str:
        return f'reduction={self.reduction!r}'
