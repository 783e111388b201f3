"""How good a prototype set is, beside what the sphere allows."""
import math
from dataclasses import dataclass

import torch

from .bounds import max_cosine_lower_bound
from .energy import UNIFORMITY, block_rows

__all__ = ['PrototypeQuality', 'prototype_quality']

# Multiply-adds up to which all is computed in float64.
_EXACT = 2 * 10 ** 11


@dataclass(frozen=True)
class PrototypeQuality:
    """What `prototype_quality` measured.

    Attributes:
        num_prototypes: K.
        dim: d.
        max_cosine: The largest cosine between two points; of a sample, a lower bound on it.
        mean_nearest_cosine: The mean over points of the cosine with the nearest other one.
        energy: The paper's `log mean_{i<j} exp(-2 |p_i - p_j|^2)`.
        bound: `max_cosine_lower_bound(K, d)`: no K points have a smaller `max_cosine`.
        gap: `max_cosine - bound`.
        mean_norm: The length of the mean of the points; 0 is balanced.
        sampled_rows: Number of points that were compared with all others: K, or fewer where that were too much work.
    """
    num_prototypes: int
    dim: int
    max_cosine: float
    mean_nearest_cosine: float
    energy: float
    bound: float
    gap: float
    mean_norm: float
    sampled_rows: int

    @property
    def sampled(self) -> bool:
        """Whether the figures come from a sample of the points."""
        return self.sampled_rows < self.num_prototypes


@torch.no_grad()
def prototype_quality(prototypes: torch.Tensor, max_work: float = 1e13) -> PrototypeQuality:
    """Measure a prototype set, in blocks, on its device.

    In float64 up to 2e11 multiply-adds (K^2 d), in float32 beyond; where all pairs would take more than `max_work` the
    figures are those of a sample of points against all, taken evenly, for a tenth of it; `sampled` says so.

    Args:
        prototypes: (K, d), K >= 2; the rows are divided by their lengths.
        max_work: Multiply-adds.

    Raises:
        ValueError: It is not a floating-point matrix of at least two finite rows that are not zero.
    """
    points = prototypes.detach()
    if points.ndim != 2 or len(points) < 2 or not points.is_floating_point():
        raise ValueError(f'prototypes must be at least 2 rows (K, d) of floats, not {points.dtype} of the shape '
                         f'{tuple(points.shape)}.')
    num_points, dim = points.shape
    work = num_points * num_points * dim
    points = points.double() if work <= _EXACT else points.float()
    lengths = points.norm(dim=1, keepdim=True)
    broken = ~(torch.isfinite(lengths) & (lengths > 0)).squeeze(1)
    if broken.any():
        raise ValueError(f'prototypes must have finite rows that are not zero: row {int(broken.nonzero()[0])} is not.')
    if bool(((lengths - 1).abs() > 1e-7).any()):
        points = points / lengths
    chosen = torch.arange(num_points, device=points.device)
    if work > max_work:
        chosen = chosen[::-(-num_points // max(1, int(max_work / 10) // (num_points * dim)))]
    nearest = torch.empty(len(chosen), dtype=points.dtype, device=points.device)
    total = 0.0
    for rows in block_rows(len(chosen), num_points):
        cosines = points[chosen[rows]] @ points.T
        cosines[torch.arange(rows.stop - rows.start, device=points.device), chosen[rows]] = -torch.inf
        nearest[rows] = cosines.amax(dim=1)
        total += cosines.sub_(1.0).mul_(UNIFORMITY).exp_().sum(dtype=torch.float64).item()
    bound = max_cosine_lower_bound(num_points, dim)
    max_cosine = min(1.0, nearest.max().item())
    return PrototypeQuality(
        num_prototypes=num_points,
        dim=dim,
        max_cosine=max_cosine,
        mean_nearest_cosine=nearest.mean(dtype=torch.float64).item(),
        energy=math.log(total / (len(chosen) * (num_points - 1))),
        bound=bound,
        gap=max_cosine - bound,
        mean_norm=points.mean(dim=0, dtype=torch.float64).norm().item(),
        sampled_rows=len(chosen),
    )
