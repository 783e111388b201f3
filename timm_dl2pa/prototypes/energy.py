"""The energy of a point set: the paper's uniformity objective (Eq. 4-5), and the family of objectives it belongs to."""
import numpy as np
import torch

__all__ = ['UNIFORMITY', 'block_rows', 'pair_energy', 'uniformity']

# |p - q|^2 = 2 - 2 p.q on the sphere: the paper's exp(-2 |p - q|^2) is exp(4 (p.q - 1)).
UNIFORMITY = 4.0
# Rows are taken together as long as their cosines with all points stay below this many numbers (64 MiB in float64).
_BLOCK_ENTRIES = 2 ** 23


def block_rows(num_rows: int, num_points: int) -> list[slice]:
    """Return slices of 0..num_rows-1 whose cosines with K points are few enough to be held at once."""
    step = max(1, _BLOCK_ENTRIES // num_points)
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def pair_energy(
        points: torch.Tensor, beta: float, orbit_sizes: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """Return `log mean_{i<j} exp(beta (<p_i, p_j> - 1))` and its gradient.

    At beta = 4 it is the paper's uniformity. Divided by beta it grows to the largest cosine (less 1) as beta does.

    Args:
        points: Unit rows (K, d), K >= 2, float32 or float64, on any device.
        beta: Inverse temperature, positive.
        orbit_sizes: (n,), of points' dtype: the first n points each stand for so many, under a symmetry of the whole
            set, which move along with them. Default: every point stands for itself.

    Returns:
        The energy, and its gradient with respect to the rows (K, d), or to the first n of them.
    """
    num_points = len(points)
    num_rows = num_points if orbit_sizes is None else len(orbit_sizes)
    largest, total = -1.0, 0.0
    pull = torch.empty_like(points[:num_rows])
    for rows in block_rows(num_rows, num_points):
        kernel = points[rows] @ points.T
        here = torch.arange(rows.start, rows.stop, device=points.device)
        kernel[here - rows.start, here] = -torch.inf
        # At a large beta exp(beta (c - 1)) underflows: every term is taken relative to the largest cosine so far.
        highest = max(largest, kernel.max().item())
        if highest > largest:
            smaller = np.exp(beta * (largest - highest))
            total *= smaller
            pull[:rows.start] *= smaller
            largest = highest
        kernel.sub_(largest).mul_(beta).exp_()
        if orbit_sizes is not None:
            kernel *= orbit_sizes[rows].unsqueeze(1)
        total += kernel.sum(dtype=torch.float64).item()
        torch.mm(kernel, points, out=pull[rows])
    # Each pair was counted twice, in the sum and (as a row and as a column) in the gradient.
    energy = beta * (largest - 1.0) + np.log(total / (num_points * (num_points - 1)))
    return float(energy), pull.mul_(2.0 * beta / total)


def uniformity(points: np.ndarray | torch.Tensor) -> float:
    """Return `log mean_{i<j} exp(-2 |p_i - p_j|^2)` of unit rows (K, d), K >= 2, in float64; lower is more even.

    DL2PA, Eq. 4-5, after Wang & Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", with t = 2.
    """
    points = torch.as_tensor(points, dtype=torch.float64, device='cpu').detach()
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f'points must be at least 2 rows (K, d), not an array of the shape {tuple(points.shape)}.')
    return pair_energy(points, UNIFORMITY)[0]
