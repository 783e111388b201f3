"""Targets: the classes of a batch's samples, hard or soft, checked, without the samples that do not count."""
from collections.abc import Iterator

import torch

__all__ = ['IGNORED', 'check_targets', 'check_values', 'samples_that_count', 'shares_of']

# The label of a sample that is left out, as torch's losses have it.
IGNORED = -100

# How far the sum of a row of soft targets may be from one, for rounding in half precision.
_TOLERANCE = 0.01


def check_targets(targets: torch.Tensor, embeddings: torch.Tensor, num_classes: int) -> None:
    """Raise a ValueError unless targets are class indices (B,) or soft targets (B, C) for B embeddings (B, d)."""
    if embeddings.ndim != 2:
        raise ValueError(f'the head gave embeddings of the shape {tuple(embeddings.shape)}, not one for each sample: '
                         f"the model does not pool its features. Make it with another global_pool than '', such as "
                         f"'avg' or 'token'.")
    size = len(embeddings)
    if targets.ndim == 0 or targets.shape[1:] not in ((), (num_classes,)):
        raise ValueError(f'targets must be class indices (B,) or soft targets (B, {num_classes}), '
                         f'not of the shape {tuple(targets.shape)}.')
    if len(targets) != size:
        raise ValueError(f'targets are for {len(targets)} samples, but there are {size} embeddings.')
    if targets.is_complex():
        raise ValueError(f'targets must be class indices or shares, not {targets.dtype}.')
    if targets.ndim == 1 and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise ValueError(f'targets of the shape {tuple(targets.shape)} must be class indices (int64), '
                         f'not {targets.dtype}.')


def check_values(targets: torch.Tensor, num_classes: int, ignore_index: int = IGNORED) -> None:
    """Raise a ValueError that names the value unless checked targets are within range. Waits for the device.

    Labels are 0..C-1 or `ignore_index`; rows of shares are not negative and sum to one. Rows that are not finite pass:
    such samples are left out.
    """
    if targets.ndim == 1:
        labels = targets.long()
        outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
        if bool(outside.any()):
            raise ValueError(f'targets contained class {int(labels[outside][0])}, outside 0..{num_classes - 1}. '
                             f'(Samples with the label {ignore_index}, ignore_index, are left out.)')
        return
    shares = targets.float()
    shares = shares[shares.isfinite().all(dim=1)]
    if bool((shares < 0).any()):
        raise ValueError(f'targets must be shares of at least 0, not {float(shares.min()):.4g}.')
    sums = shares.sum(dim=1)
    wrong = (sums - 1).abs() > _TOLERANCE
    if bool(wrong.any()):
        raise ValueError(f'each row of soft targets must sum to one, not to {float(sums[wrong][0]):.4g}. Multi-label '
                         f'targets have no meaning for a DL2PA head, which gives each sample one class.')


def samples_that_count(
        embeddings: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mark the samples of a batch that are left out: those to ignore, and those that are not finite.

    A mixed-precision training skips a batch in which an activation overflowed, and goes on. So such samples must not
    spoil a class mean either. Never waits for the device.

    Args:
        embeddings: (B, d).
        targets: (B,) or (B, C), checked by `check_targets`, on the same device.
        ignore_index: The label of samples to ignore.

    Returns:
        Embeddings with rows of zeros, and targets with `IGNORED` or rows of zeros, for the samples left out; and how
        many samples there were without those to ignore, and how many of them were not finite: (2,) int64.
    """
    finite = embeddings.isfinite().all(dim=1)
    if targets.ndim == 1:
        targets = targets.long()
        asked = targets != ignore_index
        kept = finite & asked
        targets = torch.where(kept, targets, IGNORED)
    else:
        targets = targets.float()
        finite = finite & targets.isfinite().all(dim=1)
        asked, kept = torch.ones_like(finite), finite
        targets = torch.where(kept.unsqueeze(1), targets, 0)
    tally = torch.stack([asked.sum(), (asked & ~finite).sum()])
    return torch.where(kept.unsqueeze(1), embeddings, 0.0), targets, tally


def shares_of(targets: torch.Tensor, num_classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield class indices (B,) and the shares (B, 1), float32, that the samples have in them.

    A sample that is left out (`IGNORED`, or a row of equal shares) has the share zero.
    """
    if targets.ndim == 1:
        # On a GPU an index out of range would end the process before a check can name it.
        targets = targets.long()
        yield targets.clamp(0, num_classes - 1), (targets != IGNORED).float().unsqueeze(1)
        return
    targets = targets.float()
    shares, labels = targets.topk(min(2, num_classes), dim=1)
    shares = shares - targets.amin(dim=1, keepdim=True)
    total = shares.sum(dim=1, keepdim=True)
    shares = torch.where(total == 0, total, shares / total)
    yield from zip(labels.unbind(1), shares.split(1, dim=1))
