"""Prototype sets that mathematics gives outright: simplices, their orthogonal sums, and the regular polygon."""
import numpy as np


def random_frame(num_vectors: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Return `num_vectors` <= `dim` orthonormal rows (num_vectors, dim), float64, uniformly distributed.

    The signs of R's diagonal are moved into Q, without which QR of a Gaussian matrix is not uniform (Mezzadri 2007).
    """
    q, r = np.linalg.qr(generator.standard_normal((dim, num_vectors)))
    return (q * np.sign(np.diagonal(r))).T


def regular_simplex(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Return K <= d + 1 unit rows (K, d), float64, with every cosine -1 / (K - 1), in a random orientation.

    -1 / (K - 1) is the smallest maximal cosine that K unit vectors can have in any dimension (Rankin 1955). The
    orientation is random so that no feature is favoured, or left out, where features are used without a neck.
    """
    if num_points == 1:
        return random_frame(1, dim, np.random.default_rng(seed))
    # The corners e_i of R^K around their mean span K - 1 dimensions. Row k of this lower triangular recursion is the
    # k-th corner in coordinates of that span, so that the subspace needs no eigenvectors.
    span = num_points - 1
    corners = np.zeros((num_points, span))
    for i in range(span):
        corners[i, i] = np.sqrt(max(0.0, 1.0 - corners[i, :i] @ corners[i, :i]))
        corners[i + 1:, i] = (-1.0 / span - corners[i, :i] @ corners[i, :i]) / corners[i, i]
    return corners @ random_frame(span, dim, np.random.default_rng(seed))


def orthogonal_simplices(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Return d + 2 <= K <= 2 d unit rows (K, d), float64, with no positive cosine, in a random orientation.

    Beyond d + 1 points 0 is the smallest maximal cosine (Rankin 1955), and the sets that have it are orthogonal sums of
    at least K - d parts. With exactly K - d parts each is a simplex, and of those sums this one has the lowest
    uniformity: K - d - 1 pairs of opposite points, and one simplex of the rest. (A simplex of k points adds g(k) =
    k (k - 1) / 2 (exp(-4 / (k - 1)) - 1) to the sum that orthogonal points would have; g is concave from 2 on, so that
    unequal sizes are best.) At K = 2 d it is the cross-polytope. The mean is zero.
    """
    pairs = num_points - dim - 1
    generator = np.random.default_rng(seed)
    frame = random_frame(dim, dim, generator)
    simplex = regular_simplex(num_points - 2 * pairs, dim - pairs, int(generator.integers(2 ** 32)))
    # In random order: the first assignment, class c to point c, says nothing about the classes.
    return generator.permutation(np.concatenate([frame[:pairs], -frame[:pairs], simplex @ frame[pairs:]]))


def regular_polygon(num_points: int, seed: int) -> np.ndarray:
    """Return K unit rows (K, 2), float64, the corners of a regular polygon in a random orientation."""
    turn = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    angles = turn + 2 * np.pi * np.arange(num_points) / num_points
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
