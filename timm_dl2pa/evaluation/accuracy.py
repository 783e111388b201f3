"""Accuracy: top-k, and class by class."""
import torch

from ..values import whole_number
from .checks import check_labels

__all__ = ['class_counts', 'top_k_accuracy']


def top_k_accuracy(predictions: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Return the share of rows with their label among the first k predictions.

    Args:
        predictions: (N, n) int64, n >= k: the classes of each row, the likeliest first, as `head.nearest` returns them.
        labels: (N,) int64.
        k: From 1 to n.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: There are no rows, or shapes or k are out of range.

    Example:
        >>> top_k_accuracy(torch.tensor([[2, 0], [1, 2]]), torch.tensor([0, 1]), k=2)
        1.0
    """
    if not isinstance(predictions, torch.Tensor) or predictions.ndim != 2 or not len(predictions):
        raise ValueError('predictions must be classes (N, k) of at least one row.')
    check_labels('labels', labels, len(predictions))
    k = whole_number('k', k, 1, predictions.shape[1])
    return (predictions[:, :k] == labels.unsqueeze(1)).any(dim=1).double().mean().item()


def class_counts(predictions: torch.Tensor, labels: torch.Tensor, num_classes: int
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many rows of each class are predicted right, and how many there are.

    Args:
        predictions: (N,) int64.
        labels: (N,) int64.
        num_classes: C.

    Returns:
        Two counts (C,) int64.

    Raises:
        ValueError: Predictions or labels are not N classes.

    Example:
        >>> class_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        (tensor([1, 1]), tensor([2, 1]))
    """
    check_labels('labels', labels, len(labels), num_classes)
    check_labels('predictions', predictions, len(labels), num_classes)
    return (torch.bincount(labels[labels == predictions], minlength=num_classes),
            torch.bincount(labels, minlength=num_classes))
