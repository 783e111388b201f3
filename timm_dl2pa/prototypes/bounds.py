"""Proven lower bounds on the largest cosine between two of K points on the unit sphere."""
import math

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import brentq

from ..values import whole_number

__all__ = ['max_cosine_lower_bound']


def max_cosine_lower_bound(num_prototypes: int, dim: int) -> float:
    """Return a proven lower bound on the largest cosine between two of K points on the unit sphere of R^d.

    No set of K points has a smaller maximal cosine. Three bounds cover all sizes:

    - K <= 2 d: Rankin's bound (Rankin 1955, "The closest packing of spherical caps in n dimensions"), -1 / (K - 1) for
      K <= d + 1 and 0 beyond. Both values are attained.
    - d = 2: cos(2 pi / K), attained by the regular polygon.
    - Otherwise: Levenshtein's bound, the best linear programming bound by polynomials of its degree (Levenshtein 1998,
      "Universal bounds for codes and designs", section 5). It is attained by the kissing configurations in 8 and 24
      dimensions and by a few dozen other codes, but rarely elsewhere. A gap to it therefore does not prove that a set
      can be improved.

    Args:
        num_prototypes: K, the number of points, at least 2.
        dim: d, the dimension of the space, at least 1.

    Returns:
        The bound, a cosine from -1 to 1.

    Raises:
        ValueError: K or d is too small, or K is greater than 2 in one dimension.

    Example:
        >>> max_cosine_lower_bound(5, 8)  # a regular simplex: -1 / (K - 1)
        -0.25
        >>> max_cosine_lower_bound(16, 8)
        0.0
    """
    num_points, dim = whole_number('num_prototypes', num_prototypes, least=2), whole_number('dim', dim, least=1)
    if dim == 1 and num_points > 2:
        raise ValueError(f'dim=1 has room for 2 distinct unit vectors, not for num_prototypes={num_points}: '
                         f'use dim=2 or more.')
    if num_points <= dim + 1:
        return -1.0 / (num_points - 1)
    if num_points <= 2 * dim:
        return 0.0
    if dim == 2:
        return math.cos(2 * math.pi / num_points)
    return _levenshtein(num_points, dim)


def _levenshtein(num_points: int, dim: int) -> float:
    """Return the s at which Levenshtein's bound on the size of a code with maximal cosine s equals `num_points`.

    On the interval of s that belongs to tau, the bound L_tau(s) grows from D(d, tau) to D(d, tau + 1), which are
    Delsarte's bounds on the size of a tau-design. It is continuous where two intervals meet.
    """
    tau = 1
    while _delsarte(dim, tau + 1) < num_points:
        tau += 1
    k = (tau + 1) // 2
    if tau % 2:
        low, high = _largest_root(dim, k - 1, 1, 1), _largest_root(dim, k, 1, 0)
    else:
        low, high = _largest_root(dim, k, 1, 0), _largest_root(dim, k, 1, 1)

    def excess(s: float) -> float:
        return _bound_on_size(dim, tau, s) - num_points

    # A size that equals D(d, tau), as tight designs have, may fall outside its interval by rounding.
    if excess(low) >= 0:
        return low
    if excess(high) <= 0:
        return high
    return brentq(excess, low, high, xtol=1e-15, rtol=1e-14)


def _delsarte(dim: int, tau: int) -> int:
    """Return D(d, tau), the least number of points of a tau-design (Delsarte, Goethals & Seidel 1977)."""
    k = tau // 2
    if tau % 2:
        return 2 * math.comb(dim + k - 1, k)
    return math.comb(dim + k - 1, k) + math.comb(dim + k - 2, k - 1)


def _bound_on_size(dim: int, tau: int, s: float) -> float:
    """Return L_tau(d, s), a bound on the size of codes with maximal cosine s in tau's interval (Levenshtein, eq. 5.33).
    """
    k = (tau + 1) // 2
    # Gegenbauer polynomials at s, with P(1) = 1: P_(i+1) = ((2 i + d - 2) s P_i - i P_(i-1)) / (i + d - 2).
    values = [1.0, s]
    for i in range(1, k + 1):
        values.append(((2 * i + dim - 2) * s * values[i] - i * values[i - 1]) / (i + dim - 2))
    if tau % 2:
        ratio = (values[k - 1] - values[k]) / ((1 - s) * values[k])
        return math.comb(k + dim - 3, k - 1) * ((2 * k + dim - 3) / (dim - 1) - ratio)
    ratio = (1 + s) * (values[k] - values[k + 1]) / ((1 - s) * (values[k] + values[k + 1]))
    return math.comb(k + dim - 2, k) * ((2 * k + dim - 1) / (dim - 1) - ratio)


def _largest_root(dim: int, degree: int, a: int, b: int) -> float:
    """Return the largest root of the Jacobi polynomial with the parameters (d - 3) / 2 + a and (d - 3) / 2 + b.

    It is the largest eigenvalue of the tridiagonal matrix of the recurrence (Golub & Welsch 1969). For degree 0 it is
    -1 by convention.
    """
    if degree == 0:
        return -1.0
    alpha, beta = (dim - 3) / 2 + a, (dim - 3) / 2 + b
    n = np.arange(degree)
    total = 2 * n + alpha + beta
    diagonal = (beta ** 2 - alpha ** 2) / (total * (total + 2))
    n, total = n[1:], total[1:]
    squares = 4 * n * (n + alpha) * (n + beta) * (n + alpha + beta) / (total ** 2 * (total + 1) * (total - 1))
    if degree == 1:
        return float(diagonal[0])
    last = degree - 1
    return float(eigh_tridiagonal(diagonal, np.sqrt(squares), select='i', select_range=(last, last),
                                  eigvals_only=True)[0])
