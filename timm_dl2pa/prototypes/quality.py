"""The quality of a prototype set, compared with the proven bound."""
import math
from dataclasses import dataclass

import torch

from .bounds import max_cosine_lower_bound
from .energy import UNIFORMITY
from .nearest import cosine_blocks

__all__ = ['PrototypeQuality', 'prototype_quality']

# The most multiply-adds that are done in float64.
_MAX_FLOAT64_WORK = 2 * 10 ** 11


@dataclass(frozen=True)
class PrototypeQuality:
    """The measurements of `prototype_quality`.

    Attributes:
        num_prototypes: K, the number of points.
        dim: d, the dimension of the space.
        max_cosine: The largest cosine between two points. If `sampled`, a lower bound on it.
        mean_nearest_cosine: The mean, over the points, of the cosine with the nearest other point.
        energy: The paper's uniformity, `log mean_{i<j} exp(-2 |p_i - p_j|^2)`.
        bound: `max_cosine_lower_bound(K, d)`. No set of K points has a smaller `max_cosine`.
        gap: `max_cosine - bound`.
        mean_norm: The length of the mean of the points; 0 for a balanced set.
        sampled_rows: The number of points that were compared with all others: K, or fewer if that takes too much work.
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
        """Whether the figures come from a sample of the points, not from all pairs."""
        return self.sampled_rows < self.num_prototypes


@torch.no_grad()
def prototype_quality(prototypes: torch.Tensor, max_work: float = 1e13) -> PrototypeQuality:
    """Measure how evenly a prototype set is spread, in blocks, on its device.

    Computed in float64 up to 2e11 multiply-adds (K^2 d), in float32 beyond. If all pairs take more than `max_work`
    multiply-adds, an evenly spaced sample of the points is compared with all points, for a tenth of `max_work`; the
    result is then `sampled`.

    Args:
        prototypes: (K, d), K >= 2, any floating-point dtype. The rows are normalised to unit length.
        max_work: The most multiply-adds for all pairs.

    Returns:
        The measurements, a `PrototypeQuality`.

    Raises:
        ValueError: `prototypes` is not a floating-point matrix of at least two rows, or a row is zero or not finite.

    Example:
        >>> quality = prototype_quality(make_prototypes(16, 8))
        >>> abs(quality.gap) < 1e-6  # no set of 16 points in 8 dimensions has a smaller maximal cosine
        True
    """
    points = prototypes.detach()
    if points.ndim != 2 or len(points) < 2 or not points.is_floating_point():
        raise ValueError(f'prototypes must be at least 2 rows (K, d) of floats, not {points.dtype} of the shape '
                         f'{tuple(points.shape)}.')
    num_points, dim = points.shape
    work = num_points * num_points * dim
    points = points.double() if work <= _MAX_FLOAT64_WORK else points.float()
    lengths = points.norm(dim=1, keepdim=True)
    invalid = ~(torch.isfinite(lengths) & (lengths > 0)).squeeze(1)
    if invalid.any():
        raise ValueError(f'prototypes must have finite rows that are not zero: row {int(invalid.nonzero()[0])} is '
                         f'zero or not finite.')
    if bool(((lengths - 1).abs() > 1e-7).any()):
        points = points / lengths
    sample = torch.arange(num_points, device=points.device)
    if work > max_work:
        sample = sample[::-(-num_points // max(1, int(max_work / 10) // (num_points * dim)))]
    nearest_blocks = []
    total = 0.0
    for _, cosines in cosine_blocks(points, sample):
        nearest_blocks.append(cosines.amax(dim=1))
        total += cosines.sub_(1.0).mul_(UNIFORMITY).exp_().sum(dtype=torch.float64).item()
    nearest = torch.cat(nearest_blocks)
    bound = max_cosine_lower_bound(num_points, dim)
    max_cosine = min(1.0, nearest.max().item())
    return PrototypeQuality(
        num_prototypes=num_points,
        dim=dim,
        max_cosine=max_cosine,
        mean_nearest_cosine=nearest.mean(dtype=torch.float64).item(),
        energy=math.log(total / (len(sample) * (num_points - 1))),
        bound=bound,
        gap=max_cosine - bound,
        mean_norm=points.mean(dim=0, dtype=torch.float64).norm().item(),
        sampled_rows=len(sample),
    )
