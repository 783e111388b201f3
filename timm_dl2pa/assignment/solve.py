"""Assign classes to prototypes: the injection that maximises the sum of scores."""
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .checks import as_means_and_prototypes, check_assignment, check_enough_prototypes
from .matching import Products, Scores, Table, best_matching

__all__ = ['AssignmentResult', 'solve_assignment']

# Earlier prices that exceed the scores by this factor belong to other scores, and would cost precision.
_MAX_PRICE_RATIO = 2.0 ** 10
# The least gain of an exchange, relative to the magnitude of its scores: larger than rounding errors.
_LEAST_GAIN = 1e-12


@dataclass(frozen=True)
class AssignmentResult:
    """The result of `solve_assignment`.

    Attributes:
        assignment: (C,) int64 on the CPU, the prototype of each class. It is an injection.
        moved: The number of classes whose prototype differs from the one in `start`.
        objective_before: The sum of scores of `start`.
        objective: The sum of scores of `assignment`. It is the maximum if `exact`.
        bound: An upper bound on the sum of scores, up to rounding, of every assignment that keeps the pinned classes.
        prices: (K,) float64 on the CPU, the dual prices v that prove the bound; `matching.best_matching` states the
            inequality. Pinned classes, their prototypes and classes without a preference do not take part in it. None
            if there is no proof.
        exact: Whether the assignment is proven optimal, up to rounding.

    Example:
        >>> result = solve_assignment(torch.tensor([[1., 2.], [1., 4.]]), start=torch.tensor([1, 0]))
        >>> isinstance(result, AssignmentResult), result.assignment.tolist(), result.moved
        (True, [0, 1], 2)
        >>> result.objective_before, result.objective, result.gap
        (3.0, 5.0, 0.0)
    """
    assignment: torch.Tensor
    moved: int
    objective_before: float
    objective: float
    bound: float = float('inf')
    prices: torch.Tensor | None = None
    exact: bool = False

    @property
    def gap(self) -> float:
        """The most by which the maximum can exceed `objective`, relative to the magnitude of `objective`."""
        return 0.0 if self.exact else (self.bound - self.objective) / max(abs(self.objective), 5e-324)


def _as_score_matrix(scores: Any) -> torch.Tensor:
    """Return scores (C, K) as a tensor of the same dtype, on the CPU or a CUDA device."""
    if not isinstance(scores, torch.Tensor):
        scores = torch.from_numpy(np.require(scores, requirements=('C', 'W')))
    if scores.ndim != 2:
        raise ValueError(f'scores must have two dimensions, not the shape {tuple(scores.shape)}.')
    return scores.detach() if scores.is_cuda else scores.detach().cpu()


def _make_scores(scores: Any, class_means: Any, prototypes: Any) -> Scores:
    """Return the scores in the form that the solver takes, checked."""
    if (scores is None) == (class_means is None) or (class_means is None) != (prototypes is None):
        raise ValueError('solve_assignment takes either scores, or class_means and prototypes.')
    if scores is not None:
        matrix = _as_score_matrix(scores)
        check_enough_prototypes(*matrix.shape)
        table = Table(matrix)
        if not np.isfinite(table.ceiling).all():
            raise ValueError(f'scores must be finite: row {int(np.flatnonzero(~np.isfinite(table.ceiling))[0])} '
                             f'is not.')
        return table
    device = next((array.device for array in (prototypes, class_means)
                   if isinstance(array, torch.Tensor) and array.is_cuda), 'cpu')
    means, points = as_means_and_prototypes(class_means, prototypes)
    check_enough_prototypes(len(means), len(points))
    return Products(means, points, device)


def _read_start(start: Any, num_classes: int, num_prototypes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the assignment (C,) to start from, and the prices (K,) of an earlier result, if any."""
    prices = None
    if isinstance(start, AssignmentResult):
        start, prices = start.assignment, start.prices
    start = torch.arange(num_classes) if start is None else torch.as_tensor(start).detach().cpu()
    check_assignment(start, num_classes, num_prototypes)
    if prices is not None and tuple(prices.shape) != (num_prototypes,):
        raise ValueError(f'start has prices for {len(prices)} prototypes, but there are {num_prototypes}: give '
                         f'start.assignment instead.')
    return start.long().numpy(), None if prices is None else prices.double().cpu().numpy()


def _read_pinned(pinned: Any, num_classes: int) -> np.ndarray:
    """Return the mask (C,) of pinned classes."""
    if pinned is None:
        return np.zeros(num_classes, bool)
    pinned = torch.as_tensor(pinned).detach().cpu()
    if pinned.dtype != torch.bool or tuple(pinned.shape) != (num_classes,):
        raise ValueError(f'pinned must be a mask ({num_classes},) of dtype bool, one entry for each class, not '
                         f'{tuple(pinned.shape)} of {pinned.dtype}.')
    return pinned.numpy()


def solve_assignment(
        scores: torch.Tensor | np.ndarray | None = None,
        *,
        class_means: torch.Tensor | np.ndarray | None = None,
        prototypes: torch.Tensor | np.ndarray | None = None,
        start: torch.Tensor | np.ndarray | AssignmentResult | None = None,
        pinned: torch.Tensor | np.ndarray | None = None,
        time_budget: float | None = None,
) -> AssignmentResult:
    """Assign classes to prototypes: maximise the sum of scores `sum_c scores[c, a(c)]`, with a proof of optimality.

    The assignment a is an injection of C classes into K >= C prototypes. With `class_means` and `prototypes` the scores
    are their inner products: the matching step of DL2PA. The C x K scores are then never held all at once, so that
    100,000 classes are feasible (see `matching.best_matching`). A good start saves work. If it is already optimal and
    its prices are given, a single pass over all pairs proves it.

    A class whose scores are all equal has no preference; this includes a class without samples, whose mean is zero. It
    keeps its prototype of `start` unless a class with a preference is assigned to it. Ties favour `start`: classes
    exchange their prototypes only if their joint gain exceeds rounding (1e-12 of the magnitude of their scores).

    Args:
        scores: (C, K), any real dtype, on any device. Give either these, or `class_means` and `prototypes`.
        class_means: (C, d), any real dtype, the mean direction of each class; zero for a class without samples.
        prototypes: (K, d) unit rows, any real dtype. If they or the means are on a GPU, the passes over all pairs run
            there.
        start: The current assignment (C,), of an integer dtype, or an earlier result. The prices of an earlier result
            save work if the scores have changed little. Default: class c has prototype c.
        pinned: (C,) bool, the classes that keep their prototype of `start` at any cost. Default: none.
        time_budget: The time limit in seconds. After it, the best assignment so far is returned, with a bound on its
            gap to the maximum; where even a subproblem takes too long, it is matched greedily. Preparations and the
            last step may exceed the limit a little. Default: no limit; the result is optimal.

    Returns:
        The assignment, its objective and that of `start`, and the bound and prices that prove its quality, an
        `AssignmentResult`.

    Raises:
        ValueError: The shapes do not match, a value is not finite (the row is named), K < C, `start` is not an
            injection, its prices are for another K, `pinned` is not a mask, or `time_budget` is not positive.

    Example:
        >>> prototypes = make_prototypes(10, 8)
        >>> class_means = prototypes.flip(0) + 0.1 * torch.randn(10, 8)
        >>> result = solve_assignment(class_means=class_means, prototypes=prototypes)
        >>> result.exact
        True
        >>> again = solve_assignment(class_means=class_means, prototypes=prototypes, start=result)
        >>> again.moved
        0
    """
    began = time.monotonic()
    if time_budget is not None and not time_budget > 0:
        raise ValueError(f'time_budget must be a positive number of seconds or None, not {time_budget!r}.')
    source = _make_scores(scores, class_means, prototypes)
    num_classes, num_prototypes = source.shape
    start, prices = _read_start(start, num_classes, num_prototypes)
    pinned = _read_pinned(pinned, num_classes)
    if prices is not None and not np.abs(prices / source.unit).max() < _MAX_PRICE_RATIO:
        prices = None  # of other scores, or not finite

    classes = np.arange(num_classes)
    no_preference = source.indifferent() & ~pinned
    matched = np.flatnonzero(~no_preference & ~pinned)
    is_available = np.ones(num_prototypes, bool)
    is_available[start[pinned]] = False
    available = np.flatnonzero(is_available)
    before = source.pairs(classes, start)
    assignment = start.copy()
    found_prices, bound, exact = np.zeros(num_prototypes), 0.0, True
    if len(matched):
        all_take_part = len(matched) == num_classes and len(available) == num_prototypes
        found = best_matching(
            source if all_take_part else source.part(matched, available),
            np.searchsorted(available, start[matched]),
            None if prices is None else prices[available] / source.unit,
            began + (float('inf') if time_budget is None else time_budget))
        assignment[matched] = available[found.assignment]
        found_prices[available], bound, exact = found.prices, found.bound, found.exact
        assignment = _undo_exchanges_without_gain(
            start, assignment, before, source.pairs(classes, assignment), num_prototypes)
    assignment = _reassign_displaced(assignment, start, np.flatnonzero(no_preference), matched, is_available)

    after = source.pairs(classes, assignment)
    objective = float(after.sum())
    bound = max(objective, bound + float(after[no_preference].sum() + after[pinned].sum()))
    return AssignmentResult(
        assignment=torch.from_numpy(assignment),
        moved=int((assignment != start).sum()),
        objective_before=float(before.sum()) * source.unit,
        objective=objective * source.unit,
        bound=bound * source.unit,
        prices=torch.from_numpy(found_prices * source.unit),
        exact=exact,
    )


def _undo_exchanges_without_gain(
        start: np.ndarray, assignment: np.ndarray, before: np.ndarray, after: np.ndarray, num_prototypes: int
) -> np.ndarray:
    """Return the assignment without the exchanges that gain nothing.

    Two assignments differ by disjoint exchanges: cycles of classes, or chains that end at a spare prototype. Each
    exchange can be undone independently.

    Args:
        start: (C,), the assignment before.
        assignment: (C,), the assignment after.
        before: (C,), the score of each class in `start`.
        after: (C,), the score of each class in `assignment`.
        num_prototypes: K.
    """
    moved = np.flatnonzero(assignment != start)
    if not len(moved):
        return assignment
    links = coo_array((np.ones(len(moved)), (start[moved], assignment[moved])), shape=(num_prototypes,) * 2)
    exchange = connected_components(links, directed=False)[1][start[moved]]
    gain = np.bincount(exchange, after[moved] - before[moved])
    magnitude = np.bincount(exchange, np.abs(after[moved]) + np.abs(before[moved]))
    undone = moved[(gain <= _LEAST_GAIN * magnitude)[exchange]]
    assignment = assignment.copy()
    assignment[undone] = start[undone]
    return assignment


def _reassign_displaced(
        assignment: np.ndarray, start: np.ndarray, no_preference: np.ndarray, matched: np.ndarray,
        is_available: np.ndarray,
) -> np.ndarray:
    """Return the assignment with free prototypes for the classes without a preference that lost theirs.

    Args:
        assignment: (C,), in which a matched class may have the prototype of a class without a preference.
        start: (C,), the assignment before.
        no_preference: Indices of the classes without a preference.
        matched: Indices of the classes that were matched.
        is_available: (K,) bool, the prototypes that no pinned class has.
    """
    is_free = is_available.copy()
    is_free[assignment[matched]] = False
    displaced = no_preference[~is_free[start[no_preference]]]
    is_free[start[no_preference]] = False
    assignment = assignment.copy()
    assignment[displaced] = np.flatnonzero(is_free)[:len(displaced)]
    return assignment
