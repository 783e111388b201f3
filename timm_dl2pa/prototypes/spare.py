"""Prototypes that no class has, spread again beside those that classes have."""
import torch
import torch.nn.functional as F

from .energy import UNIFORMITY, block_rows

__all__ = ['spread_spare']

# Steps of the descent, and the angle of the first one in radians; they become shorter linearly.
_STEPS = 300
_LONGEST = 0.05
# The most multiply-adds of all steps: about a minute on one core.
_MAX_WORK = 10 ** 12


@torch.no_grad()
def spread_spare(prototypes: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Move spare prototypes away from all others, which stay, and from one another.

    Each goes down the gradient of its part of the paper's energy (Eq. 4-5), `sum_j exp(-2 |p_i - p_j|^2)`, in steps of
    one length for all. Where a descent of some steps takes too much work, fewer are done, and of very many prototypes
    none.

    Args:
        prototypes: (K, d) float32 unit rows.
        spare: (n,) int64, the rows that move.

    Returns:
        (K, d) float32 unit rows.
    """
    moved = prototypes.clone()
    steps = min(_STEPS, _MAX_WORK // max(1, 2 * len(spare) * prototypes.numel()))
    for step in range(steps):
        points = moved[spare]
        pull = torch.empty_like(points)
        for rows in block_rows(len(points), len(moved)):
            kernel = (UNIFORMITY * (points[rows] @ moved.t() - 1)).exp_()
            kernel[torch.arange(len(kernel), device=kernel.device), spare[rows]] = 0.0
            pull[rows] = kernel @ moved
        pull -= (pull * points).sum(dim=1, keepdim=True) * points
        length = _LONGEST * (1 - step / steps)
        moved[spare] = F.normalize(points - length * F.normalize(pull, dim=1), dim=1)
    return moved
