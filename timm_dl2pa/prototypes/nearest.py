"""Cosines of points with all others, in blocks, and the margins between classes."""
from collections.abc import Iterator

import torch

from .energy import block_rows

__all__ = ['cosine_blocks', 'margins', 'nearest_pairs']


def cosine_blocks(
        points: torch.Tensor,
        rows: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the cosines of points with all points, in blocks of rows that fit in memory (see `block_rows`).

    The cosine of a point with itself is replaced by -inf. The consumer may change a block in place.

    Args:
        points: (K, d) unit rows, any floating-point dtype, on any device.
        rows: (N,) int64 indices of the rows to compare with all points, on the device of `points`. Default: all rows.

    Yields:
        The indices (n,) int64 of the rows in the block, and their cosines (n, K), of the dtype of `points`.
    """
    if rows is None:
        rows = torch.arange(len(points), device=points.device)
    for block in block_rows(len(rows), len(points)):
        indices = rows[block]
        cosines = points[indices] @ points.T
        cosines[torch.arange(len(indices), device=points.device), indices] = -torch.inf
        yield indices, cosines


def margins(class_prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the angle between each class's prototype and the nearest prototype of another class.

    An embedding is classified correctly if it is within half that angle of its class's prototype.

    Args:
        class_prototypes: (C, d) unit rows, C >= 2, any floating-point dtype.

    Returns:
        The angles (C,) in degrees, of the dtype of `class_prototypes`, and the nearest classes (C,) int64.
    """
    best = [cosines.max(dim=1) for _, cosines in cosine_blocks(class_prototypes)]
    cosines, nearest = torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])
    return torch.rad2deg(cosines.clamp(-1, 1).acos()), nearest


def nearest_pairs(rows: torch.Tensor, most: int) -> list[tuple[int, int, float]]:
    """Return the nearest of the pairs that a row and its nearest neighbour make, each pair once.

    Args:
        rows: (N, d) unit rows, N >= 2, any floating-point dtype.
        most: The largest number of pairs.

    Returns:
        The indices of both rows of each pair, and the angle between them in degrees, the smallest first.
    """
    angles, nearest = margins(rows)
    pairs: dict[frozenset[int], tuple[int, int, float]] = {}
    for index in angles.argsort(stable=True).tolist():
        neighbour = nearest[index].item()
        pairs.setdefault(frozenset((index, neighbour)), (index, neighbour, angles[index].item()))
        if len(pairs) == most:
            break
    return list(pairs.values())
