"""The nearest neighbours of embeddings among others, by cosine, in blocks: no (N, M) matrix."""
from collections.abc import Iterator

import torch

from ..head.numerics import cosines
from ..values import whole_number
from .checks import check_labels, check_rows

__all__ = ['nearest_neighbours', 'neighbour_blocks']

# Cosines that are held at once, 32 MiB of float32, and the gallery rows of one block.
_ENTRIES, _COLUMNS = 2 ** 23, 8192


@torch.no_grad()
def neighbour_blocks(
        queries: torch.Tensor,
        gallery: torch.Tensor,
        k: int,
        own: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield the k nearest gallery rows of each query, block by block of queries.

    Args:
        queries: (N, d) unit rows.
        gallery: (M, d) unit rows on the same device.
        k: From 1 to M, or to M - 1 with `own`.
        own: (N,) int64, the row of the gallery that each query itself is and that is left out. Default: none.

    Yields:
        The slice of the queries, the cosines (n, k) float32, the largest first, and the gallery's rows (n, k) int64.

    Raises:
        ValueError: Shapes or k are out of range.
    """
    check_rows('queries', queries)
    check_rows('gallery', gallery, queries.shape[1])
    if own is not None:
        check_labels('own', own, len(queries), len(gallery))
    k = whole_number('k', k, 1, len(gallery) - (own is not None))
    columns = max(_COLUMNS, k)
    step = max(1, _ENTRIES // (columns + k))
    for first in range(0, len(queries), step):
        rows = slice(first, min(first + step, len(queries)))
        yield rows, *_nearest(queries[rows], gallery, k, columns, None if own is None else own[rows])


def _nearest(queries: torch.Tensor, gallery: torch.Tensor, k: int, columns: int, own: torch.Tensor | None
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Go over the gallery with one block of queries, and keep the best so far."""
    best = queries.new_empty(len(queries), 0, dtype=torch.float32)
    found = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(gallery), columns):
        values = cosines(queries, gallery[first:first + columns].float())
        if own is not None:
            here = ((own >= first) & (own < first + values.shape[1])).nonzero().squeeze(1)
            values[here, own[here] - first] = -torch.inf
        values, places = values.topk(min(k, values.shape[1]), dim=1)
        best, found = torch.cat([best, values], dim=1), torch.cat([found, places + first], dim=1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        found = found.gather(1, places)
    return best, found


def nearest_neighbours(
        queries: torch.Tensor,
        gallery: torch.Tensor,
        k: int,
        own: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k nearest gallery rows of each query. See `neighbour_blocks`.

    Returns:
        The cosines (N, k) float32, the largest first, and the gallery's rows (N, k) int64.

    Example:
        >>> cosines, rows = nearest_neighbours(embeddings, embeddings, 3, own=torch.arange(8))
        >>> cosines.shape
        torch.Size([8, 3])
    """
    parts = [part[1:] for part in neighbour_blocks(queries, gallery, k, own)]
    if not parts:
        return queries.new_empty(0, k, dtype=torch.float32), torch.empty(0, k, dtype=torch.int64)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
