"""Column generation: solve the problem of a few pairs, look for pairs that break its prices, and add those."""
import time
from dataclasses import dataclass
from itertools import count as numbers

import numpy as np

from .candidates import Candidates
from .sources import Scores
from .sweep import sweep

__all__ = ['Matching', 'best_matching']

# With no more pairs than this, the candidates are all of them.
_SMALL = 2 ** 14
# Pairs that a pass adds for a class; twice as many in each round after some, lest ties take many rounds.
_WIDTH = 16
_PATIENCE = 4
# Most candidates, 3 GB: beyond them the answer has a gap.
_MOST_PAIRS = 2 ** 27
# What a class may lack of its best, in the scores' unit: rounding.
_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Matching:
    """What `best_matching` found, in multiples of the scores' unit.

    Attributes:
        assignment: (C,) int64.
        prices: (K,) float64, at which `bound` holds.
        bound: No assignment has a larger sum of scores.
        exact: Whether the bound proves the assignment optimal, to rounding.
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

    By linear programming duality (Kuhn 1955), whatever the prices v (K,),

        sum_c s_c,a(c)  <=  sum_c max_k (s_ck - v_k) + the sum of the C largest v_k,

    with equality only for an optimal assignment and prices that prove it. A pass over all pairs computes the right
    hand side. Where it is larger than the left one, the pairs that the pass found most profitable join the candidates,
    the exact optimum among those is found, prices with which it is optimal there are the next pass's, and so on: the
    column generation of linear programming (Dantzig and Wolfe 1960). An assignment that is optimal at the first prices
    takes a single pass.

    Args:
        scores: (C, K), C <= K.
        start: (C,) int64, the assignment in force. The answer is no worse.
        prices: (K,) to begin with, those of an earlier answer. Default: each prototype's mean score.
        deadline: By `time.monotonic()`. A pass over the pairs stops when four fifths of what is left of the time are
            over, and the optimum among the candidates so far is the answer. That last solution is not cut short.
    """
    count, width = scores.shape
    everyone = np.arange(count)
    candidates = Candidates(scores, start)
    assignment = start
    # Earlier prices say that classes compete: then those that have their best may have to move too.
    contested = prices is not None and bool(prices.any())
    prices = _first_prices(scores) if prices is None else prices
    best_bound, best_prices = float('inf'), prices
    listed = False
    for turn in numbers():
        own = scores.pairs(everyone, assignment)
        found = sweep(scores, prices, assignment, own - prices[assignment], tolerance=_TOLERANCE,
                      width=_WIDTH << max(0, turn - _PATIENCE), everyone=contested and not listed,
                      deadline=0.2 * time.monotonic() + 0.8 * deadline)
        listed |= contested
        contested = True
        bound = float(found.best.sum() + np.partition(prices, width - count)[width - count:].sum())
        if bound < best_bound:
            best_bound, best_prices = bound, prices
        if best_bound - own.sum() <= count * _TOLERANCE:
            return Matching(assignment, best_prices, max(best_bound, float(own.sum())), True)
        small = count * width <= _SMALL
        new = candidates.add_all() if small else candidates.add(found.rows, found.columns)
        if new:
            assignment = _better(scores, candidates.match(prices), assignment)
            own = scores.pairs(everyone, assignment)
        exact = best_bound - own.sum() <= count * _TOLERANCE
        late = not found.complete or time.monotonic() > deadline or len(candidates) > _MOST_PAIRS
        if exact or late or (not new and turn):
            return Matching(assignment, best_prices, max(best_bound, float(own.sum())), bool(exact))
        prices = candidates.prices(assignment, prices)


def _first_prices(scores: Scores) -> np.ndarray:
    """Return what all classes alike would give for a prototype: the embeddings of a young network lie in a cone."""
    count, width = scores.shape
    average = scores.average()
    return np.maximum(average - np.partition(average, width - count)[width - count], 0.0)


def _better(scores: Scores, assignment: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the assignment with the larger sum; of equal ones, the other."""
    everyone = np.arange(len(other))
    gain = scores.pairs(everyone, assignment) - scores.pairs(everyone, other)
    return assignment if gain.sum() > 0 else other
