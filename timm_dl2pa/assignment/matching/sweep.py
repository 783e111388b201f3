"""One pass over all pairs: the best profit of each class at given prices, and the pairs that violate the prices."""
import time
from dataclasses import dataclass

import numpy as np
import torch

from .sources import Scores

__all__ = ['Sweep', 'sweep']


@dataclass(frozen=True)
class Sweep:
    """The result of a pass.

    Attributes:
        best: (C,) float64, the best profit `max_k (s_ck - v_k)` of each class; an upper bound on it for the classes
            that the pass did not reach.
        rows: (N,) int64, the classes of the reported pairs: the most profitable pairs of each class that does not have
            its best prototype, or of every class.
        columns: (N,) int64, the prototypes of the reported pairs.
        complete: Whether the pass reached all classes before the deadline.
    """
    best: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    complete: bool


def sweep(
        scores: Scores,
        prices: np.ndarray,
        assignment: np.ndarray,
        profits: np.ndarray,
        *,
        width: int,
        tolerance: float,
        report_all: bool = False,
        deadline: float = float('inf'),
) -> Sweep:
    """Compare each class's profit `s_ca - v_a` with its best profit over all prototypes, `max_k (s_ck - v_k)`.

    Blocks are computed in the fastest precision. If the error of a block leaves open whether a class has its best
    prototype, the largest entries are computed again in float64, so that all decisions are made in float64.

    Args:
        scores: (C, K).
        prices: (K,) float64, v.
        assignment: (C,) int64, a.
        profits: (C,) float64, `s_ca - v_a`.
        width: The number of pairs to report for each class.
        tolerance: A prototype is better only if its profit is larger by more than this.
        report_all: Whether to report pairs of every class.
        deadline: The time limit, as a value of `time.monotonic()`. The classes that are left get an upper bound.

    Returns:
        The best profits and the reported pairs.
    """
    best = np.maximum(scores.ceiling - prices.min(), profits)
    error = scores.error(prices)
    found_rows, found_columns = [], []
    complete = True
    for rows in scores.blocks():
        if time.monotonic() > deadline:
            complete = False
            break
        block = scores.profits(rows, prices)
        own = torch.from_numpy(assignment[rows]).to(block.device)
        block[torch.arange(len(block), device=block.device), own] = -torch.inf
        best[rows] = profits[rows]
        if report_all:
            open_rows = np.arange(len(block))
        else:
            open_rows = np.flatnonzero(block.amax(dim=1).cpu().numpy() >= profits[rows] - error[rows])
        if not len(open_rows):
            continue
        if len(open_rows) < len(block):
            block = block[torch.from_numpy(open_rows).to(block.device)]
        top, columns = (each.cpu().numpy() for each in block.topk(min(width, block.shape[1]), dim=1))
        open_rows += rows.start
        # The entries above this threshold may be the largest of their row.
        threshold = np.maximum(top[:, 0] - 2 * error[open_rows], profits[open_rows] - error[open_rows])
        row_index, top_index = np.nonzero(top >= threshold[:, None])
        exact_profits = np.full(top.shape, -np.inf)
        pair_columns = columns[row_index, top_index]
        exact_profits[row_index, top_index] = scores.pairs(open_rows[row_index], pair_columns) - prices[pair_columns]
        # If there are more such entries than `top` has, the whole row is computed in float64.
        tied = np.flatnonzero((top[:, -1] >= threshold) & (top.shape[1] < block.shape[1]))
        for chunk in np.array_split(tied, max(1, len(tied) // 64)):
            row_profits = scores.exact(open_rows[chunk]) - prices
            columns[chunk, -1] = row_profits.argmax(axis=1)
            exact_profits[chunk, -1] = row_profits.max(axis=1)
        best_profits = exact_profits.max(axis=1)
        best[open_rows] = np.maximum(best[open_rows], best_profits)
        reported = (best_profits > profits[open_rows] + tolerance) | report_all
        found_rows.append(np.repeat(open_rows[reported], top.shape[1]))
        found_columns.append(columns[reported].ravel())
    return Sweep(best, np.concatenate([*found_rows, np.empty(0, np.int64)]),
                 np.concatenate([*found_columns, np.empty(0, np.int64)]), complete)
