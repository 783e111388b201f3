"""Gathering: the samples of all processes of a distributed run, for what costs less so than sums over all classes."""
import torch
import torch.nn as nn

from ..distributed import gather_over_ranks, is_distributed, largest_over_ranks, rank
from ..head import MANY_CLASSES

__all__ = ['Gathering']


class Gathering:
    """Gathers the labels of a batch, their shares and what belongs to them from all processes.

    Batches of different sizes are filled up to the largest of the first ones, with shares of zero. Finding that out
    waits for the device, once.
    """

    def __init__(self) -> None:
        self._capacity: int | None = None

    def __call__(self, labels: torch.Tensor, *others: torch.Tensor) -> tuple[slice, list[torch.Tensor]]:
        """Return which of the gathered rows are this process's, and the gathered tensors.

        Args:
            labels: (m,).
            others: (m, ...) each; filled up with zeros.

        Raises:
            RuntimeError: A process has more labels than any had at first.
        """
        if not is_distributed():
            return slice(0, len(labels)), [labels, *others]
        if self._capacity is None:
            self._capacity = largest_over_ranks(len(labels), labels.device)
        missing = self._capacity - len(labels)
        if missing < 0:
            raise RuntimeError(f'a batch has {len(labels)} labels, but the largest of the first batches of all '
                               f'processes had {self._capacity}: with more than {MANY_CLASSES} classes batches must '
                               f'not grow.')
        gathered = [gather_over_ranks(nn.functional.pad(each, (0, 0) * (each.ndim - 1) + (0, missing)))
                    for each in (labels, *others)]
        first = rank() * self._capacity
        return slice(first, first + len(labels)), gathered
