"""Where scores come from: inner products that are made when they are needed, or a table that is there."""
from abc import ABC, abstractmethod

import numpy as np
import torch

__all__ = ['Products', 'Scores', 'Table', 'unit_of']

# Scores of one block: some megabytes, but enough rows for a matrix product to be fast.
_BLOCK = 2 ** 22
_LEAST_ROWS = 128
# Pairs whose float64 products are made at a time.
_PAIRS = 2 ** 11


def unit_of(largest: float) -> float:
    """Return a power of two near a magnitude: dividing by it is exact, and keeps float32 in its range."""
    return float(2.0 ** np.clip(np.frexp(largest)[1], -1073, 1000)) if largest else 1.0


def _lost_digits(device: torch.device) -> float:
    """Return the relative error of a factor in float32 products as PyTorch is set: on TensorFloat-32, on bfloat16."""
    backend = torch.backends.cuda if device.type == 'cuda' else torch.backends.mkldnn
    setting = getattr(getattr(backend, 'matmul', None), 'fp32_precision', None) or torch.get_float32_matmul_precision()
    return {'tf32': 2.0 ** -10, 'high': 2.0 ** -10, 'bf16': 2.0 ** -8, 'medium': 2.0 ** -8}.get(setting, 0.0)


class Scores(ABC):
    """Scores (C, K) of classes and prototypes, read in blocks of rows or pair by pair, in multiples of `unit`.

    Attributes:
        shape: (C, K).
        unit: What the scores are multiples of: a power of two.
        ceiling: (C,) bounds on the magnitude of each row's scores that cost nothing.
    """
    shape: tuple[int, int]
    unit: float
    ceiling: np.ndarray

    @abstractmethod
    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the scores of the pairs (N,), float64: those that decide."""

    @abstractmethod
    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        """Return a new block (N, K) of scores minus prices, in the precision that is fast."""

    @abstractmethod
    def exact(self, rows: np.ndarray) -> np.ndarray:
        """Return whole rows (N, K), float64."""

    @abstractmethod
    def error(self, prices: np.ndarray) -> np.ndarray:
        """Return bounds (C,) on how far the entries of `profits` are from the exact ones."""

    @abstractmethod
    def average(self) -> np.ndarray:
        """Return the mean score (K,) of each prototype, over the classes."""

    @abstractmethod
    def indifferent(self) -> np.ndarray:
        """Return which classes (C,) are known to have the same score with every prototype."""

    @abstractmethod
    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Scores':
        """Return the scores of some classes and some prototypes."""

    def blocks(self) -> list[slice]:
        """Return slices of the rows whose blocks have a few megabytes."""
        count, width = self.shape
        step = max(_LEAST_ROWS, _BLOCK // width)
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class Products(Scores):
    """Inner products of class means (C, d) and prototypes (K, d), never all at once.

    Blocks are float32 products on `device`, single pairs float64 ones on the CPU.

    Args:
        means: (C, d) float64.
        prototypes: (K, d) float64.
        device: Where the blocks are made.
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
        products = np.empty(len(rows))
        for first in range(0, len(rows), _PAIRS):
            some = slice(first, first + _PAIRS)
            np.einsum('nd,nd->n', self.means[rows[some]], self.prototypes[columns[some]], out=products[some])
        return products

    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        if self._fast is None:
            self._fast = (torch.from_numpy(self.means.astype(np.float32)).to(self.device),
                          torch.from_numpy(self.prototypes.astype(np.float32)).to(self.device).T)
        means, prototypes = self._fast
        with torch.autocast(self.device.type, enabled=False):
            return torch.addmm(torch.from_numpy(-prices.astype(np.float32)).to(self.device), means[rows], prototypes)

    def exact(self, rows: np.ndarray) -> np.ndarray:
        return self.means[rows] @ self.prototypes.T

    def error(self, prices: np.ndarray) -> np.ndarray:
        # Higham 2002, section 3.1: a sum of d products in float32 is off by no more than about d 2^-24 of the lengths'
        # product. Factors of fewer digits add their own errors. The last term is for numbers that float32 takes for 0.
        share = 1.01 * (self.means.shape[1] + 4) * 2.0 ** -24 + 3 * _lost_digits(self.device)
        return share * self.ceiling + 2.0 ** -22 * np.abs(prices).max(initial=0.0) + 1e-36

    def average(self) -> np.ndarray:
        return self.prototypes @ self.means.mean(axis=0)

    def indifferent(self) -> np.ndarray:
        return ~self.means.any(axis=1)

    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Products':
        part = object.__new__(Products)
        part.unit, part.device = self.unit, self.device
        part.means, part.prototypes = self.means[rows], self.prototypes[columns]
        part._prepare()
        return part


class Table(Scores):
    """A matrix of scores that is there, of any real dtype; each block is read in float64.

    Args:
        table: (C, K).
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
        self._same = lowest == highest

    def _read(self, rows: slice) -> torch.Tensor:
        some = self.table[rows] if len(self._rows) == len(self.table) else self.table[self._rows[rows]]
        return some.double() if len(self._columns) == self.table.shape[1] else some[:, self._columns].double()

    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self.table[self._rows[rows], self._columns[columns]].double().cpu().numpy() / self.unit

    def profits(self, rows: slice, prices: np.ndarray) -> torch.Tensor:
        return self._read(rows) / self.unit - torch.from_numpy(prices).to(self.table.device)

    def exact(self, rows: np.ndarray) -> np.ndarray:
        return self.table[self._rows[rows]].double().cpu().numpy()[:, self._columns] / self.unit

    def error(self, prices: np.ndarray) -> np.ndarray:
        return np.full(self.shape[0], 2.0 ** -52 * (1 + np.abs(prices).max(initial=0.0)))

    def average(self) -> np.ndarray:
        sums = sum(self._read(rows).sum(dim=0) for rows in self.blocks())
        return sums.cpu().numpy() / self.unit / self.shape[0]

    def indifferent(self) -> np.ndarray:
        return self._same

    def part(self, rows: np.ndarray, columns: np.ndarray) -> 'Table':
        part = object.__new__(Table)
        part.table, part.unit = self.table, self.unit
        part._rows, part._columns = self._rows[rows], self._columns[columns]
        part.shape = len(rows), len(columns)
        part.ceiling, part._same = self.ceiling[rows], self._same[rows]
        return part
