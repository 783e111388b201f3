"""One pass over all pairs: what the best prototype would give each class at the prices, and which pairs break them."""
import time
from dataclasses import dataclass

import numpy as np
import torch

from .sources import Scores

__all__ = ['Sweep', 'sweep']


@dataclass(frozen=True)
class Sweep:
    """What a pass found.

    Attributes:
        best: (C,) `max_k (s_ck - v_k)`, float64; an upper bound on it for classes that the time did not suffice for.
        rows, columns: (N,) the most profitable pairs of each class whose own is not the best; of all, if asked for.
        complete: Whether the time sufficed.
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
        everyone: bool = False,
        deadline: float = float('inf'),
) -> Sweep:
    """Compare each class's profit `s_ca - v_a` with the best that any prototype offers, `max_k (s_ck - v_k)`.

    Blocks are made in the precision that is fast. Where another entry is within its error of the class's own, the
    largest are computed again in float64: float64 alone decides.

    Args:
        scores: (C, K).
        prices: (K,) v.
        assignment: (C,) a.
        profits: (C,) `s_ca - v_a`.
        width: Number of pairs to report of a class.
        tolerance: A prototype that offers more by this only is not better.
        everyone: Report pairs of every class.
        deadline: By `time.monotonic()`; after it, what is left is bounded without looking.
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
        if everyone:
            close = np.arange(len(block))
        else:
            close = np.flatnonzero(block.amax(dim=1).cpu().numpy() >= profits[rows] - error[rows])
        if not len(close):
            continue
        if len(close) < len(block):
            block = block[torch.from_numpy(close).to(block.device)]
        top, columns = (each.cpu().numpy() for each in block.topk(min(width, block.shape[1]), dim=1))
        close += rows.start
        # Those that may be the largest.
        level = np.maximum(top[:, 0] - 2 * error[close], profits[close] - error[close])
        near_row, near = np.nonzero(top >= level[:, None])
        offers = np.full(top.shape, -np.inf)
        pair_columns = columns[near_row, near]
        offers[near_row, near] = scores.pairs(close[near_row], pair_columns) - prices[pair_columns]
        # More of them than were listed: ties, among which the whole row decides.
        many = np.flatnonzero((top[:, -1] >= level) & (top.shape[1] < block.shape[1]))
        for some in np.array_split(many, max(1, len(many) // 64)):
            exact = scores.exact(close[some]) - prices
            columns[some, -1] = exact.argmax(axis=1)
            offers[some, -1] = exact.max(axis=1)
        offer = offers.max(axis=1)
        best[close] = np.maximum(best[close], offer)
        better = (offer > profits[close] + tolerance) | everyone
        found_rows.append(np.repeat(close[better], top.shape[1]))
        found_columns.append(columns[better].ravel())
    return Sweep(best, np.concatenate([*found_rows, np.empty(0, np.int64)]),
                 np.concatenate([*found_columns, np.empty(0, np.int64)]), complete)
