"""How well scores tell samples of known classes from others: AUROC and the false positive rate."""
import math

import torch

from ..values import real_number
from .checks import check_scores

__all__ = ['auroc', 'false_positive_rate']


def auroc(known: torch.Tensor, unknown: torch.Tensor) -> float:
    """Return the area under the ROC curve: how often a known sample scores higher than an unknown one, ties by half.

    Args:
        known: (N,) floats, larger for what is known.
        unknown: (M,) floats.

    Raises:
        ValueError: One of them is empty or not finite.

    Example:
        >>> auroc(torch.tensor([0.9, 0.8, 0.4]), torch.tensor([0.1, 0.4]))
        0.9166666666666666
    """
    check_scores('known', known)
    check_scores('unknown', unknown)
    known, others = known.double(), unknown.double().sort().values
    below, up_to = torch.searchsorted(others, known), torch.searchsorted(others, known, right=True)
    return ((below + up_to).double().mean() / (2 * len(unknown))).item()


def false_positive_rate(known: torch.Tensor, unknown: torch.Tensor, recall: float = 0.95) -> float:
    """Return the share of unknown samples that pass for known at the threshold that a share of the known ones passes.

    At 0.95, this is the FPR95. The threshold is the highest score that at least this share of known samples reaches.

    Args:
        known: (N,) floats, larger for what is known.
        unknown: (M,) floats.
        recall: The share of the known, above 0, at most 1.

    Raises:
        ValueError: A set is empty or not finite, or the share is out of range.

    Example:
        >>> false_positive_rate(torch.tensor([0.9, 0.8, 0.7, 0.4]), torch.tensor([0.1, 0.75]), recall=0.75)
        0.5
    """
    check_scores('known', known)
    check_scores('unknown', unknown)
    recall = real_number('recall', recall, 0, 1)
    if not recall:
        raise ValueError('recall must be above 0.')
    # Rounded first: 0.07 * 100 is 7.000000000000001.
    passing = max(1, math.ceil(round(recall * len(known), 9)))
    threshold = known.double().sort(descending=True).values[passing - 1]
    return (unknown.double() >= threshold).double().mean().item()
