"""The classes whose vectors are nearest to embeddings, in blocks: no (N, C) matrix."""
from collections.abc import Callable

import torch

from . import numerics

__all__ = ['nearest_classes']

# Embeddings and classes of one block: 32 MiB of cosines, and enough work for each class vector that is read.
_ROWS, _CLASSES = 4096, 2048


def nearest_classes(
        embeddings: torch.Tensor,
        vectors_of: Callable[[torch.Tensor], torch.Tensor],
        num_classes: int,
        count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest cosines of embeddings with class vectors, and whose they are.

    Args:
        embeddings: (N, d) unit rows.
        vectors_of: Returns the vectors (n, d), float32 unit rows, of classes (n,) int64.
        num_classes: C.
        count: k, from 1 to C.

    Returns:
        The cosines (N, k) float32, the largest first, and the classes (N, k) int64.
    """
    found = [_of_rows(rows, vectors_of, num_classes, count) for rows in embeddings.split(_ROWS)]
    cosines, classes = zip(*found)
    return torch.cat(cosines), torch.cat(classes)


def _of_rows(rows: torch.Tensor, vectors_of: Callable[[torch.Tensor], torch.Tensor], num_classes: int, count: int,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Go over all classes with one block of rows, and keep the best so far."""
    best = torch.empty(len(rows), 0, device=rows.device, dtype=torch.float32)
    classes = torch.empty(len(rows), 0, device=rows.device, dtype=torch.int64)
    for first in range(0, num_classes, _CLASSES):
        block = torch.arange(first, min(first + _CLASSES, num_classes), device=rows.device)
        values, columns = numerics.cosines(rows, vectors_of(block)).topk(min(count, len(block)), dim=1)
        best, classes = torch.cat([best, values], dim=1), torch.cat([classes, columns + first], dim=1)
        best, columns = best.topk(min(count, best.shape[1]), dim=1)
        classes = classes.gather(1, columns)
    return best, classes
