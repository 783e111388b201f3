"""What the losses share: checked targets, samples that are left out, class counts, and the mean over a batch."""
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..head import plain_tensor

__all__ = ['REDUCTIONS', 'Reduction', 'as_labels', 'check_reduction', 'checked_targets', 'counted', 'reduced']

Reduction = Literal['mean', 'sum', 'none']
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def check_reduction(reduction: Reduction) -> Reduction:
    """Return it, or raise a ValueError if there is no such reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be one of {", ".join(REDUCTIONS)}, not {reduction!r}.')
    return reduction


def as_labels(targets: Any) -> torch.Tensor:
    """Return targets as a plain tensor: class indices (B,) as int64, soft targets (B, C) in their own dtype.

    Never waits for the device; shapes are checked elsewhere.

    Args:
        targets: A tensor (also of a subclass, as fastai's), an array of numpy, or a sequence of numbers.

    Raises:
        ValueError: They are no numbers, or class indices that are not whole numbers.
    """
    if not isinstance(targets, torch.Tensor):
        try:
            targets = torch.as_tensor(np.asarray(targets) if isinstance(targets, (list, tuple)) else targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f'targets must be class indices (B,) or soft targets (B, C), as a tensor, an array or a '
                             f'list of numbers, not a {type(targets).__name__} ({error}).') from None
    targets = plain_tensor(targets)
    if targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f'targets must be class indices (int64) or soft targets (float32), not {targets.dtype}.')
    if targets.ndim == 1:
        if targets.is_floating_point():
            raise ValueError(f'targets of the shape {tuple(targets.shape)} must be class indices (int64), not '
                             f'{targets.dtype}.')
        return targets.long()
    return targets


def checked_targets(targets: Any, output: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the targets of an output (B, ...) as class indices (B,) int64 or soft targets (B, C) float32.

    Raises:
        ValueError: They have another shape or a dtype that is neither; or, on the CPU, shares are negative.
    """
    size, given = len(output), targets
    targets = as_labels(targets)
    if not isinstance(given, torch.Tensor):
        targets = targets.to(output.device)
    if targets.shape not in ((size,), (size, num_classes)):
        raise ValueError(f'targets must be class indices ({size},) or soft targets ({size}, {num_classes}), not of the '
                         f'shape {tuple(targets.shape)}.')
    if targets.ndim == 1:
        return targets
    targets = targets.float()
    # On a device this would wait for it.
    if targets.device.type == 'cpu' and not torch.compiler.is_compiling() and bool((targets < 0).any()):
        raise ValueError(f'targets must be shares of at least 0, not {float(targets.min()):.4g}.')
    return targets


def counted(counts: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return class counts (C,) with those of checked targets added; rows that are not finite do not count."""
    if targets.ndim == 1:
        kept = targets != ignore_index
        return counts.index_add(0, targets.where(kept, 0), kept.to(counts.dtype))
    finite = targets.isfinite().all(dim=1, keepdim=True)
    return counts + torch.where(finite, targets, 0.0).sum(dim=0)


def reduced(
        per_sample: torch.Tensor,
        targets: torch.Tensor,
        reduction: Reduction,
        weights: torch.Tensor | None,
        ignore_index: int,
) -> torch.Tensor:
    """Return the loss of a batch from that of each sample.

    As in `torch.nn.CrossEntropyLoss`, the mean is over the samples that are not ignored, and divides by the sum of
    their weights; for soft targets, whose shares weigh, too. A batch in which all are ignored has the loss zero.

    Args:
        per_sample: (B,), weighted already, zero where ignored.
        targets: Checked.
        reduction: One of `REDUCTIONS`.
        weights: (C,) weights of the classes, or None.
        ignore_index: The label of samples that are left out.
    """
    if reduction == 'none':
        return per_sample
    if reduction == 'sum':
        return per_sample.sum()
    if targets.ndim == 2:
        return per_sample.mean() if weights is None else per_sample.sum() / (targets @ weights).sum()
    kept = targets != ignore_index
    share = kept.to(per_sample.dtype) if weights is None else weights[targets.where(kept, 0)] * kept
    return per_sample.sum() / share.sum().clamp_min(torch.finfo(per_sample.dtype).tiny)
