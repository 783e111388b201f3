"""A matching that is found at once and is no optimum: for what has to end in time."""
import numpy as np

__all__ = ['match_greedily']

# Rounds after which the rest stays as it is. Each takes time in proportion to the pairs that are left.
_MOST_ROUNDS = 100


def match_greedily(profits: np.ndarray, rows: np.ndarray, columns: np.ndarray, start: np.ndarray,
                   num_columns: int) -> np.ndarray:
    """Match rows with columns, again and again each pair that is the best of its row and of its column.

    Of positive profits the sum is at least half of the largest (Preis 1999, locally dominant edges). Rows that are left
    keep their column of `start`, or get a free one.

    Args:
        profits: (N,) float64, of the pairs.
        rows: (N,) int64, ascending.
        columns: (N,) int64.
        start: (C,) int64, the columns before.
        num_columns: K, at least C.

    Returns:
        (C,) int64, the column of each row.
    """
    assignment = np.full(len(start), -1)
    is_free = np.ones(num_columns, bool)
    for _ in range(_MOST_ROUNDS):
        if not len(rows):
            break
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        best = np.repeat(np.maximum.reduceat(profits, first), np.diff(first, append=len(rows)))
        chosen = np.flatnonzero(profits == best)
        chosen = chosen[np.diff(rows[chosen], prepend=-1) > 0]  # one of each row
        chosen = chosen[np.lexsort((-profits[chosen], columns[chosen]))]
        chosen = chosen[np.diff(columns[chosen], prepend=-1) > 0]  # and the best of each column
        assignment[rows[chosen]] = columns[chosen]
        is_free[columns[chosen]] = False
        left = (assignment[rows] < 0) & is_free[columns]
        profits, rows, columns = profits[left], rows[left], columns[left]
    alone = np.flatnonzero(assignment < 0)
    keeping = alone[is_free[start[alone]]]
    assignment[keeping] = start[keeping]
    is_free[start[keeping]] = False
    alone = np.flatnonzero(assignment < 0)
    assignment[alone] = np.flatnonzero(is_free)[:len(alone)]
    return assignment
