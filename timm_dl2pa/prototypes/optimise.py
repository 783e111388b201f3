"""Prototype sets by optimisation, for either objective: the paper's uniformity or the smallest maximal cosine."""
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import minimize

from .bounds import max_cosine_lower_bound
from .closed_form import random_frames
from .energy import UNIFORMITY, pair_energy

__all__ = ['MIN_EVALUATIONS', 'OBJECTIVES', 'Objective', 'affordable_evaluations', 'cross_polytopes',
           'device_of_evaluations', 'optimise', 'sgd_recipe']

Objective = Literal['uniform', 'separated']
OBJECTIVES: tuple[str, ...] = get_args(Objective)

# The fewest evaluations of the objective that bring random points near a minimum.
MIN_EVALUATIONS = 100
# The work budget for effort 1, in multiply-adds: half a minute or less on one core.
_WORK_BUDGET = 2 * 10 ** 11
# The cost of the exponential of one cosine, and the fixed cost of an evaluation, in multiply-adds.
_EXPONENTIAL_COST = 30
_EVALUATION_OVERHEAD = 3 * 10 ** 5
# An evaluation of a large set on a GPU is faster by about this factor. One has some 20 launches and waits a few times,
# about a millisecond: beyond so much work a GPU is worth its while, and so much that millisecond counts there.
_GPU_SPEEDUP = 100
_WORTH_A_GPU = 10 ** 7
_GPU_EVALUATION_OVERHEAD = 5 * 10 ** 8
# Annealing schedules for 'separated': the inverse temperatures, and the iterations at each. The coarse schedule is used
# for every start, the fine one for the best few.
_COARSE_BETAS, _COARSE_ITERATIONS = np.geomspace(8, 1e3, 12), 100
_FINE_BETAS, _FINE_ITERATIONS = np.geomspace(8, 1e7, 56), 400
_REFINED_SETS = 5
_MAX_STARTS = 300
# A set this close to the proven bound after the coarse schedule reaches it after the fine one.
_NEAR_BOUND = 2e-3
_ROUNDING = 1e-9
_MAX_SYMMETRY_ORDER = 60
# The most entries of the orthonormal bases that are made at once.
_FRAME_ENTRIES = 2 ** 16


def affordable_evaluations(num_points: int, dim: int, effort: float = 1.0, device: torch.device | str = 'cpu',
                           entry_cost: int = 0) -> int:
    """Return how many evaluations of the objective the work budget allows.

    An evaluation counts as 2 K^2 (d + 30) + 3e5 multiply-adds, and the budget is 2e11 of them, times `effort`. On a GPU
    it counts as 5e8 more, and the budget is 100 times as large. Sets below 1e7 are evaluated on the CPU, which is
    faster there.

    Args:
        num_points: K, the number of points.
        dim: d, the dimension of the space.
        effort: Factor on the budget.
        device: The device of the evaluations.
        entry_cost: Multiply-adds that an evaluation counts besides, for each of the K d numbers of the set.

    Returns:
        The number of evaluations, possibly 0.
    """
    on_gpu = device_of_evaluations(num_points, dim, device).type == 'cuda'
    work = effort * _WORK_BUDGET * (_GPU_SPEEDUP if on_gpu else 1)
    return int(work // (_pair_work(num_points, dim) + _overhead(on_gpu) + entry_cost * num_points * dim))


def device_of_evaluations(num_points: int, dim: int, device: torch.device | str) -> torch.device:
    """Return where a set is evaluated that `device` was asked for: small ones on the CPU."""
    return torch.device(device if _pair_work(num_points, dim) > _WORTH_A_GPU else 'cpu')


def _pair_work(num_points: int, dim: int) -> int:
    return 2 * num_points * num_points * (dim + _EXPONENTIAL_COST)


def _overhead(on_gpu: bool) -> int:
    return _GPU_EVALUATION_OVERHEAD if on_gpu else _EVALUATION_OVERHEAD


def cross_polytopes(num_points: int, dim: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    """Return points of randomly rotated cross-polytopes: orthonormal bases, each with its negative.

    The mean of the points is zero for even K. Nothing is optimised; each basis takes O(d^3) operations.

    Args:
        num_points: K, the number of points.
        dim: d, the dimension of the space.
        seed: Seed of the bases and of the order.
        dtype: The dtype of the points.

    Returns:
        (K, d) unit rows of `dtype`, in random order.
    """
    generator = np.random.default_rng(seed)
    points = np.empty((num_points, dim), dtype)
    # In random order: the initial assignment gives class c prototype c, and it should favour no pairs of classes.
    order = generator.permutation(num_points)
    # Whole bases in blocks, whose entries fit in the processor's cache, then the rest.
    whole = num_points // (2 * dim)
    step = max(1, _FRAME_ENTRIES // (dim * dim))
    blocks = [(min(step, whole - first), dim) for first in range(0, whole, step)]
    rest = num_points - 2 * dim * whole
    first = 0
    for number, size in [*blocks, *([(1, (rest + 1) // 2)] if rest else [])]:
        bases = random_frames(number, size, dim, generator)
        signed = np.concatenate([bases, -bases], axis=1).reshape(-1, dim)[:num_points - first]
        points[order[first:first + len(signed)]] = signed
        first += len(signed)
    return points


def optimise(
        num_points: int,
        dim: int,
        objective: str,
        seed: int,
        *,
        starts: Iterable[np.ndarray] = (),
        effort: float = 1.0,
        evaluations: int | None = None,
        device: torch.device | str = 'cpu',
        report: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """Minimise an objective from several starts and return the best local minimum.

    'uniform': L-BFGS on the paper's energy, from random points. Up to K = 2 d it starts from cross-polytopes, which
    have the smallest possible maximal cosine there (Rankin 1955).

    'separated': L-BFGS on the log-sum-exp of the cosines, annealed until it equals the largest cosine. Many starts are
    annealed fast, and the best few again, slowly. Two thirds of the random starts have a random cyclic symmetry, which
    the first annealing preserves: good codes are often symmetric, random points rarely become so, and evaluations of a
    symmetric set are cheaper.

    The optimised variable is unnormalised, p = x / |x|, in float64 on the CPU and in float32 on a GPU.

    Args:
        num_points: K, at least 2.
        dim: d, at least 2.
        objective: 'uniform' or 'separated'.
        seed: Seed of the random starts.
        starts: Additional starts, (K, d) unit rows each.
        effort: Factor on the work budget (see `affordable_evaluations`). At least `MIN_EVALUATIONS` are done.
        evaluations: How many are done, whatever the budget allows.
        device: The device of the evaluations; small sets stay on the CPU (`device_of_evaluations`).
        report: Called with the share of the work done so far, from 0 to 1.

    Returns:
        (K, d) float64 unit rows.
    """
    generator = np.random.default_rng(seed)
    if evaluations is None:
        evaluations = max(MIN_EVALUATIONS, affordable_evaluations(num_points, dim, effort, device))
    device = device_of_evaluations(num_points, dim, device)
    overhead = _overhead(device.type == 'cuda')
    budget = _Budget(evaluations, overhead / (_pair_work(num_points, dim) + overhead), report)
    descend = _Descent(device, budget)
    if objective == 'uniform':
        starts = list(starts)
        if num_points <= 2 * dim:
            # Perturbed, because exact cross-polytopes are a stationary point at some sizes.
            start = cross_polytopes(num_points, dim, seed, np.float64)
            starts.append(start + 0.1 / np.sqrt(dim) * generator.standard_normal(start.shape))
        elif not starts:
            starts.append(generator.standard_normal((num_points, dim)))
        found = [descend(_Orbits(start), UNIFORMITY, 1000).points() for start in starts]
        report(1.0)
        return min(found, key=lambda points: descend.energy(points, UNIFORMITY))

    def anneal(start: _Orbits, betas: np.ndarray, iterations: int) -> np.ndarray:
        for beta in (UNIFORMITY, *betas):
            start = descend(start, beta, iterations)
        return start.points()

    starts = [_Orbits(start) for start in starts]
    iterations = int(np.clip(budget.left // 3 // len(_COARSE_BETAS), 2, _COARSE_ITERATIONS))
    found: list[np.ndarray] = []
    bound = max_cosine_lower_bound(num_points, dim)
    # A third of the budget is for the coarse schedule, which runs at least once from each given start.
    while len(found) < len(starts) or (budget.left > budget.total * 2 / 3 and len(found) < _MAX_STARTS) or not found:
        start = starts[len(found)] if len(found) < len(starts) else _random_start(
            num_points, dim, generator, symmetric=len(found) % 3 > 0)
        found.append(anneal(start, _COARSE_BETAS, iterations))
        if descend.max_cosine(found[-1]) < bound + _NEAR_BOUND:
            break
    found.sort(key=descend.max_cosine)
    # A given start may be better than every set that annealing from it finds.
    best = min([*(start.points() for start in starts), *found], key=descend.max_cosine)
    iterations = int(np.clip(budget.left // 2 // len(_FINE_BETAS), 2, _FINE_ITERATIONS))
    for points in found[:max(2, int(_REFINED_SETS * effort))]:
        if budget.left <= 0 or descend.max_cosine(best) < bound + _ROUNDING:
            break
        best = min(best, anneal(_Orbits(points), _FINE_BETAS, iterations), key=descend.max_cosine)
    report(1.0)
    return best / np.linalg.norm(best, axis=1, keepdims=True)


class _Orbits:
    """A point set with a cyclic symmetry, given by one representative of each orbit.

    Args:
        representatives: (n, d) float64, one point of each orbit. Points that the symmetry fixes come last.
        powers: (m, d, d) float64, the rotations R^0 .. R^(m-1) of the symmetry, which act on rows from the right.
            Default: no symmetry.
        fixed: The number of fixed points.
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
        """Return all points (K, d) for other representatives (n, d), with `powers` as a tensor of their dtype."""
        if self.powers is None:
            return representatives
        if powers is None:
            powers = torch.from_numpy(self.powers)
        images = representatives[:len(representatives) - self.fixed] @ powers[1:]
        return torch.cat([representatives, images.flatten(0, 1)])


def _random_start(num_points: int, dim: int, generator: np.random.Generator, symmetric: bool) -> _Orbits:
    """Return random points, if `symmetric` with a random rotation of random order and at most one fixed point."""
    orders = [order for order in range(2, min(num_points // 2, _MAX_SYMMETRY_ORDER) + 1) if num_points % order <= 1]
    if not symmetric or not orders or dim < 4:
        return _Orbits(generator.standard_normal((num_points, dim)))
    order = int(generator.choice(orders))
    fixed = num_points % order
    # Rotations by multiples of 2 pi / order in coordinate planes. The remaining axes are fixed.
    angles = 2 * np.pi / order * generator.integers(0, order, (dim - fixed) // 2)
    powers = np.tile(np.eye(dim), (order, 1, 1))
    for plane, angle in enumerate(angles):
        first, second = 2 * plane, 2 * plane + 1
        multiples = angle * np.arange(order)
        powers[:, first, first] = powers[:, second, second] = np.cos(multiples)
        powers[:, first, second], powers[:, second, first] = np.sin(multiples), -np.sin(multiples)
    representatives = generator.standard_normal((num_points // order + fixed, dim))
    if fixed:
        representatives[-1] = np.eye(dim)[-1]
    return _Orbits(representatives, powers, fixed)


class _Budget:
    """The remaining work, in evaluations of the objective at all points.

    Args:
        evaluations: The total.
        overhead: The share of an evaluation that does not depend on the number of points.
        report: Called with the share of the work done so far.
    """

    def __init__(self, evaluations: int, overhead: float, report: Callable[[float], None]):
        self.total = self.left = float(evaluations)
        self.overhead = overhead
        self.report = report

    def spend(self, share: float) -> None:
        """Count an evaluation at a share of the points. Its overhead counts in full."""
        self.left -= self.overhead + (1.0 - self.overhead) * share
        self.report(min(1.0, 1.0 - self.left / self.total))


class _Descent:
    """L-BFGS on `pair_energy` within a work budget."""

    def __init__(self, device: torch.device | str, budget: _Budget):
        self.device = torch.device(device)
        self.dtype = torch.float64 if self.device.type == 'cpu' else torch.float32
        self.budget = budget

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)

    def energy(self, points: np.ndarray, beta: float) -> float:
        return pair_energy(torch.nn.functional.normalize(self._tensor(points)), beta)[0]

    def max_cosine(self, points: np.ndarray) -> float:
        # At this inverse temperature the log-sum-exp equals the maximum up to rounding.
        beta, pairs = 1e12, len(points) * (len(points) - 1) / 2
        return 1.0 + (self.energy(points, beta) + np.log(pairs)) / beta

    def __call__(self, start: _Orbits, beta: float, iterations: int) -> _Orbits:
        """Minimise the energy at an inverse temperature from the given orbits; return orbits of float64 unit rows."""
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
            # The gradient with respect to x is the component tangent to the sphere, divided by |x|. Divided by beta,
            # the energy is in units of cosines at every temperature.
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
    """Make points by the recipe of the paper's authors, for comparison.

    The starting points are uniform in the cube and normalised to unit length. Plain SGD with learning rate 0.1 then
    minimises the uniformity (DL2PA, Eq. 4-5) of all points, with one step per epoch, in float32. The gradient is taken
    through the normalisation, so the lengths of the points are free.

    Args:
        num_points: K, at least 2.
        dim: d, at least 2.
        seed: Seed of the starting points.
        epochs: The number of steps.
        report: Called with the share of the work done so far.

    Returns:
        (K, d) float32 unit rows.
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
