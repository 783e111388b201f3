"""Prototype sets in closed form: the regular simplex, orthogonal sums of simplices, and the regular polygon."""
import numpy as np

__all__ = ['orthogonal_simplices', 'random_frame', 'random_frames', 'regular_polygon', 'regular_simplex']


def random_frame(num_vectors: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Draw n orthonormal vectors (n, d): see `random_frames`."""
    return random_frames(1, num_vectors, dim, generator)[0]


def random_frames(num_frames: int, num_vectors: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Draw sets of orthonormal vectors from the uniform (Haar) distribution.

    The Q of a Gaussian matrix is uniform only once the signs of R's diagonal are moved into it (Mezzadri 2007).

    Args:
        num_frames: m, the number of sets.
        num_vectors: n, at most `dim`, the number of vectors in each.
        dim: d, the dimension of the space.
        generator: The source of random numbers.

    Returns:
        (m, n, d) float64, orthonormal rows in each set. They do not depend on how many are drawn at once.
    """
    q, r = np.linalg.qr(generator.standard_normal((num_frames, dim, num_vectors)))
    return (q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]).swapaxes(1, 2)


def regular_simplex(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Return the vertices of a regular simplex, in a random orientation.

    Every cosine is -1 / (K - 1), the smallest maximal cosine that K unit vectors can have in any dimension (Rankin
    1955). The orientation is random so that a head without a neck uses all features alike.

    Args:
        num_points: K, at most d + 1.
        dim: d, the dimension of the space.
        seed: Seed of the orientation.

    Returns:
        (K, d) float64 unit rows.
    """
    if num_points == 1:
        return random_frame(1, dim, np.random.default_rng(seed))
    # The vertices span K - 1 dimensions. Cholesky-like recursion for their coordinates in that span: row k is vertex k.
    span = num_points - 1
    vertices = np.zeros((num_points, span))
    for i in range(span):
        vertices[i, i] = np.sqrt(max(0.0, 1.0 - vertices[i, :i] @ vertices[i, :i]))
        vertices[i + 1:, i] = (-1.0 / span - vertices[i, :i] @ vertices[i, :i]) / vertices[i, i]
    return vertices @ random_frame(span, dim, np.random.default_rng(seed))


def orthogonal_simplices(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Return K - d - 1 pairs of opposite points and a simplex of the rest, all orthogonal, in a random orientation.

    No cosine is positive. For more than d + 1 points, 0 is the smallest maximal cosine (Rankin 1955), and the sets that
    attain it are orthogonal sums of at least K - d parts. In a sum of exactly K - d parts each part is a simplex. Among
    those sums this one has the lowest uniformity: a simplex of k points adds g(k) = k (k - 1) / 2 (exp(-4 / (k - 1)) -
    1) to the sum that orthogonal points would have, and g is concave from 2 on, so unequal sizes are best. At K = 2 d
    the set is the cross-polytope. The mean of the points is zero.

    Args:
        num_points: K, from d + 2 to 2 d.
        dim: d, the dimension of the space.
        seed: Seed of the orientation and of the order.

    Returns:
        (K, d) float64 unit rows.
    """
    pairs = num_points - dim - 1
    generator = np.random.default_rng(seed)
    frame = random_frame(dim, dim, generator)
    simplex = regular_simplex(num_points - 2 * pairs, dim - pairs, int(generator.integers(2 ** 32)))
    # In random order: the initial assignment gives class c prototype c, and it should favour no pairs of classes.
    return generator.permutation(np.concatenate([frame[:pairs], -frame[:pairs], simplex @ frame[pairs:]]))


def regular_polygon(num_points: int, seed: int) -> np.ndarray:
    """Return the vertices of a regular polygon, in a random orientation.

    Args:
        num_points: K, at least 1.
        seed: Seed of the orientation.

    Returns:
        (K, 2) float64 unit rows.
    """
    offset = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    angles = offset + 2 * np.pi * np.arange(num_points) / num_points
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
