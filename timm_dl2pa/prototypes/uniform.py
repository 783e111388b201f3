"""The paper's uniformity objective (Eq. 4-5) and its minimisation by L-BFGS, in blocks of rows."""
import numpy as np
import torch
from scipy.optimize import minimize

from .closed_form import random_frame

# Rows are taken together as long as their cosines with all points stay below this many numbers (64 MiB in float64).
_BLOCK_ENTRIES = 2 ** 23
# Multiply-adds that an optimisation may spend, about ten seconds on one core, and what the exponential of one cosine
# counts as.
_WORK = 2 * 10 ** 11
_EXPONENTIAL = 30
# With fewer evaluations than this, random points end up worse than cross-polytopes that nobody optimised.
_FEW_EVALUATIONS = 100


def uniformity(points: np.ndarray | torch.Tensor) -> float:
    """Return `log mean_{i<j} exp(-2 |p_i - p_j|^2)` of unit rows (K, d), K >= 2, in float64; lower is more even.

    DL2PA, Eq. 4-5, after Wang & Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", with t = 2.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(f'points must be at least 2 rows (K, d), not an array of the shape {points.shape}.')
    return _uniformity_and_gradient(points)[0]


def _uniformity_and_gradient(points: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the objective and its gradient (K, d) with respect to unit rows."""
    num_points = len(points)
    block = max(1, _BLOCK_ENTRIES // num_points)
    total = 0.0
    pull = np.empty_like(points)
    for first in range(0, num_points, block):
        rows = slice(first, min(first + block, num_points))
        # |p - q|^2 = 2 - 2 p.q on the sphere, so that exp(-2 |p - q|^2) = exp(4 p.q - 4), never more than 1.
        kernel = points[rows] @ points.T
        kernel -= 1.0
        kernel *= 4.0
        np.exp(kernel, out=kernel)
        kernel[np.arange(kernel.shape[0]), np.arange(rows.start, rows.stop)] = 0.0
        total += kernel.sum()
        pull[rows] = kernel @ points
    # Each pair was counted twice, in the sum and (as a row and as a column) in the gradient.
    return float(np.log(total / (num_points * (num_points - 1)))), pull * (8.0 / total)


def _cross_polytopes(num_points: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Return K unit rows from randomly rotated cross-polytopes: orthogonal bases, each with its negative."""
    bases = []
    for first in range(0, num_points, 2 * dim):
        needed = min(2 * dim, num_points - first)
        basis = random_frame(min(dim, (needed + 1) // 2), dim, generator)
        bases.append(np.concatenate([basis, -basis])[:needed])
    return np.concatenate(bases)


def minimise_uniformity(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Return unit rows (K, d), float64, at a minimum of `uniformity`.

    L-BFGS over unnormalised points x, p = x / |x|, from random points. An evaluation counts as 2 K^2 (d + 30)
    multiply-adds, of which 2e11 may be spent, so that it takes some ten seconds at most: (100, 10) converges, (1000,
    128) has 632 evaluations and nearly does, (10000, 128) has 6, and (21841, 128) and beyond keep their start. Where
    that is too few, and where K <= 2 d (the cosines of a cross-polytope are already the best possible there, Rankin
    1955), the start is not random points but randomly rotated cross-polytopes.
    """
    evaluations = _WORK // (2 * num_points * num_points * (dim + _EXPONENTIAL))
    generator = np.random.default_rng(seed)
    if num_points <= 2 * dim or evaluations < _FEW_EVALUATIONS:
        start = _cross_polytopes(num_points, dim, generator)
        if evaluations < 2:
            return start
        # Off the exact cross-polytopes, which are a stationary point at some sizes.
        start += 0.1 / np.sqrt(dim) * generator.standard_normal(start.shape)
    else:
        start = generator.standard_normal((num_points, dim))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = flat.reshape(num_points, dim)
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        points = x / lengths
        value, gradient = _uniformity_and_gradient(points)
        # Only the part along the sphere moves p; |x| stretches it by 1 / |x|.
        gradient -= np.sum(gradient * points, axis=1, keepdims=True) * points
        return value, (gradient / lengths).ravel()

    found = minimize(objective, start.ravel(), jac=True, method='L-BFGS-B',
                     options={'maxiter': 1000, 'maxfun': evaluations, 'ftol': 1e-13, 'gtol': 1e-10, 'maxcor': 10})
    x = found.x.reshape(num_points, dim)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
