"""`make_prototypes`: which of the methods makes the points, and what it made."""
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from .bounds import max_cosine_lower_bound
from .closed_form import orthogonal_simplices, regular_polygon, regular_simplex
from .codes import CODES, Code, best_code, code_points, find_code
from .files import read_cached, write_cached
from .optimise import _FEW_EVALUATIONS, OBJECTIVES, affordable_evaluations, cross_polytopes, optimise, sgd_recipe
from .quality import prototype_quality

__all__ = ['METHODS', 'PrototypeInfo', 'make_prototypes']

METHODS = ('auto', 'simplex', 'polygon', 'simplices', *CODES, 'cross_polytopes', 'optimise', 'sgd')
# Those that take long enough to be worth keeping.
_KEPT = ('optimise', 'sgd')
_CONVERGENCE = 1000
# Multiply-adds that comparing may take, and making cross-polytopes for a comparison.
_COMPARISON = 10 ** 11
_CROSS_POLYTOPES = 10 ** 11


@dataclass(frozen=True)
class PrototypeInfo:
    """What `make_prototypes` did.

    Attributes:
        objective: 'uniform' or 'separated'.
        method: The method whose points these are.
        seed: Its seed.
        description: In words, with the source of a theorem.
        theorem: What no cosine between two points exceeds, where a theorem says so; None elsewhere.
        tried: The objective's value (energy, or maximal cosine) of each method that 'auto' compared, lower is better.
        seconds: What making them took; when they come from the cache, then.
        cached: Whether they come from the cache.
    """
    objective: str
    method: str
    seed: int
    description: str
    theorem: float | None
    tried: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


def make_prototypes(
        num_prototypes: int,
        dim: int,
        *,
        objective: str = 'uniform',
        method: str = 'auto',
        seed: int = 0,
        return_info: bool = False,
        effort: float = 1.0,
        device: torch.device | str = 'cpu',
        progress: bool = False,
        cache: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, PrototypeInfo]:
    """Spread K points on the unit sphere of R^d.

    Objectives: 'uniform' is the paper's, `log mean_{i<j} exp(-2 |p_i - p_j|^2)` (DL2PA, Eq. 4-5, after Wang & Isola
    2020), an average: where K is very large for d, it is hardly higher when two of the points nearly touch. 'separated'
    is the smallest maximal cosine (the Tammes problem; spherical codes).

    Methods, for either objective:
        'simplex': K <= d + 1, the regular simplex: the minimum of both objectives (Rankin 1955; Cohn & Kumar 2007).
        'polygon': d = 2, the regular polygon: the minimum of both.
        'simplices': d + 2 <= K <= 2 d, opposite pairs and a simplex, orthogonal to each other: the smallest maximal
            cosine, 0 (Rankin 1955), and the lowest energy that such a sum has.
        'kerdock', 'bch', 'weil': subsets of algebraic codes, whose maximal cosine a theorem bounds, for K to some power
            of d. Kerdock sets are optimal codes at d = 16, 64, 256 and 1,024 with all d^2 + 2 d points (Cohn, de Laat &
            Leijenhorst 2024, "Optimality of spherical codes via exact semidefinite programming bounds").
        'optimise': descent from many starts. Its work is rationed: half a minute or less on one core.
        'cross_polytopes': orthogonal bases and their negatives in random orientations, for any size.
        'sgd': the authors' recipe, for comparison.
        'auto': the first three where they are the minimum; elsewhere the better of the best code and 'optimise', as
            measured, where the ration lets 'optimise' evaluate its objective a hundred times; beyond, the code (for
            'uniform' where it is no worse than cross-polytopes), or cross-polytopes where no code is large enough.

    On one machine, with one number of threads, the result depends on the arguments alone; elsewhere rounding may
    differ. The global random states of torch and numpy are neither read nor written. What 'optimise' and 'sgd' made
    (also for 'auto') is kept in the user's cache folder; the environment variable TIMM_DL2PA_CACHE moves it, or, set to
    'off', switches it off.

    Args:
        num_prototypes: K, the number of points, at least 1.
        dim: d, the dimension of the space, at least 1.
        objective: 'uniform' or 'separated'.
        method: One of those above.
        seed: Of the points' own generator: of orientations, of subsets of codes, of the starts of the optimisation.
        return_info: Return a report, too.
        effort: Factor on the work that 'optimise' may do. In 'auto' it also lifts the size up to which it is tried.
        device: Where 'optimise' computes: float64 on the CPU, float32 on a GPU.
        progress: Show a progress bar while 'optimise' and 'sgd' run.
        cache: Look into the cache, and keep what takes long there.

    Returns:
        Unit rows (K, d), float32, on the CPU; with `return_info` a pair of them and a `PrototypeInfo`.

    Raises:
        ValueError: A number is out of range, a name is unknown, or the method has no K points in d dimensions.
    """
    _check(num_prototypes, dim, objective, method, effort)
    makers = _makers(num_prototypes, dim, objective, method, effort, device)
    kept = cache and any(name in _KEPT for name in makers)
    key = dict(num_prototypes=num_prototypes, dim=dim, objective=objective, method=method, seed=seed,
               effort=float(effort), device=torch.device(device).type)
    if kept and (found := read_cached(key)) is not None:
        points, about = found
        return (points, PrototypeInfo(**about['info'], cached=True)) if return_info else points
    points, info = _make(makers, num_prototypes, dim, objective, seed, effort, device, progress)
    if kept:
        about = asdict(info)
        del about['cached']
        write_cached(key, points, {'info': about})
    return (points, info) if return_info else points


def _check(num_points: int, dim: int, objective: str, method: str, effort: float) -> None:
    if num_points < 1 or dim < 1:
        raise ValueError(f'num_prototypes and dim must be at least 1, not {num_points} and {dim}.')
    if dim == 1 and num_points > 2:
        raise ValueError(f'dim=1 has room for 2 distinct unit vectors, not for num_prototypes={num_points}: '
                         f'take dim=2 or more.')
    if objective not in OBJECTIVES:
        raise ValueError(f'objective must be one of {", ".join(OBJECTIVES)}, not {objective!r}.')
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, not {method!r}.')
    if not (effort > 0 and math.isfinite(effort)):
        raise ValueError(f'effort must be positive and finite, not {effort}.')


def _makers(
        num_points: int, dim: int, objective: str, method: str, effort: float, device: torch.device | str,
) -> dict[str, Code | None]:
    """Return the methods to try, codes with what was found for them. Those that give the minimum stand alone."""
    size = f'num_prototypes={num_points} in dim={dim}'
    if method in CODES:
        code = find_code(num_points, dim, method)
        if code is None:
            raise ValueError(f'method={method!r} has no code with {size}: take another method, or a larger dim.')
        return {method: code}
    fits = {
        'simplex': num_points <= dim + 1, 'polygon': dim == 2, 'simplices': dim + 2 <= num_points <= 2 * dim,
        'optimise': num_points >= 2 and dim >= 2, 'sgd': num_points >= 2 and dim >= 2, 'cross_polytopes': True,
    }
    if method != 'auto':
        if not fits[method]:
            needs = {'simplex': 'num_prototypes <= dim + 1', 'polygon': 'dim=2',
                     'simplices': 'dim + 2 <= num_prototypes <= 2 dim'}.get(method, 'at least 2 points and dimensions')
            raise ValueError(f"method={method!r} needs {needs}, not {size}: take method='auto'.")
        return {method: None}
    for closed in ('simplex', 'polygon'):
        if fits[closed]:
            return {closed: None}
    tried: dict[str, Code | None] = {}
    if fits['simplices']:
        tried['simplices'] = None
        if objective == 'separated':
            return tried
    elif (code := best_code(num_points, dim, objective)) is not None:
        tried[code.method] = code
        if objective == 'separated' and _is_optimal(code, num_points, dim):
            return tried
    # What the simplices leave to be gained takes descent that converges.
    needed = _CONVERGENCE if 'simplices' in tried else _FEW_EVALUATIONS
    if affordable_evaluations(num_points, dim, effort, device) >= needed:
        tried['optimise'] = None
    elif not tried or (objective == 'uniform' and 'simplices' not in tried and code.dim < dim
                       and num_points * dim * dim < _CROSS_POLYTOPES):
        # Unlike the code they use all dimensions.
        tried['cross_polytopes'] = None
    return tried


def _is_optimal(code: Code, num_points: int, dim: int) -> bool:
    """Whether a code is proven to have the smallest maximal cosine: by a bound, or, a Kerdock set, by Cohn et al."""
    proven = code.method == 'kerdock' and code.signed and code.size == num_points and dim in (16, 64, 256, 1024)
    return proven or code.max_cosine <= max_cosine_lower_bound(num_points, dim) + 1e-12


def _make(
        makers: dict[str, Code | None],
        num_points: int,
        dim: int,
        objective: str,
        seed: int,
        effort: float,
        device: torch.device | str,
        progress: bool,
) -> tuple[torch.Tensor, PrototypeInfo]:
    began = time.perf_counter()
    found: dict[str, np.ndarray] = {}
    tried: dict[str, float] = {}
    for name, code in makers.items():
        if code is not None:
            # Float64 where descent starts from them, float32 where they may be millions.
            dtype = np.float64 if 'optimise' in makers else np.float32
            found[name] = code_points(code, num_points, dim, seed, dtype)
        elif name == 'optimise':
            starts = list(found.values()) if objective == 'separated' else []
            with _bar(progress, name) as report:
                found[name] = optimise(num_points, dim, objective, seed, starts=starts, effort=effort, device=device,
                                       report=report)
        elif name == 'sgd':
            with _bar(progress, name) as report:
                found[name] = sgd_recipe(num_points, dim, seed, report=report)
        elif name == 'polygon':
            found[name] = regular_polygon(num_points, seed)
        else:
            make = {'simplex': regular_simplex, 'simplices': orthogonal_simplices, 'cross_polytopes': cross_polytopes}
            found[name] = make[name](num_points, dim, seed)
        if len(makers) > 1:
            quality = prototype_quality(torch.from_numpy(found[name]), max_work=_COMPARISON)
            tried[name] = quality.energy if objective == 'uniform' else quality.max_cosine
    # At a tie in all but rounding, the first: a closed form or a code is exact.
    method = next(name for name in found if not tried or tried[name] <= min(tried.values()) + 1e-9)
    code = makers[method]
    info = PrototypeInfo(
        objective=objective,
        method=method,
        seed=seed,
        description=_describe(method, code, num_points, dim),
        theorem=_theorem(method, code, num_points, dim),
        tried=tried,
        seconds=time.perf_counter() - began,
    )
    return torch.from_numpy(found[method]).float(), info


def _theorem(method: str, code: Code | None, num_points: int, dim: int) -> float | None:
    if code is not None:
        return code.max_cosine
    # These attain the bound.
    closed = method in ('simplex', 'polygon', 'simplices') and num_points > 1
    return max_cosine_lower_bound(num_points, dim) if closed else None


def _describe(method: str, code: Code | None, num_points: int, dim: int) -> str:
    if code is not None:
        family = {'kerdock': 'a Kerdock set', 'bch': f'the dual of a {code.degree}-error-correcting BCH code',
                  'weil': f'polynomial phases of degree {code.degree} over {code.dim // 2} elements'}[method]
        return (f'{num_points} of the {code.size} points of {family} in {code.dim} dimensions'
                + (f', put into a random subspace of {dim}' if code.dim < dim else '') + f' ({code.source})')
    return {
        'simplex': 'a regular simplex (Rankin 1955)',
        'polygon': 'a regular polygon',
        'simplices': f'{num_points - dim - 1} opposite pairs and a simplex of {2 * dim + 2 - num_points}, orthogonal '
                     f'to each other (Rankin 1955)',
        'cross_polytopes': 'cross-polytopes in random orientations',
        'optimise': 'L-BFGS from many starts',
        'sgd': "the authors' recipe: 1,000 steps of SGD",
    }[method]


class _bar:
    """A progress bar over the share of the work done, or nothing."""

    def __init__(self, shown: bool, name: str):
        self.shown, self.name = shown, name

    def __enter__(self) -> Callable[[float], None]:
        if not self.shown:
            return lambda share: None
        from tqdm import tqdm
        self.bar = tqdm(total=100, desc=f'prototypes: {self.name}', unit='%',
                        bar_format='{l_bar}{bar}| {elapsed}<{remaining}')

        def report(share: float) -> None:
            if int(100 * share) > self.bar.n:
                self.bar.update(int(100 * share) - self.bar.n)
        return report

    def __exit__(self, *_) -> None:
        if self.shown:
            self.bar.close()
