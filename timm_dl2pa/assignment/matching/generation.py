"""Column generation: solve the problem of a few pairs, find the pairs that violate its prices, and add them."""
import time
from dataclasses import dataclass
from itertools import count as counter

import numpy as np

from .candidates import Candidates
from .dense import match_densely, tight_prices
from .sources import Scores
from .sweep import sweep

__all__ = ['Matching', 'best_matching']

# Problems of at most this many pairs are solved densely: a pass in blocks would take longer.
_SMALL_PAIRS = 2 ** 15
# So are those of at most this many pairs, 8 MB, if more than this share of so many classes does not have its best
# prototype at first. Beyond it, few candidates take no longer.
_MAX_DENSE_PAIRS = 2 ** 20
_MAX_SPARSE_SHARE = 0.1
_PROBED_CLASSES = 64
# The pairs that a pass adds for each class. After some rounds the number doubles every round, because ties would
# otherwise take many rounds.
_PAIRS_PER_CLASS = 16
_ROUNDS_BEFORE_DOUBLING = 4
# The most candidates, 3 GB. If they do not suffice, the result has a gap.
_MAX_CANDIDATES = 2 ** 27
# The rounding error of a class's profit, in the scores' unit.
_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Matching:
    """The result of `best_matching`, in multiples of the scores' unit.

    Attributes:
        assignment: (C,) int64, the prototype of each class.
        prices: (K,) float64, the dual prices that prove `bound`.
        bound: An upper bound on the sum of scores of every assignment.
        exact: Whether the bound proves the assignment optimal, up to rounding.
    """
    assignment: np.ndarray
    prices: np.ndarray
    bound: float
    exact: bool


def best_matching(
        scores: Scores,
        start: np.ndarray,
        prices: np.ndarray | None = None,
        deadline: float = float('inf'),
) -> Matching:
    """Maximise the sum of scores over the injections of classes into prototypes.

    By linear programming duality (Kuhn 1955), for all prices v (K,)

        sum_c s_c,a(c)  <=  sum_c max_k (s_ck - v_k) + the sum of the C largest v_k,

    with equality only for an optimal assignment and prices that prove it. A pass over all pairs computes the right-hand
    side. If it exceeds the left-hand side, the most profitable pairs that the pass found become candidates. The exact
    optimum among the candidates, and prices at which it is optimal there, are the input of the next pass. This is the
    column generation of linear programming (Dantzig and Wolfe 1960). If the start is optimal at the first prices, a
    single pass suffices. Of a small problem all pairs are candidates at once.

    Args:
        scores: (C, K), C <= K.
        start: (C,) int64, the current assignment. The result is no worse.
        prices: (K,) float64, initial prices, from an earlier result. Default: derived from the mean score of each
            prototype.
        deadline: The time limit, as a value of `time.monotonic()`. A pass stops after half of the remaining time, and
            the result is the optimum among the candidates so far, or a greedy matching of them if that takes longer.

    Returns:
        The assignment, and the prices and the bound that prove its quality.
    """
    count, width = scores.shape
    classes = np.arange(count)
    # Prices of an earlier result mean that classes compete for prototypes. Then also classes that have their most
    # profitable prototype may have to move, so that one pass reports pairs of all classes.
    competing = prices is not None and bool(prices.any())
    prices = _initial_prices(scores) if prices is None else prices
    if _is_solved_densely(scores, start, prices):
        return _dense_matching(scores, start, prices)
    candidates = Candidates(scores, start)
    assignment = start
    best_bound, best_prices = float('inf'), prices
    all_reported = False
    for turn in counter():
        own = scores.pairs(classes, assignment)
        found = sweep(scores, prices, assignment, own - prices[assignment], tolerance=_TOLERANCE,
                      width=_PAIRS_PER_CLASS << max(0, turn - _ROUNDS_BEFORE_DOUBLING),
                      report_all=competing and not all_reported,
                      deadline=0.5 * time.monotonic() + 0.5 * deadline)
        all_reported |= competing
        competing = True
        bound = float(found.best.sum() + np.partition(prices, width - count)[width - count:].sum())
        if bound < best_bound:
            best_bound, best_prices = bound, prices
        if best_bound - own.sum() <= count * _TOLERANCE:
            return Matching(assignment, best_prices, max(best_bound, float(own.sum())), True)
        num_new = candidates.add(found.rows, found.columns)
        in_time = True
        if num_new:
            matched, in_time = candidates.match(prices, assignment, deadline)
            assignment = _better(scores, matched, assignment)
            own = scores.pairs(classes, assignment)
        exact = best_bound - own.sum() <= count * _TOLERANCE
        in_time &= found.complete and time.monotonic() <= deadline
        out_of_budget = not in_time or len(candidates) > _MAX_CANDIDATES
        if exact or out_of_budget or (not num_new and turn):
            return Matching(assignment, best_prices, max(best_bound, float(own.sum())), bool(exact))
        prices = candidates.prices(assignment, prices)


def _is_solved_densely(scores: Scores, start: np.ndarray, prices: np.ndarray) -> bool:
    """Return whether a problem is small, or small enough for one in which many classes will move."""
    count, width = scores.shape
    if count * width <= _SMALL_PAIRS or count * width > _MAX_DENSE_PAIRS:
        return count * width <= _SMALL_PAIRS
    probed = np.linspace(0, count - 1, min(_PROBED_CLASSES, count)).astype(np.int64)
    profits = scores.exact(probed) - prices
    return bool((profits.argmax(axis=1) != start[probed]).mean() > _MAX_SPARSE_SHARE)


def _dense_matching(scores: Scores, start: np.ndarray, prices: np.ndarray) -> Matching:
    """Return what `best_matching` returns, for a small problem. It has no time limit: it takes milliseconds."""
    count, width = scores.shape
    classes = np.arange(count)
    table = scores.exact(classes)
    assignment = start
    best_bound, best_prices = float('inf'), prices
    for solved in (False, True):
        if solved:
            assignment = _better(scores, match_densely(table, prices), start)
            prices = tight_prices(table, assignment, prices)
        own = float(scores.pairs(classes, assignment).sum())
        bound = float((table - prices).max(axis=1).sum() + np.partition(prices, width - count)[width - count:].sum())
        if bound < best_bound:
            best_bound, best_prices = bound, prices
        if best_bound - own <= count * _TOLERANCE:
            break
    return Matching(assignment, best_prices, max(best_bound, own), best_bound - own <= count * _TOLERANCE)


def _initial_prices(scores: Scores) -> np.ndarray:
    """Return prices (K,) from the mean score of each prototype.

    Early in training the embeddings of all classes lie in a narrow cone, and their scores differ little from the mean.
    """
    count, width = scores.shape
    average = scores.average()
    return np.maximum(average - np.partition(average, width - count)[width - count], 0.0)


def _better(scores: Scores, new: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Return the assignment (C,) with the larger sum of scores; if they are equal, the current one."""
    classes = np.arange(len(current))
    gain = scores.pairs(classes, new) - scores.pairs(classes, current)
    return new if gain.sum() > 0 else current
