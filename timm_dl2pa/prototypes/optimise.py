"""Prototype sets by descent, for either objective: the paper's uniformity, or the smallest maximal cosine."""
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import minimize

from .bounds import max_cosine_lower_bound
from .closed_form import random_frame
from .energy import UNIFORMITY, pair_energy

__all__ = ['OBJECTIVES', 'affordable_evaluations', 'cross_polytopes', 'optimise', 'sgd_recipe']

OBJECTIVES = ('uniform', 'separated')

# Multiply-adds that an optimisation may spend with effort 1, half a minute or less on one core; what the exponential
# of one cosine counts as, and what calling an evaluation does.
_WORK = 2 * 10 ** 11
_EXPONENTIAL = 30
_CALL = 3 * 10 ** 5
# An evaluation on a GPU costs less by about this factor.
_GPU = 100
# Too few to get anywhere from random points.
_FEW_EVALUATIONS = 100
# Schedules of inverse temperatures for 'separated', and iterations at each: one for every start, one for the best few.
_COARSE, _COARSE_ITERATIONS = np.geomspace(8, 1e3, 12), 100
_FINE, _FINE_ITERATIONS = np.geomspace(8, 1e7, 56), 400
_REFINED = 5
_MOST_STARTS = 300
# A coarse fall that ends so close to the proven bound will reach it.
_NEAR_BOUND = 2e-3
_ROUNDING = 1e-9
_HIGHEST_ORDER = 60


def affordable_evaluations(num_points: int, dim: int, effort: float = 1.0, device: torch.device | str = 'cpu') -> int:
    """Return how often the objective may be evaluated: it counts as 2 K^2 (d + 30) + 3e5 multiply-adds, of which 2e11
    may be spent (a hundred times as many on a GPU), times `effort`."""
    work = effort * _WORK * (_GPU if torch.device(device).type == 'cuda' else 1)
    return int(work // _evaluation(num_points, dim))


def _evaluation(num_points: int, dim: int) -> int:
    return 2 * num_points * num_points * (dim + _EXPONENTIAL) + _CALL


def cross_polytopes(num_points: int, dim: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    """Return K unit rows from randomly rotated cross-polytopes: orthogonal bases, each with its negative.

    Their mean is zero where K is even. Nothing is optimised: each basis takes O(d^3).
    """
    generator = np.random.default_rng(seed)
    points = np.empty((num_points, dim), dtype)
    # In random order: the first assignment, class c to point c, says nothing about the classes.
    place = generator.permutation(num_points)
    for first in range(0, num_points, 2 * dim):
        wanted = min(2 * dim, num_points - first)
        basis = random_frame(min(dim, (wanted + 1) // 2), dim, generator)
        points[place[first:first + wanted]] = np.concatenate([basis, -basis])[:wanted]
    return points


def optimise(
        num_points: int,
        dim: int,
        objective: str,
        seed: int,
        *,
        starts: Iterable[np.ndarray] = (),
        effort: float = 1.0,
        device: torch.device | str = 'cpu',
        report: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """Return unit rows (K, d), float64, at a local minimum of the objective: the best of several.

    'uniform': L-BFGS on the paper's energy, from random points; up to K = 2 d from cross-polytopes, whose cosines are
    the best possible there already (Rankin 1955).

    'separated': L-BFGS on the log-sum-exp of the cosines, whose temperature falls until it is the largest cosine. Many
    starts fall fast and the best few again, slowly. Two thirds of the random starts have a random cyclic symmetry,
    which their first fall keeps: good codes often have one, random points seldom find it, and it costs less.

    The points descend unnormalised, p = x / |x|; in float64 on the CPU and in float32 on a GPU.

    Args:
        num_points: K, at least 2.
        dim: d, at least 2.
        objective: 'uniform' or 'separated'.
        seed: Of the starts.
        starts: (K, d) unit rows each, to begin with beside the random ones.
        effort: Factor on the work that may be spent (see `affordable_evaluations`). At least 100 evaluations are done.
        device: Where the cosines are computed.
        report: Is called with the work done so far, as a share from 0 to 1.
    """
    generator = np.random.default_rng(seed)
    evaluations = max(_FEW_EVALUATIONS, affordable_evaluations(num_points, dim, effort, device))
    budget = _Budget(evaluations, _CALL / _evaluation(num_points, dim), report)
    descend = _Descent(device, budget)
    if objective == 'uniform':
        starts = list(starts)
        if num_points <= 2 * dim:
            # Off the exact cross-polytopes, which are a stationary point at some sizes.
            start = cross_polytopes(num_points, dim, seed, np.float64)
            starts.append(start + 0.1 / np.sqrt(dim) * generator.standard_normal(start.shape))
        elif not starts:
            starts.append(generator.standard_normal((num_points, dim)))
        found = [descend(_Orbits(start), UNIFORMITY, 1000).points() for start in starts]
        report(1.0)
        return min(found, key=lambda points: descend.energy(points, UNIFORMITY))

    def fall(start: _Orbits, betas: np.ndarray, iterations: int) -> np.ndarray:
        for beta in (UNIFORMITY, *betas):
            start = descend(start, beta, iterations)
        return start.points()

    starts = [_Orbits(start) for start in starts]
    iterations = int(np.clip(budget.left // 3 // len(_COARSE), 2, _COARSE_ITERATIONS))
    found: list[np.ndarray] = []
    bound = max_cosine_lower_bound(num_points, dim)
    # A third of the work for the coarse falls, of which one at least from each start that was given.
    while len(found) < len(starts) or (budget.left > budget.all * 2 / 3 and len(found) < _MOST_STARTS) or not found:
        start = starts[len(found)] if len(found) < len(starts) else _random_start(
            num_points, dim, generator, symmetric=len(found) % 3 > 0)
        found.append(fall(start, _COARSE, iterations))
        if descend.max_cosine(found[-1]) < bound + _NEAR_BOUND:
            break
    found.sort(key=descend.max_cosine)
    # A start that was given may be better than anything near it at a higher temperature.
    best = min([*(start.points() for start in starts), *found], key=descend.max_cosine)
    iterations = int(np.clip(budget.left // 2 // len(_FINE), 2, _FINE_ITERATIONS))
    for points in found[:max(2, int(_REFINED * effort))]:
        if budget.left <= 0 or descend.max_cosine(best) < bound + _ROUNDING:
            break
        best = min(best, fall(_Orbits(points), _FINE, iterations), key=descend.max_cosine)
    report(1.0)
    return best / np.linalg.norm(best, axis=1, keepdims=True)


class _Orbits:
    """A point set under a cyclic symmetry: one point of each orbit stands for it.

    Args:
        representatives: (n, d), a point of each orbit; those that the symmetry fixes come last.
        powers: (m, d, d), the rotations R^0 .. R^(m-1) of the symmetry, which act on rows from the right.
        fixed: How many of the representatives are fixed.
    """

    def __init__(self, representatives: np.ndarray, powers: np.ndarray | None = None, fixed: int = 0):
        self.representatives = representatives
        self.powers, self.fixed = powers, fixed
        moving = len(representatives) - fixed
        order = 1 if powers is None else len(powers)
        self.sizes = None if powers is None else np.repeat([float(order), 1.0], [moving, fixed])

    def points(self) -> np.ndarray:
        """Return all points (K, d), the representatives first."""
        return self.expand(torch.from_numpy(self.representatives), None).numpy()

    def expand(self, representatives: torch.Tensor, powers: torch.Tensor | None) -> torch.Tensor:
        """Return all points (K, d) for moved representatives."""
        if self.powers is None:
            return representatives
        if powers is None:
            powers = torch.from_numpy(self.powers)
        images = representatives[:len(representatives) - self.fixed] @ powers[1:]
        return torch.cat([representatives, images.flatten(0, 1)])


def _random_start(num_points: int, dim: int, generator: np.random.Generator, symmetric: bool) -> _Orbits:
    """Return random points, single ones or under a random rotation of a random order with at most one fixed point."""
    orders = [order for order in range(2, min(num_points // 2, _HIGHEST_ORDER) + 1) if num_points % order <= 1]
    if not symmetric or not orders or dim < 4:
        return _Orbits(generator.standard_normal((num_points, dim)))
    order = int(generator.choice(orders))
    fixed = num_points % order
    # Rotations by multiples of 2 pi / order in the coordinate planes; what is left of the axes is fixed.
    angles = 2 * np.pi / order * generator.integers(0, order, (dim - fixed) // 2)
    powers = np.tile(np.eye(dim), (order, 1, 1))
    for plane, angle in enumerate(angles):
        first, second = 2 * plane, 2 * plane + 1
        turns = angle * np.arange(order)
        powers[:, first, first] = powers[:, second, second] = np.cos(turns)
        powers[:, first, second], powers[:, second, first] = np.sin(turns), -np.sin(turns)
    representatives = generator.standard_normal((num_points // order + fixed, dim))
    if fixed:
        representatives[-1] = np.eye(dim)[-1]
    return _Orbits(representatives, powers, fixed)


class _Budget:
    """Work that is left, in evaluations of the objective at all points."""

    def __init__(self, evaluations: int, calls: float, report: Callable[[float], None]):
        self.all = self.left = float(evaluations)
        self.calls = calls
        self.report = report

    def spend(self, share: float) -> None:
        """Count an evaluation at a share of the points; the part that does not depend on them counts whole."""
        self.left -= self.calls + (1.0 - self.calls) * share
        self.report(min(1.0, 1.0 - self.left / self.all))


class _Descent:
    """L-BFGS on `pair_energy` from given points, within a budget."""

    def __init__(self, device: torch.device | str, budget: _Budget):
        self.device = torch.device(device)
        self.dtype = torch.float64 if self.device.type == 'cpu' else torch.float32
        self.budget = budget

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)

    def energy(self, points: np.ndarray, beta: float) -> float:
        return pair_energy(torch.nn.functional.normalize(self._tensor(points)), beta)[0]

    def max_cosine(self, points: np.ndarray) -> float:
        # At this temperature the log-sum-exp is the maximum to rounding.
        beta, pairs = 1e12, len(points) * (len(points) - 1) / 2
        return 1.0 + (self.energy(points, beta) + np.log(pairs)) / beta

    def __call__(self, start: _Orbits, beta: float, iterations: int) -> _Orbits:
        """Return the orbits of unit rows, float64, after at most so many iterations."""
        shape = start.representatives.shape
        symmetric = start.powers is not None
        powers = self._tensor(start.powers) if symmetric else None
        sizes = self._tensor(start.sizes) if symmetric else None

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            x = self._tensor(flat.reshape(shape))
            lengths = x.norm(dim=1, keepdim=True)
            unit = x / lengths
            points = start.expand(unit, powers)
            self.budget.spend(len(unit) / len(points))
            energy, gradient = pair_energy(points, beta, sizes)
            # Only the part along the sphere moves p; |x| stretches it by 1 / |x|. Divided by beta the energy is in
            # units of cosines, whatever the temperature.
            gradient -= (gradient * unit).sum(dim=1, keepdim=True) * unit
            gradient /= lengths * beta
            return energy / beta, gradient.double().cpu().numpy().ravel()

        unit = start.representatives / np.linalg.norm(start.representatives, axis=1, keepdims=True)
        if self.budget.left > 0:
            found = minimize(objective, unit.ravel(), jac=True, method='L-BFGS-B', options={
                'maxiter': iterations, 'maxfun': min(int(self.budget.left) + 1, 2 * iterations), 'ftol': 1e-15,
                'gtol': 1e-12, 'maxcor': 20 if unit.size < 10 ** 6 else 5})
            unit = found.x.reshape(shape)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        return _Orbits(unit, start.powers, start.fixed)


def sgd_recipe(
        num_points: int,
        dim: int,
        seed: int,
        *,
        epochs: int = 1000,
        report: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """Return unit rows (K, d), float32, by the authors' recipe, for comparison.

    Points uniform in the cube, each divided by its length; then plain SGD with learning rate 0.1 on the uniformity
    objective (DL2PA, Eq. 4-5) of all points at once, one step an epoch, 1,000 epochs, in float32. The lengths are left
    free, as the gradient is taken through the normalisation.
    """
    x = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (num_points, dim))).float()
    x /= x.norm(dim=1, keepdim=True)
    for epoch in range(epochs):
        lengths = x.norm(dim=1, keepdim=True)
        unit = x / lengths
        _, gradient = pair_energy(unit, UNIFORMITY)
        gradient -= (gradient * unit).sum(dim=1, keepdim=True) * unit
        x -= 0.1 * gradient / lengths
        report((epoch + 1) / epochs)
    return (x / x.norm(dim=1, keepdim=True)).numpy()
