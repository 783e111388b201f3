"""The energy of a point set: the paper's uniformity objective (Eq. 4-5) and its family of pair energies."""
import numpy as np
import torch

__all__ = ['UNIFORMITY', 'block_rows', 'pair_energy', 'uniformity']

# The inverse temperature of the paper's uniformity: |p - q|^2 = 2 - 2 p.q on the unit sphere, so that its exp(-2 |p -
# q|^2) is exp(4 (p.q - 1)).
UNIFORMITY = 4.0
# The most cosines in one block, 64 MiB in float64.
_BLOCK_ENTRIES = 2 ** 23


def block_rows(num_rows: int, num_points: int) -> list[slice]:
    """Split rows into blocks whose cosines with all points fit in memory, at most 2^23 of them (or one row).

    Args:
        num_rows: The number of rows.
        num_points: K, the number of points that each row is compared with.

    Returns:
        Slices that cover 0..num_rows-1 in order.
    """
    step = max(1, _BLOCK_ENTRIES // num_points)
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def pair_energy(
        points: torch.Tensor, beta: float, orbit_sizes: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """Compute the energy `log mean_{i<j} exp(beta (<p_i, p_j> - 1))` and its gradient.

    At beta = 4 the energy is the paper's uniformity. As beta grows, energy / beta tends to the largest cosine minus 1.

    Args:
        points: (K, d) unit rows, K >= 2, float32 or float64, on any device.
        beta: The inverse temperature, positive.
        orbit_sizes: (n,), of the dtype of `points`. For a set with a symmetry: the first n points represent one orbit
            each, and these are the sizes of the orbits. Default: no symmetry.

    Returns:
        The energy, and its gradient with respect to all rows (K, d), or to the n representatives (n, d).
    """
    num_points = len(points)
    num_rows = num_points if orbit_sizes is None else len(orbit_sizes)
    largest, total = -1.0, 0.0
    weighted_sums = torch.empty_like(points[:num_rows])
    for rows in block_rows(num_rows, num_points):
        kernel = points[rows] @ points.T
        own = torch.arange(rows.start, rows.stop, device=points.device)
        kernel[own - rows.start, own] = -torch.inf
        # For large beta, exp(beta (c - 1)) underflows. All terms are relative to the largest cosine so far.
        block_largest = max(largest, kernel.max().item())
        if block_largest > largest:
            rescale = np.exp(beta * (largest - block_largest))
            total *= rescale
            weighted_sums[:rows.start] *= rescale
            largest = block_largest
        kernel.sub_(largest).mul_(beta).exp_()
        if orbit_sizes is not None:
            kernel *= orbit_sizes[rows].unsqueeze(1)
        total += kernel.sum(dtype=torch.float64).item()
        torch.mm(kernel, points, out=weighted_sums[rows])
    # Each pair occurs twice, in the sum and (as a row and as a column) in the gradient.
    energy = beta * (largest - 1.0) + np.log(total / (num_points * (num_points - 1)))
    return float(energy), weighted_sums.mul_(2.0 * beta / total)


def uniformity(points: np.ndarray | torch.Tensor) -> float:
    """Compute the paper's uniformity, `log mean_{i<j} exp(-2 |p_i - p_j|^2)`. Lower values are more even.

    DL2PA, Eq. 4-5, after Wang & Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", with t = 2.

    Args:
        points: (K, d) unit rows, K >= 2, of any real dtype. They are converted to float64.

    Returns:
        The uniformity, from -8 to 0.

    Raises:
        ValueError: `points` is not a matrix of at least two rows.

    Example:
        >>> uniformity(torch.eye(3))  # orthogonal points, at the squared distance 2
        -4.0
        >>> uniformity(make_prototypes(10, 3)) < uniformity(torch.eye(3).repeat(4, 1)[:10])
        True
    """
    points = torch.as_tensor(points, dtype=torch.float64, device='cpu').detach()
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f'points must have the shape (K, d) with at least 2 rows, not {tuple(points.shape)}.')
    return pair_energy(points, UNIFORMITY)[0]
