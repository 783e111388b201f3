"""What is confused with what, and whether errors go to near classes."""
from dataclasses import dataclass

import torch

from .checks import check_labels

__all__ = ['NeighbourErrors', 'confusions', 'neighbour_errors']


def confusions(labels: torch.Tensor, predictions: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return the pairs (class, predicted class, number of samples) that differ, the most frequent first.

    Args:
        labels: (N,) int64.
        predictions: (N,) int64.

    Raises:
        ValueError: They are not N classes each.

    Example:
        >>> confusions(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 1, 0]))
        [(0, 1, 2), (2, 0, 1)]
    """
    check_labels('labels', labels, len(labels))
    check_labels('predictions', predictions, len(labels))
    wrong = labels != predictions
    pairs, counts = torch.stack([labels[wrong], predictions[wrong]]).unique(dim=1, return_counts=True)
    return sorted(zip(*pairs.tolist(), counts.tolist()), key=lambda row: (-row[2], row))


@dataclass(frozen=True)
class NeighbourErrors:
    """How many errors go to classes near the right one.

    Attributes:
        errors: The number of wrong predictions.
        near: How many of them are among the k classes nearest to the right one.
        by_chance: The share that k of the C - 1 wrong classes would have by chance.
    """
    errors: int
    near: int
    by_chance: float

    @property
    def share(self) -> float | None:
        """The share of errors that are near; None without errors."""
        return self.near / self.errors if self.errors else None


def neighbour_errors(labels: torch.Tensor, predictions: torch.Tensor, neighbours: torch.Tensor) -> NeighbourErrors:
    """Count the errors that go to one of the nearest classes of the right one.

    Args:
        labels: (N,) int64.
        predictions: (N,) int64.
        neighbours: (C, k) int64, k < C: the classes nearest to each class, without itself. `nearest_neighbours` finds
            them among class vectors.

    Raises:
        ValueError: Labels or predictions are not N classes, or the neighbours are not (C, k).

    Example:
        >>> neighbour_errors(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1]), torch.tensor([[1], [0], [0]])).share
        0.5
    """
    if not isinstance(neighbours, torch.Tensor) or neighbours.ndim != 2 \
            or not 0 < neighbours.shape[1] < len(neighbours):
        raise ValueError('neighbours must be classes (C, k), k from 1 to C - 1.')
    num_classes, count = neighbours.shape
    check_labels('labels', labels, len(labels), num_classes)
    check_labels('predictions', predictions, len(labels), num_classes)
    wrong = labels != predictions
    near = (neighbours[labels[wrong]] == predictions[wrong].unsqueeze(1)).any(dim=1)
    return NeighbourErrors(int(wrong.sum()), int(near.sum()), count / (num_classes - 1))
