"""Sources of scores: inner products that are computed when they are needed, or a given matrix."""
from abc import ABC, abstractmethod

import numpy as np
import torch

__all__ = ['Products', 'Scores', 'Table', 'unit_of']

# The scores in one block: some megabytes, but at least so many rows that the matrix product is efficient.
_BLOCK_SCORES = 2 ** 22
_MIN_BLOCK_ROWS = 128
# The pairs whose float64 products are computed at a time.
_PAIRS_AT_A_TIME = 2 ** 11


def unit_of(largest: float) -> float:
    """Return a unit for scores, a power of two. Division by it is exact, and keeps the scores in the range of float32.

    Args:
        largest: The largest magnitude of the scores, at least 0.

    Returns:
        A power of two near `largest`; 1 if `largest` is 0.
    """
    return float(2.0 ** np.clip(np.frexp(largest)[1], -1073, 1000)) if largest else 1.0


def _reduced_precision_error(device: torch.device) -> float:
    """Return the relative error of a factor in float32 products if PyTorch is set to TensorFloat-32 or bfloat16."""
    backend = torch.backends.cuda if device.type == 'cuda' else torch.backends.mkldnn
    setting = getattr(getattr(backend, 'matmul', None), 'fp32_precision', None) or torch.get_float32_matmul_precision()
    return {'tf32': 2.0 ** -10, 'high': 2.0 ** -10, 'bf16': 2.0 ** -8, 'medium': 2.0 ** -8}.get(setting, 0.0)


class Scores(ABC):
    """Scores (C, K) of classes and prototypes, in multiples of `unit`, read in blocks of rows or by pairs.

    Attributes:
        shape: (C, K).
        unit: The unit of the scores, a power of two.
        ceiling: (C,) float64, an upper bound on the magnitude of the scores in each row, known without computing them.
    """
    shape: tuple[int, int]
    unit: float
    ceiling: np.ndarray

    @abstractmethod
    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the scores of pairs in float64. All decisions depend on these.

        Args:
            rows: (N,) classes.
            columns: (N,) prototypes.

        Returns:
            (N,) float64.
        """

    @abstractmethod
    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        """Return a new block of scores minus prices, in the fastest precision.

        Args:
            rows: A block of N rows.
            prices: (K,) float64.

        Returns:
            (N, K), of any floating-point dtype, on any device.
        """

    @abstractmethod
    def exact(self, rows: np.ndarray) -> np.ndarray:
        """Return whole rows of scores in float64.

        Args:
            rows: (N,) classes.

        Returns:
            (N, K) float64.
        """

    @abstractmethod
    def error(self, prices: np.ndarray) -> np.ndarray:
        """Return bounds on the rounding errors of the entries of `profits`.

        Args:
            prices: (K,) float64.

        Returns:
            (C,) float64, a bound for each row.
        """

    @abstractmethod
    def average(self) -> np.ndarray:
        """Return the mean score (K,) float64 of each prototype, over the classes."""

    @abstractmethod
    def indifferent(self) -> np.ndarray:
        """Return a mask (C,) of the classes that are known to have the same score with every prototype."""

    @abstractmethod
    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Scores':
        """Return the scores of a subset of the classes and a subset of the prototypes.

        Args:
            rows: (M,) classes.
            columns: (N,) prototypes.

        Returns:
            Scores of the shape (M, N), in the same unit.
        """

    def blocks(self) -> list[slice]:
        """Split the rows into blocks of a few megabytes, in order."""
        count, width = self.shape
        step = max(_MIN_BLOCK_ROWS, _BLOCK_SCORES // width)
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class Products(Scores):
    """Inner products of class means and prototypes, never computed all at once.

    Blocks are computed in float32 on `device`, single pairs in float64 on the CPU.

    Args:
        means: (C, d) float64, the class means.
        prototypes: (K, d) float64.
        device: The device of the blocks.
    """

    def __init__(self, means: np.ndarray, prototypes: np.ndarray, device: torch.device | str = 'cpu'):
        units = [unit_of(float(np.abs(array).max(initial=0.0))) for array in (means, prototypes)]
        self.unit = max(units[0] * units[1], 5e-324)
        self.device = torch.device(device)
        self.means, self.prototypes = means / units[0], prototypes / units[1]
        self._prepare()

    def _prepare(self) -> None:
        self.shape = len(self.means), len(self.prototypes)
        self.ceiling = np.linalg.norm(self.means, axis=1) * np.linalg.norm(self.prototypes, axis=1).max(initial=0.0)
        self._fast: tuple[torch.Tensor, torch.Tensor] | None = None

    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `Scores.pairs`."""
        products = np.empty(len(rows))
        for first in range(0, len(rows), _PAIRS_AT_A_TIME):
            part = slice(first, first + _PAIRS_AT_A_TIME)
            np.einsum('nd,nd->n', self.means[rows[part]], self.prototypes[columns[part]], out=products[part])
        return products

    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        """See `Scores.profits`."""
        if self._fast is None:
            self._fast = (torch.from_numpy(self.means.astype(np.float32)).to(self.device),
                          torch.from_numpy(self.prototypes.astype(np.float32)).to(self.device).T)
        means, prototypes = self._fast
        with torch.autocast(self.device.type, enabled=False):
            return torch.addmm(torch.from_numpy(-prices.astype(np.float32)).to(self.device), means[rows], prototypes)

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """See `Scores.exact`."""
        return self.means[rows] @ self.prototypes.T

    def error(self, prices: np.ndarray) -> np.ndarray:
        """See `Scores.error`."""
        # Higham 2002, section 3.1: the error of an inner product of d terms in float32 is at most about d 2^-24 times
        # the product of the lengths. Factors of reduced precision add their own errors. The last term covers values
        # that underflow in float32.
        relative = 1.01 * (self.means.shape[1] + 4) * 2.0 ** -24 + 3 * _reduced_precision_error(self.device)
        return relative * self.ceiling + 2.0 ** -22 * np.abs(prices).max(initial=0.0) + 1e-36

    def average(self) -> np.ndarray:
        """See `Scores.average`."""
        return self.prototypes @ self.means.mean(axis=0)

    def indifferent(self) -> np.ndarray:
        """See `Scores.indifferent`."""
        return ~self.means.any(axis=1)

    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Products':
        """See `Scores.part`."""
        part = object.__new__(Products)
        part.unit, part.device = self.unit, self.device
        part.means, part.prototypes = self.means[rows], self.prototypes[columns]
        part._prepare()
        return part


class Table(Scores):
    """A given matrix of scores. Each block is read in float64.

    Args:
        table: (C, K), any real dtype, on any device.
    """

    def __init__(self, table: torch.Tensor):
        self.table = table
        self._rows, self._columns = (np.arange(size) for size in table.shape)
        self.shape = tuple(table.shape)
        extremes = [self._read(rows).aminmax(dim=1) for rows in self.blocks()] if table.numel() else []
        lowest, highest = (torch.cat([getattr(each, name) for each in extremes]).cpu().numpy() if extremes else
                           np.zeros(len(table)) for name in ('min', 'max'))
        largest = np.maximum(np.abs(lowest), np.abs(highest))
        self.unit = unit_of(float(largest.max(initial=0.0)))
        self.ceiling = largest / self.unit
        self._all_equal = lowest == highest

    def _read(self, rows: slice) -> torch.Tensor:
        part = self.table[rows] if len(self._rows) == len(self.table) else self.table[self._rows[rows]]
        return part.double() if len(self._columns) == self.table.shape[1] else part[:, self._columns].double()

    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `Scores.pairs`."""
        return self.table[self._rows[rows], self._columns[columns]].double().cpu().numpy() / self.unit

    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        """See `Scores.profits`."""
        return self._read(rows) / self.unit - torch.from_numpy(prices).to(self.table.device)

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """See `Scores.exact`."""
        return self.table[self._rows[rows]].double().cpu().numpy()[:, self._columns] / self.unit

    def error(self, prices: np.ndarray) -> np.ndarray:
        """See `Scores.error`."""
        return np.full(self.shape[0], 2.0 ** -52 * (1 + np.abs(prices).max(initial=0.0)))

    def average(self) -> np.ndarray:
        """See `Scores.average`."""
        sums = sum(self._read(rows).sum(dim=0) for rows in self.blocks())
        return sums.cpu().numpy() / self.unit / self.shape[0]

    def indifferent(self) -> np.ndarray:
        """See `Scores.indifferent`."""
        return self._all_equal

    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Table':
        """See `Scores.part`."""
        part = object.__new__(Table)
        part.table, part.unit = self.table, self.unit
        part._rows, part._columns = self._rows[rows], self._columns[columns]
        part.shape = len(rows), len(columns)
        part.ceiling, part._all_equal = self.ceiling[rows], self._all_equal[rows]
        return part
