"""The softmax over very many classes, in blocks: its largest probability and what a temperature is fitted by."""
from dataclasses import dataclass

import torch

from ..head.numerics import cosines
from ..values import real_number
from .checks import check_rows

__all__ = ['SoftmaxStatistics', 'softmax_statistics']

# Rows and classes of one block: 32 MiB of logits.
_ROWS, _CLASSES = 4096, 2048


@dataclass(frozen=True)
class SoftmaxStatistics:
    """What is kept of the logits `l_c = scale * <z, p_c>` of each row, all (N,) float32.

    Attributes:
        largest: max_c l_c.
        log_sum: log sum_c exp(l_c).
        expected: sum_c softmax(l)_c l_c, the mean of the logits under their own softmax.
    """
    largest: torch.Tensor
    log_sum: torch.Tensor
    expected: torch.Tensor

    @property
    def confidence(self) -> torch.Tensor:
        """The largest probability, (N,) float32."""
        return (self.largest - self.log_sum).exp()


@torch.no_grad()
def softmax_statistics(embeddings: torch.Tensor, class_vectors: torch.Tensor, scale: float) -> SoftmaxStatistics:
    """Go over the logits of all classes in blocks.

    Args:
        embeddings: (N, d) unit rows.
        class_vectors: (C, d) unit rows, such as `head.class_prototypes`, on the same device.
        scale: The factor on the cosines, above 0.

    Raises:
        ValueError: The shapes do not fit, or the scale is not positive and finite.

    Example:
        >>> found = softmax_statistics(embeddings, head.class_prototypes, head.current_scale())
        >>> torch.allclose(found.confidence, head.cosines(embeddings).mul(head.current_scale()).softmax(1).amax(1))
        True
    """
    check_rows('embeddings', embeddings)
    check_rows('class_vectors', class_vectors, embeddings.shape[1])
    scale = real_number('scale', scale)
    if not 0 < scale < float('inf') or not len(class_vectors):
        raise ValueError(f'scale must be positive and finite, not {scale}, and class_vectors at least one row, not '
                         f'{len(class_vectors)}.')
    parts = [_of_rows(rows, class_vectors, scale) for rows in embeddings.split(_ROWS)]
    return SoftmaxStatistics(*(torch.cat(part) for part in zip(*parts)))


def _of_rows(rows: torch.Tensor, class_vectors: torch.Tensor, scale: float
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Go over all classes with one block of rows. The sums are relative to the largest logit so far."""
    largest = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
    for block in class_vectors.split(_CLASSES):
        logits = scale * cosines(rows, block.float())
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        shrunk = (before - largest).exp()
        shares = (logits - largest.unsqueeze(1)).exp()
        total = total * shrunk + shares.sum(dim=1)
        weighted = weighted * shrunk + (shares * logits).sum(dim=1)
    return largest, largest + total.log(), weighted / total
