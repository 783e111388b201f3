"""The pairs that matter: a sparse assignment problem, its exact solution, and the prices that prove it."""
import numpy as np
from scipy.optimize import linear_sum_assignment

from .sources import Scores
from .sparse import solve_sparse

__all__ = ['Candidates']


class Candidates:
    """A growing set of pairs of classes and prototypes, with their float64 scores.

    Args:
        scores: (C, K), in multiples of their unit.
        assignment: (C,), whose pairs are the first: so there is always a matching, no worse than this one.
    """

    def __init__(self, scores: Scores, assignment: np.ndarray):
        self._scores = scores
        self._keys = np.empty(0, np.int64)
        self._values = np.empty(0)
        self.add(np.arange(len(assignment)), assignment)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, rows: np.ndarray, columns: np.ndarray) -> int:
        """Add pairs, and return how many of them are new."""
        width = self._scores.shape[1]
        keys = np.setdiff1d(rows.astype(np.int64) * width + columns, self._keys)
        values = self._scores.pairs(keys // width, keys % width)
        place = np.searchsorted(self._keys, keys)
        self._set(np.insert(self._keys, place, keys), np.insert(self._values, place, values))
        return len(keys)

    def _set(self, keys: np.ndarray, values: np.ndarray) -> None:
        count, width = self._scores.shape
        self._keys, self._values = keys, values
        self._rows, self._columns = keys // width, keys % width
        self._first = np.searchsorted(self._rows, np.arange(count))

    def add_all(self) -> int:
        """Add every pair, and return how many of them are new."""
        count, width = self._scores.shape
        new = count * width - len(self)
        self._set(np.arange(count * width), self._scores.exact(np.arange(count)).ravel())
        return new

    def match(self, prices: np.ndarray) -> np.ndarray:
        """Return the best assignment (C,) among these pairs: shortest augmenting paths.

        Where C = K, prices change no optimum, and good ones leave little to do: most classes get what they want most.
        Where all pairs are here it is scipy's dense solver (Crouse 2016).
        """
        count, width = self._scores.shape
        if len(self) == count * width:
            return linear_sum_assignment(self._values.reshape(count, width), maximize=True)[1]
        profits = self._values - prices[self._columns] if count == width else self._values
        best = np.maximum.reduceat(profits, self._first)[self._rows]
        wanted = np.flatnonzero(profits == best)
        wanted = self._columns[wanted[np.unique(self._rows[wanted], return_index=True)[1]]]
        if np.bincount(wanted, minlength=width).max() == 1:
            return wanted
        # scipy takes an entry of 0 for none, hence the 1. With more columns than rows (one is empty) it goes straight
        # to the augmenting paths; otherwise it holds an auction first, which near ties keep up for ages.
        costs = best - profits + 1.0
        return solve_sparse(costs, self._columns, np.append(self._first, len(self)), (count, width + 1))

    def prices(self, assignment: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return prices (K,), the least of them 0, at which every class has the best of its pairs.

        They are the shortest distances in the exchange graph, in which prototype a(c) leads to k at the cost
        `s_ca - s_ck`, and a prototype in use to a spare one at the cost 0 (Bellman and Ford; a negative cycle would be
        an exchange that gains).

        Args:
            assignment: (C,), the best among these pairs.
            start: (K,) prices to begin with. Where they break no pair they are the answer.
        """
        count, width = self._scores.shape
        prices = start.copy()
        own = self._scores.pairs(np.arange(count), assignment)
        spare = np.ones(width, bool)
        spare[assignment] = False
        for _ in range(width + 1):
            most = np.minimum.reduceat(prices[self._columns] - self._values, self._first) + own
            before, used = prices.copy(), prices[assignment]
            prices[assignment] = np.minimum(used, most)
            if count < width:
                prices[spare] = np.minimum(prices[spare], prices[assignment].min())
            if (before - prices).max() <= 1e-15:
                break
        return prices - prices.min()
