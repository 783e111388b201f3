"""Prototype sets from algebraic codes, for numbers of points that are too large to optimise.

A code is a family of bases. Each basis is the Hadamard (or Fourier) matrix with its columns multiplied by the values of
one polynomial. The inner product of two vectors is then a character sum, for which theorems give bounds. Every vector
is used with its negative (or in four phases), so that whole bases and pairs have zero mean.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import hadamard

from .closed_form import random_frame

__all__ = ['CODES', 'Code', 'best_code', 'code_points', 'find_code']

CODES = ('kerdock', 'bch', 'weil')
# The largest Hadamard matrix has 2^13 rows and takes 64 MiB.
_MAX_POWER = 13


@dataclass(frozen=True)
class Code:
    """A family of points on the unit sphere, of which any number up to `size` can be used.

    Attributes:
        method: The family: 'kerdock', 'bch' or 'weil'.
        dim: The number of dimensions that the points span, at most the requested d.
        degree: t. The highest exponent of the polynomials is 2 t - 1 ('bch') or t ('weil').
        num_bases: The number of bases.
        basis_size: The number of points in each basis, including the negatives ('weil': all phases) if they are used.
        max_cosine: An upper bound on the cosine of any two points, by theorem.
        source: The reference of the theorem.
        punctured: Whether one of the 2^m coordinates is dropped.
        signed: Whether the negatives are used, and the standard basis is one of the bases.
    """
    method: str
    dim: int
    degree: int
    num_bases: int
    basis_size: int
    max_cosine: float
    source: str
    punctured: bool = False
    signed: bool = True

    @property
    def size(self) -> int:
        """The number of points in the code."""
        return self.num_bases * self.basis_size


def _kerdock(num_points: int, dim: int) -> Iterator[Code]:
    """Yield Kerdock sets in 4^k (or, punctured, 4^k - 1) dimensions.

    In d = 4^k dimensions there are d / 2 + 1 bases, and the cosines are 0 and +-1 / sqrt(d), or -1 for a vector and its
    negative.
    """
    source = 'Kerdock 1972; Cameron & Seidel 1973; Calderbank, Cameron, Kantor & Seidel 1997'
    power = _even_power(dim + 1)
    if power >= 4:
        # Of each pair, the vector that is 1 in the dropped coordinate: the sum over the other coordinates is S - 1.
        size = 2 ** power
        yield Code('kerdock', size - 1, 2, size // 2, size, (math.sqrt(size) - 1) / (size - 1), source, True, False)
    power = _even_power(dim)
    if power >= 2:
        size = 2 ** power
        yield Code('kerdock', size, 2, size // 2 + 1, 2 * size, 1 / math.sqrt(size), source)


def _bch(num_points: int, dim: int) -> Iterator[Code]:
    """Yield duals of t-error-correcting BCH codes in 2^m (with the standard basis) or, punctured, 2^m - 1 dimensions.
    """
    sources = {2: 'Gold 1968; MacWilliams & Sloane 1977, ch. 15, theorem 18',
               3: 'Kasami 1969; MacWilliams & Sloane 1977, ch. 15, theorem 19'}
    for punctured in (False, True):
        power = min(_MAX_POWER, (dim + punctured).bit_length() - 1)
        size = 2 ** power
        if power < 3:
            continue
        for degree in range(2, 2 ** (math.ceil(power / 2) - 1) + 1):
            # The largest character sum, in units of sqrt(2^m). For t > 3 the bound of Carlitz & Uchiyama 1957.
            odd = power % 2
            factor = {2: math.sqrt(2) if odd else 2.0, 3: math.sqrt(8) if odd else 4.0}.get(degree, 2.0 * (degree - 1))
            largest = factor * math.sqrt(size)
            if largest >= size:
                break
            bases, source = size ** (degree - 1), sources.get(degree, 'Carlitz & Uchiyama 1957')
            if punctured:
                yield Code('bch', size - 1, degree, bases, size, (largest - 1) / (size - 1), source, True, False)
            else:
                yield Code('bch', size, degree, bases + 1, 2 * size, largest / size, source)
            if bases * size >= num_points:
                break


def _weil(num_points: int, dim: int) -> Iterator[Code]:
    """Yield codes of polynomial phases in 2 p dimensions, p prime.

    The points are exp(2 pi i f(x) / p) / sqrt(p) for all polynomials f of degree <= t without constant term, in four
    phases, as real vectors of 2 p dimensions, and the standard basis. For t = 2 they are a complete set of mutually
    unbiased bases of C^p (Wootters & Fields 1989).
    """
    prime = dim // 2
    while prime > 2 and any(prime % divisor == 0 for divisor in range(2, math.isqrt(prime) + 1)):
        prime -= 1
    # The theorem needs p > t, and for t >= sqrt(p) + 1 its bound is trivial.
    degree = 2
    while prime > degree and degree - 1 < math.sqrt(prime):
        bases = prime ** (degree - 1) + 1
        yield Code('weil', 2 * prime, degree, bases, 4 * prime, (degree - 1) / math.sqrt(prime), 'Weil 1948')
        if bases * 4 * prime >= num_points:
            break
        degree += 1


_FAMILIES = dict(zip(CODES, (_kerdock, _bch, _weil)))


def find_code(num_points: int, dim: int, method: str) -> Code | None:
    """Find the code of one family with the smallest maximal cosine.

    Args:
        num_points: K, the number of points that the code must have at least.
        dim: d, the number of dimensions that the code may span at most.
        method: The family, one of `CODES`.

    Returns:
        The code, or None if the family has no code of this size.
    """
    fitting = [code for code in _FAMILIES[method](num_points, dim) if code.size >= num_points]
    return min(fitting, key=_by_max_cosine, default=None)


def best_code(num_points: int, dim: int, objective: str = 'separated') -> Code | None:
    """Find the best code of any family for an objective.

    For 'separated' it is the code with the smallest maximal cosine. For 'uniform' it is the code that spans the most
    dimensions, and among those the one with the smallest maximal cosine: the energy of very many points is about -4 +
    8 / d.

    Args:
        num_points: K, the number of points that the code must have at least.
        dim: d, the number of dimensions that the code may span at most.
        objective: 'separated' or 'uniform'.

    Returns:
        The code, or None if no family has a code of this size.
    """
    fitting = [code for method in CODES for code in _FAMILIES[method](num_points, dim) if code.size >= num_points]
    if objective == 'uniform':
        return min(fitting, key=lambda code: (-code.dim, code.max_cosine), default=None)
    return min(fitting, key=_by_max_cosine, default=None)


def _by_max_cosine(code: Code) -> tuple[float, int]:
    # Where two codes differ by rounding only, the one that spans more dimensions comes first.
    return round(code.max_cosine, 12), -code.dim


def code_points(code: Code, num_points: int, dim: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    """Draw points of a code at random.

    Whole bases are drawn; of the last one, as many pairs of a vector and its negative as are still needed. If the code
    is `signed`, the mean of the points is therefore zero for even K and has the length 1 / K for odd K. Otherwise it is
    zero where K is a multiple of the basis size. The coordinates are permuted and their signs flipped at random; if the
    code spans fewer than d dimensions, it is embedded in a random subspace instead.

    Args:
        code: The code, from `find_code` or `best_code`.
        num_points: K, at most `code.size`.
        dim: d, at least `code.dim`.
        seed: Seed of the choice, the order and the orientation.
        dtype: The dtype of the points. The entries are exact up to its rounding.

    Returns:
        (K, d) unit rows of `dtype`, in random order.
    """
    generator = np.random.default_rng(seed)
    needed = -(-num_points // code.basis_size)
    chosen = generator.choice(code.num_bases, needed, replace=False, shuffle=False)
    order = generator.permutation(num_points)
    if code.dim < dim:
        frame = random_frame(code.dim, dim, generator).astype(dtype)
    else:
        coordinates, signs = generator.permutation(dim), generator.choice(np.array([-1, 1], dtype), dim)
    bases = _weil_bases(code) if code.method == 'weil' else _binary_bases(code)
    points = np.empty((num_points, dim), dtype)
    for index, basis in enumerate(chosen):
        first = index * code.basis_size
        count = min(code.basis_size, num_points - first)
        rows = bases(int(basis), dtype)
        if count < code.basis_size:
            rows = rows[generator.permutation(len(rows))[:-(-count // 2) if code.signed else count]]
        # take, unlike brackets, keeps each row together in memory, so that rows are copied faster.
        rows = rows @ frame if code.dim < dim else rows.take(coordinates, axis=1) * signs
        negated = rows[:count // 2] if code.signed else rows[:0]
        rows = rows[:count - len(negated)]
        points[order[first:first + len(rows)]] = rows
        points[order[first + len(rows):first + count]] = -negated
    return points


def _even_power(size: int) -> int:
    """Return the largest even m <= 12 with 2^m <= size."""
    return min(_MAX_POWER, size.bit_length() - 1) // 2 * 2


def _binary_bases(code: Code):
    """Return a function that computes the rows of a basis of a Kerdock set or a dual BCH code, without the negatives.
    """
    length = code.dim + code.punctured
    power = length.bit_length() - 1
    signs = hadamard(length, dtype=np.int8)
    kept = slice(1, None) if code.punctured else slice(None)
    root = 1 / math.sqrt(code.dim)
    if code.method == 'kerdock':
        field = _BinaryField(power - 1)
        forms = _kerdock_form
    else:
        field = _BinaryField(power)
        forms = _bch_form

    def rows(basis: int, dtype: type) -> np.ndarray:
        if code.signed and basis == code.num_bases - 1:
            return np.eye(length, dtype=dtype)
        column_signs = (1 - 2 * forms(field, basis, code.degree)).astype(dtype)
        return signs[:, kept] * (column_signs[kept] * dtype(root))

    return rows


def _kerdock_form(field: '_BinaryField', index: int, degree: int) -> np.ndarray:
    """Return the values (2^m,) in {0, 1} of a quadratic form Q_a on GF(2^n) + GF(2), n = m - 1 odd.

    Q_a(x, e) = sum_{i=1}^{(n-1)/2} Tr((a x)^(2^i + 1)) + e Tr(a x). The difference of two such forms has full rank, and
    its character sums have the absolute value 2^(m/2) (Kerdock 1972, in the form of Calderbank et al. 1997).
    """
    products = field.multiply(index, np.arange(field.size))
    total = np.zeros(field.size, dtype=np.int64)
    for i in range(1, (field.degree - 1) // 2 + 1):
        total ^= field.trace[field.power(products, 2 ** i + 1)]
    return np.concatenate([total, total ^ field.trace[products]])


def _bch_form(field: '_BinaryField', index: int, degree: int) -> np.ndarray:
    """Return the values (2^m,) in {0, 1} of Tr(a_3 x^3 + a_5 x^5 + ... + a_(2t-1) x^(2t-1)).

    The digits of `index` in base 2^m are the coefficients a.
    """
    x = np.arange(field.size)
    total = np.zeros(field.size, dtype=np.int64)
    for exponent in range(3, 2 * degree, 2):
        index, coefficient = divmod(index, field.size)
        total ^= field.trace[field.multiply(coefficient, field.power(x, exponent))]
    return total


def _weil_bases(code: Code):
    """Return a function that computes the rows of a basis of C^p as real vectors, in the phases 1 and i."""
    prime = code.dim // 2
    x = np.arange(prime)
    linear = np.outer(x, x) % prime
    angles = 2 * np.pi * x / prime
    cosines, sines = np.cos(angles) / math.sqrt(prime), np.sin(angles) / math.sqrt(prime)

    def rows(basis: int, dtype: type) -> np.ndarray:
        if basis == code.num_bases - 1:
            return np.eye(2 * prime, dtype=dtype)
        values, power = np.zeros(prime, dtype=np.int64), x
        for _ in range(2, code.degree + 1):
            basis, coefficient = divmod(basis, prime)
            power = power * x % prime
            values = (values + coefficient * power) % prime
        exponents = (linear + values) % prime
        real, imaginary = cosines[exponents], sines[exponents]
        return np.concatenate([np.concatenate([real, imaginary], axis=1),
                               np.concatenate([-imaginary, real], axis=1)]).astype(dtype)

    return rows


class _BinaryField:
    """GF(2^n) on the integers 0..2^n - 1. Addition is exclusive or; multiplication uses tables of logarithms.

    Args:
        degree: n, from 1 to 16.
    """

    def __init__(self, degree: int):
        self.degree, self.size = degree, 2 ** degree
        order = self.size - 1
        # A polynomial is primitive if the powers of x are all elements but 0. The first primitive one is used.
        for polynomial in range(self.size + 1, 2 * self.size, 2):
            powers, element = [], 1
            for _ in range(order):
                powers.append(element)
                element <<= 1
                if element >= self.size:
                    element ^= polynomial
                if element == 1:
                    break
            if len(powers) == order:
                break
        self._exp = np.array(powers)
        self._log = np.zeros(self.size, dtype=np.int64)
        self._log[self._exp] = np.arange(order)
        elements = np.arange(self.size)
        self.trace = np.zeros(self.size, dtype=np.int64)
        for i in range(degree):
            self.trace ^= self.power(elements, 2 ** i)

    def multiply(self, factor: int, elements: np.ndarray) -> np.ndarray:
        """Return the products of `factor` and each element, of the shape of `elements`."""
        if factor == 0:
            return np.zeros_like(elements)
        return np.where(elements == 0, 0, self._exp[(self._log[factor] + self._log[elements]) % (self.size - 1)])

    def power(self, elements: np.ndarray, exponent: int) -> np.ndarray:
        """Return each element raised to a positive exponent, of the shape of `elements`."""
        return np.where(elements == 0, 0, self._exp[self._log[elements] * exponent % (self.size - 1)])
