"""Checks of what the measures are given."""
from typing import Any

import torch

from ..values import shown

__all__ = ['check_labels', 'check_rows', 'check_scores']


def check_rows(name: str, rows: Any, dim: int | None = None) -> None:
    """Raise a ValueError unless `rows` are floats (N, d), of a given d or of any.

    Args:
        name: The name of the argument for the error.
        rows: What was given.
        dim: d. Default: any.
    """
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or dim not in (None, rows.shape[1]) \
            or not rows.is_floating_point():
        what = f'{rows.dtype} of the shape {tuple(rows.shape)}' if isinstance(rows, torch.Tensor) else shown(rows)
        raise ValueError(f'{name} must be floats (N, {"d" if dim is None else dim}), not {what}.')


def check_labels(name: str, labels: Any, count: int, num_classes: int | None = None) -> None:
    """Raise a ValueError unless `labels` are N whole numbers from 0 on, below C where C is given.

    Args:
        name: The name of the argument for the error.
        labels: What was given.
        count: N.
        num_classes: C. Default: any.
    """
    if not isinstance(labels, torch.Tensor) or labels.shape != (count,) or labels.is_floating_point() \
            or labels.is_complex() or labels.dtype == torch.bool:
        what = f'{labels.dtype} of the shape {tuple(labels.shape)}' if isinstance(labels, torch.Tensor) \
            else shown(labels)
        raise ValueError(f'{name} must be whole numbers ({count},), one for each row, not {what}.')
    if count and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        most = '' if num_classes is None else f' to {num_classes - 1}'
        raise ValueError(f'{name} must be from 0{most}, not from {labels.min().item()} to {labels.max().item()}.')


def check_scores(name: str, scores: Any) -> None:
    """Raise a ValueError unless `scores` are at least one finite number (N,).

    Args:
        name: The name of the argument for the error.
        scores: What was given.
    """
    if not isinstance(scores, torch.Tensor) or scores.ndim != 1 or not len(scores) or not scores.is_floating_point():
        what = f'{scores.dtype} of the shape {tuple(scores.shape)}' if isinstance(scores, torch.Tensor) \
            else shown(scores)
        raise ValueError(f'{name} must be at least one float, (N,), not {what}.')
    if not bool(scores.isfinite().all()):
        raise ValueError(f'{name} must be finite: leave out the rows that are not.')
