"""Candidate pairs: a sparse assignment problem, its exact solution, and the prices that prove it."""
import time

import numpy as np

from .greedy import match_greedily
from .sources import Scores
from .sparse import solve_sparse

__all__ = ['Candidates']


class Candidates:
    """A growing set of pairs of classes and prototypes, with their float64 scores.

    Args:
        scores: (C, K), in multiples of their unit.
        assignment: (C,) int64, whose pairs are the first candidates, so that a matching of all classes always exists.
    """

    def __init__(self, scores: Scores, assignment: np.ndarray):
        self._scores = scores
        self._keys = np.empty(0, np.int64)
        self._values = np.empty(0)
        self.add(np.arange(len(assignment)), assignment)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, rows: np.ndarray, columns: np.ndarray) -> int:
        """Add pairs.

        Args:
            rows: (N,) classes.
            columns: (N,) prototypes.

        Returns:
            The number of pairs that are new.
        """
        count, width = self._scores.shape
        keys = np.setdiff1d(rows.astype(np.int64) * width + columns, self._keys)
        positions = np.searchsorted(self._keys, keys)
        self._values = np.insert(self._values, positions, self._scores.pairs(keys // width, keys % width))
        self._keys = np.insert(self._keys, positions, keys)  # `row * K + column`, ascending
        self._rows, self._columns = self._keys // width, self._keys % width
        self._first = np.searchsorted(self._rows, np.arange(count))
        return len(keys)

    def match(self, prices: np.ndarray, start: np.ndarray, deadline: float = float('inf')) -> tuple[np.ndarray, bool]:
        """Return the best assignment among the candidates, by shortest augmenting paths; or a good one, in time.

        For C = K, subtracting prices does not change the optimum, and good prices save work: most classes then get
        their most profitable prototype at once.

        Args:
            prices: (K,) float64.
            start: (C,) int64, the assignment before.
            deadline: The time limit, as a value of `time.monotonic()`. Then the assignment is a greedy one.

        Returns:
            (C,) int64, and whether it is the best.
        """
        count, width = self._scores.shape
        profits = self._values - prices[self._columns] if count == width else self._values
        best = np.maximum.reduceat(profits, self._first)[self._rows]
        is_best = np.flatnonzero(profits == best)
        preferred = self._columns[is_best[np.unique(self._rows[is_best], return_index=True)[1]]]
        if np.bincount(preferred, minlength=width).max() == 1:
            return preferred, True
        # scipy reads an entry of 0 as a missing pair, hence the 1. The empty last column makes scipy skip its initial
        # auction, which takes very long with near ties.
        costs = best - profits + 1.0
        try:
            return solve_sparse(costs, self._columns, np.append(self._first, len(self)), (count, width + 1),
                                deadline - time.monotonic()), True
        except TimeoutError:
            return match_greedily(profits, self._rows, self._columns, start, width), False

    def prices(self, assignment: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return prices at which the assignment gives every class its most profitable candidate.

        They are shortest distances in the exchange graph, which has an edge from prototype a(c) to k of the cost `s_ca
        - s_ck`, and an edge of the cost 0 from every used prototype to every spare one (Bellman-Ford). A negative cycle
        would be an exchange with a gain.

        Args:
            assignment: (C,) int64, the best assignment among the candidates.
            start: (K,) float64, initial prices. If they already have the property, they are the result.

        Returns:
            (K,) float64, with the minimum 0.
        """
        count, width = self._scores.shape
        prices = start.copy()
        own = self._scores.pairs(np.arange(count), assignment)
        spare = np.ones(width, bool)
        spare[assignment] = False
        for _ in range(width + 1):
            highest = np.minimum.reduceat(prices[self._columns] - self._values, self._first) + own
            previous = prices.copy()
            prices[assignment] = np.minimum(prices[assignment], highest)
            if count < width:
                prices[spare] = np.minimum(prices[spare], prices[assignment].min())
            if (previous - prices).max() <= 1e-15:
                break
        return prices - prices.min()
