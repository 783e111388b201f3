"""`make_prototypes`: selects the methods that make a prototype set, runs them and keeps the best set."""
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args, overload

import numpy as np
import torch

from ..values import checked_value
from .bounds import max_cosine_lower_bound
from .cache import read_cached, write_cached
from .closed_form import orthogonal_simplices, regular_polygon, regular_simplex
from .codes import CODES, Code, best_code, code_points, find_code
from .optimise import (
    MIN_EVALUATIONS,
    OBJECTIVES,
    Objective,
    affordable_evaluations,
    cross_polytopes,
    optimise,
    sgd_recipe,
)
from .quality import prototype_quality

__all__ = ['METHODS', 'Method', 'PrototypeInfo', 'make_prototypes']

Method = Literal['auto', 'quick', 'simplex', 'polygon', 'simplices', 'kerdock', 'bch', 'weil', 'cross_polytopes',
                 'optimise', 'sgd']
METHODS: tuple[str, ...] = get_args(Method)
# The methods that take long enough for their sets to be cached.
_CACHED_METHODS = ('optimise', 'sgd')
# Evaluations of the objective that 'optimise' needs to converge.
_CONVERGED_EVALUATIONS = 1000


@dataclass(frozen=True)
class _Limits:
    """How much work is done where several methods are compared.

    Attributes:
        effort: Factor on the work budget of 'optimise'.
        entry_cost: What the descent itself costs: see `affordable_evaluations`.
        evaluations: The fewest evaluations of its objective for which 'optimise' is tried.
        comparison: The most multiply-adds for comparing two sets.
        cross_polytopes: The most multiply-adds for making cross-polytopes for a comparison.
    """
    effort: float
    entry_cost: int
    evaluations: int
    comparison: int
    cross_polytopes: int

    def affordable(self, num_points: int, dim: int, effort: float, device: torch.device | str) -> int:
        """Return how many evaluations 'optimise' has."""
        return affordable_evaluations(num_points, dim, effort * self.effort, device, self.entry_cost)


_AUTO = _Limits(effort=1.0, entry_cost=0, evaluations=MIN_EVALUATIONS, comparison=10 ** 11, cross_polytopes=10 ** 11)
# Less than two seconds on one core. After ten evaluations random points may be more even than those of a code. L-BFGS
# takes about 150 ns for each number; 'auto' does not count that, and its results should not change.
_QUICK = _Limits(effort=1 / 16, entry_cost=1200, evaluations=10, comparison=10 ** 9, cross_polytopes=2 * 10 ** 9)


@dataclass(frozen=True)
class PrototypeInfo:
    """How `make_prototypes` made a prototype set.

    Attributes:
        objective: 'uniform' or 'separated'.
        method: The method that made the points.
        seed: Its seed.
        description: The method in words, with the reference of the theorem, if any.
        theorem: The upper bound that a theorem gives on all cosines between two points, or None.
        tried: The value of the objective (energy or maximal cosine; lower is better) of each method that 'auto'
            compared.
        seconds: The time that it took to make the set. For a cached set, the time when it was made.
        cached: Whether the set was read from the cache.
    """
    objective: Objective
    method: Method
    seed: int
    description: str
    theorem: float | None
    tried: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


@overload
def make_prototypes(num_prototypes: int, dim: int, *, objective: Objective = ..., method: Method = ..., seed: int = ...,
                    return_info: Literal[False] = ..., effort: float = ..., device: torch.device | str = ...,
                    progress: bool = ..., cache: bool = ...) -> torch.Tensor: ...


@overload
def make_prototypes(num_prototypes: int, dim: int, *, objective: Objective = ..., method: Method = ..., seed: int = ...,
                    return_info: Literal[True], effort: float = ..., device: torch.device | str = ...,
                    progress: bool = ..., cache: bool = ...) -> tuple[torch.Tensor, PrototypeInfo]: ...


def make_prototypes(
        num_prototypes: int,
        dim: int,
        *,
        objective: Objective = 'uniform',
        method: Method = 'auto',
        seed: int = 0,
        return_info: bool = False,
        effort: float = 1.0,
        device: torch.device | str = 'cpu',
        progress: bool = False,
        cache: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, PrototypeInfo]:
    """Make a prototype set: K points spread as evenly as possible over the unit sphere of R^d.

    There are two objectives. 'uniform' is the paper's, `log mean_{i<j} exp(-2 |p_i - p_j|^2)` (DL2PA, Eq. 4-5, after
    Wang & Isola 2020). It is an average: where K is very large for d, two points that nearly coincide hardly raise it.
    'separated' minimises the maximal cosine (the Tammes problem; spherical codes).

    The methods can be used with either objective:
        'simplex': The regular simplex, for K <= d + 1. It is the minimum of both objectives (Rankin 1955; Cohn & Kumar
            2007).
        'polygon': The regular polygon, for d = 2. It is the minimum of both objectives.
        'simplices': Pairs of opposite points and a simplex, orthogonal to each other, for d + 2 <= K <= 2 d. They have
            the smallest maximal cosine, 0 (Rankin 1955), and the lowest energy of such a sum.
        'kerdock', 'bch', 'weil': Subsets of algebraic codes, for K up to some power of d. A theorem bounds their
            maximal cosine. Kerdock sets are optimal codes at d = 16, 64, 256 and 1,024 with all d^2 + 2 d points (Cohn,
            de Laat & Leijenhorst 2024, "Optimality of spherical codes via exact semidefinite programming bounds").
        'optimise': L-BFGS from many starts, within a work budget: half a minute or less on one core.
        'cross_polytopes': Orthogonal bases and their negatives in random orientations, for any size.
        'sgd': The authors' recipe, for comparison.
        'auto': A closed form (the first three methods) where it is the minimum. Otherwise the better, by measurement,
            of the best code and 'optimise', if the budget allows 'optimise' 100 evaluations of its objective. For
            larger sets the best code (for 'uniform' only if it is no worse than cross-polytopes), or cross-polytopes
            if no code is large enough.
        'quick': As 'auto', with a sixteenth of its work at most: about two seconds on one core for up to 10^8 numbers.
            A new head begins with such a set.

    On one machine, with a fixed number of threads, the result depends on the arguments alone; elsewhere rounding may
    differ. The global random states of torch and numpy are neither read nor changed. Sets made by 'optimise' and 'sgd'
    (also within 'auto') are cached in the user's cache folder. The environment variable TIMM_DL2PA_CACHE names another
    folder, or disables the cache if it is 'off'.

    Args:
        num_prototypes: K, the number of points, at least 1.
        dim: d, the dimension of the space, at least 1. For d = 1, K is at most 2.
        objective: 'uniform' or 'separated'.
        method: One of the methods above.
        seed: Seed of a separate generator for orientations, subsets of codes and starts of the optimisation.
        return_info: Whether to return a `PrototypeInfo` as well.
        effort: Factor on the work budget of 'optimise'. In 'auto' and 'quick' it also raises the size up to which
            'optimise' is tried.
        device: The device of 'optimise', which computes in float64 on the CPU and in float32 on a GPU. Small sets (up
            to about 350 prototypes in 10 dimensions, 170 in 128) are computed on the CPU, which is faster there.
        progress: Whether to show a progress bar for 'optimise' and 'sgd', where stderr is a terminal.
        cache: Whether to use the cache.

    Returns:
        (K, d) float32 unit rows on the CPU; with `return_info` a pair of them and a `PrototypeInfo`.

    Raises:
        ValueError: A number has the wrong type or is out of range, a name is unknown, or the method has no set of K
            points in d dimensions.

    Example:
        >>> prototypes, info = make_prototypes(10, 16, return_info=True)
        >>> prototypes.shape, info.method
        (torch.Size([10, 16]), 'simplex')
        >>> make_prototypes(100, 16, method='kerdock').shape
        torch.Size([100, 16])
    """
    num_prototypes, dim, seed = (checked_value(name, value, int) for name, value in (
        ('num_prototypes', num_prototypes), ('dim', dim), ('seed', seed)))
    effort = float(checked_value('effort', effort, (int, float)))
    _check_arguments(num_prototypes, dim, objective, method, seed, effort)
    limits = _QUICK if method == 'quick' else _AUTO
    candidates = _select_methods(num_prototypes, dim, objective, method, effort, device, limits)
    use_cache = cache and any(name in _CACHED_METHODS for name in candidates)
    key = dict(num_prototypes=num_prototypes, dim=dim, objective=objective, method=method, seed=seed,
               effort=effort, device=torch.device(device).type)
    if use_cache and (found := read_cached(key, lambda about: PrototypeInfo(**about, cached=True))) is not None:
        return found if return_info else found[0]
    points, info = _make_best(candidates, num_prototypes, dim, objective, seed, effort, device, progress, limits)
    if use_cache:
        about = asdict(info)
        del about['cached']
        write_cached(key, points, about)
    return (points, info) if return_info else points


def _check_arguments(num_points: int, dim: int, objective: str, method: str, seed: int, effort: float) -> None:
    if num_points < 1 or dim < 1:
        raise ValueError(f'num_prototypes and dim must be at least 1, not {num_points} and {dim}.')
    if dim == 1 and num_points > 2:
        raise ValueError(f'dim=1 has room for 2 distinct unit vectors, not for num_prototypes={num_points}: '
                         f'use dim=2 or more.')
    if objective not in OBJECTIVES:
        raise ValueError(f'objective must be one of {", ".join(OBJECTIVES)}, not {objective!r}.')
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, not {method!r}.')
    if not 0 <= seed < 2 ** 63:
        raise ValueError(f'seed must be in 0..2^63 - 1, not {seed}.')
    if not (effort > 0 and math.isfinite(effort)):
        raise ValueError(f'effort must be positive and finite, not {effort}.')


def _select_methods(
        num_points: int, dim: int, objective: str, method: str, effort: float, device: torch.device | str,
        limits: _Limits,
) -> dict[str, Code | None]:
    """Return the methods to try, with the code for a method that uses one. A proven minimum is tried alone."""
    size = f'num_prototypes={num_points} in dim={dim}'
    if method in CODES:
        code = find_code(num_points, dim, method)
        if code is None:
            raise ValueError(f'method={method!r} has no code with {size}: use another method or a larger dim.')
        return {method: code}
    fits = {
        'simplex': num_points <= dim + 1, 'polygon': dim == 2, 'simplices': dim + 2 <= num_points <= 2 * dim,
        'optimise': num_points >= 2 and dim >= 2, 'sgd': num_points >= 2 and dim >= 2, 'cross_polytopes': True,
    }
    if method not in ('auto', 'quick'):
        if not fits[method]:
            needs = {'simplex': 'num_prototypes <= dim + 1', 'polygon': 'dim=2',
                     'simplices': 'dim + 2 <= num_prototypes <= 2 dim'}.get(method, 'at least 2 points and dimensions')
            raise ValueError(f"method={method!r} needs {needs}, not {size}: use method='auto'.")
        return {method: None}
    for closed in ('simplex', 'polygon'):
        if fits[closed]:
            return {closed: None}
    candidates: dict[str, Code | None] = {}
    if fits['simplices']:
        candidates['simplices'] = None
        if objective == 'separated':
            return candidates
    elif (code := best_code(num_points, dim, objective)) is not None:
        candidates[code.method] = code
        if objective == 'separated' and _is_optimal(code, num_points, dim):
            return candidates
    # The simplices are so good that only a converged optimisation can improve on them.
    needed = _CONVERGED_EVALUATIONS if 'simplices' in candidates else limits.evaluations
    if limits.affordable(num_points, dim, effort, device) >= needed:
        candidates['optimise'] = None
    elif not candidates or (objective == 'uniform' and 'simplices' not in candidates and code.dim < dim
                            and num_points * dim * dim < limits.cross_polytopes):
        # Unlike the code, cross-polytopes span all dimensions.
        candidates['cross_polytopes'] = None
    return candidates


def _is_optimal(code: Code, num_points: int, dim: int) -> bool:
    """Return whether a code is proven to have the smallest maximal cosine: by the bound, or by Cohn et al. 2024."""
    proven = code.method == 'kerdock' and code.signed and code.size == num_points and dim in (16, 64, 256, 1024)
    return proven or code.max_cosine <= max_cosine_lower_bound(num_points, dim) + 1e-12


def _make_best(
        candidates: dict[str, Code | None],
        num_points: int,
        dim: int,
        objective: str,
        seed: int,
        effort: float,
        device: torch.device | str,
        progress: bool,
        limits: _Limits,
) -> tuple[torch.Tensor, PrototypeInfo]:
    """Make the points by each candidate method and return the best set."""
    began = time.perf_counter()
    points: dict[str, np.ndarray] = {}
    tried: dict[str, float] = {}
    for name, code in candidates.items():
        if code is not None:
            # Float64 if 'optimise' starts from these points. Otherwise float32, as there may be millions of them.
            dtype = np.float64 if 'optimise' in candidates else np.float32
            points[name] = code_points(code, num_points, dim, seed, dtype)
        elif name == 'optimise':
            starts = list(points.values()) if objective == 'separated' else []
            with _ProgressBar(progress, name) as report:
                evaluations = max(limits.evaluations, limits.affordable(num_points, dim, effort, device))
                points[name] = optimise(num_points, dim, objective, seed, starts=starts, effort=effort * limits.effort,
                                        evaluations=evaluations, device=device, report=report)
        elif name == 'sgd':
            with _ProgressBar(progress, name) as report:
                points[name] = sgd_recipe(num_points, dim, seed, report=report)
        elif name == 'polygon':
            points[name] = regular_polygon(num_points, seed)
        else:
            make = {'simplex': regular_simplex, 'simplices': orthogonal_simplices, 'cross_polytopes': cross_polytopes}
            points[name] = make[name](num_points, dim, seed)
        if len(candidates) > 1:
            quality = prototype_quality(torch.from_numpy(points[name]), max_work=limits.comparison)
            tried[name] = quality.energy if objective == 'uniform' else quality.max_cosine
    # If the values differ by rounding only, the first method wins: a closed form or a code is exact.
    method = next(name for name in points if not tried or tried[name] <= min(tried.values()) + 1e-9)
    code = candidates[method]
    info = PrototypeInfo(
        objective=objective,
        method=method,
        seed=seed,
        description=_describe(method, code, num_points, dim),
        theorem=_theorem(method, code, num_points, dim),
        tried=tried,
        seconds=time.perf_counter() - began,
    )
    return torch.from_numpy(points[method]).float(), info


def _theorem(method: str, code: Code | None, num_points: int, dim: int) -> float | None:
    """Return the upper bound on the cosines that a theorem gives for a set, or None."""
    if code is not None:
        return code.max_cosine
    # The closed forms attain the lower bound.
    is_closed_form = method in ('simplex', 'polygon', 'simplices') and num_points > 1
    return max_cosine_lower_bound(num_points, dim) if is_closed_form else None


def _describe(method: str, code: Code | None, num_points: int, dim: int) -> str:
    """Return the method in words."""
    if code is not None:
        family = {'kerdock': 'a Kerdock set', 'bch': f'the dual of a {code.degree}-error-correcting BCH code',
                  'weil': f'polynomial phases of degree {code.degree} over {code.dim // 2} elements'}[method]
        return (f'{num_points} of the {code.size} points of {family} in {code.dim} dimensions'
                + (f', embedded at random in {dim} dimensions' if code.dim < dim else '') + f' ({code.source})')
    return {
        'simplex': 'a regular simplex (Rankin 1955)',
        'polygon': 'a regular polygon',
        'simplices': f'{num_points - dim - 1} opposite pairs and a simplex of {2 * dim + 2 - num_points}, orthogonal '
                     f'to each other (Rankin 1955)',
        'cross_polytopes': 'cross-polytopes in random orientations',
        'optimise': 'L-BFGS from many starts',
        'sgd': "the authors' recipe: 1,000 steps of SGD",
    }[method]


class _ProgressBar:
    """Context manager for a progress bar. It gives a function that takes the share of the work done, from 0 to 1.

    Args:
        shown: Whether to show the bar. Otherwise the function does nothing.
        name: The method, for the label.
    """

    def __init__(self, shown: bool, name: str):
        self.shown, self.name = shown, name

    def __enter__(self) -> Callable[[float], None]:
        if not self.shown:
            return lambda share: None
        from tqdm import tqdm
        self.bar = tqdm(total=100, desc=f'prototypes: {self.name}', unit='%', disable=None,
                        bar_format='{l_bar}{bar}| {elapsed}<{remaining}')

        def report(share: float) -> None:
            if int(100 * share) > self.bar.n:
                self.bar.update(int(100 * share) - self.bar.n)
        return report

    def __exit__(self, *_) -> None:
        if self.shown:
            self.bar.close()
