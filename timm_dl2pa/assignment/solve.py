"""Who stands where: the bijection of classes and prototypes that maximises the sum of their scores."""
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .matching import Products, Scores, Table, best_matching

__all__ = ['MAX_SCORES', 'AssignmentResult', 'check_assignment', 'solve_assignment']

# Prices that are this many times larger than the scores are not of these, and would cost digits.
_LARGEST_PRICE = 2.0 ** 10
# The rotation of the prototypes (`align_prototypes`) holds all C x K scores in float64; more (16 GiB) are refused.
MAX_SCORES = 2 ** 31


@dataclass(frozen=True)
class AssignmentResult:
    """What `solve_assignment` found.

    Attributes:
        assignment: (C,) int64 on the CPU, the prototype of each class, no two the same.
        moved: Number of classes whose prototype differs from the start's.
        objective_before: Sum of scores of the start.
        objective: Sum of scores of `assignment`: the maximum, where `exact`.
        bound: No assignment has a larger sum of scores. (It keeps what was pinned, and to rounding.)
        prices: (K,) float64 on the CPU, the dual prices v that prove the bound (`matching.best_matching` has the
            inequality; pinned classes and those without a preference, with the prototypes that are pinned, stay out of
            it). None where nothing was proven.
        exact: Whether the assignment is proven optimal, to rounding.
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
        """By how much the maximum may be larger than `objective`, as a share of the latter's magnitude."""
        return 0.0 if self.exact else (self.bound - self.objective) / max(abs(self.objective), 5e-324)


def check_assignment(assignment: torch.Tensor, num_classes: int, num_prototypes: int) -> None:
    """Raise a ValueError unless `assignment` gives each of C classes one of K prototypes, and none to two."""
    if tuple(assignment.shape) != (num_classes,):
        raise ValueError(f'assignment must have the shape ({num_classes},), one prototype a class, '
                         f'not {tuple(assignment.shape)}.')
    if assignment.is_floating_point() or assignment.is_complex() or assignment.dtype == torch.bool:
        raise ValueError(f'assignment must hold whole numbers (int64), not {assignment.dtype}. '
                         f'Assignments cannot be averaged: take that of one checkpoint.')
    outside = (assignment < 0) | (assignment >= num_prototypes)
    if bool(outside.any()):
        label = int(outside.nonzero()[0])
        raise ValueError(f'assignment gives class {label} the prototype {int(assignment[label])}, '
                         f'outside 0..{num_prototypes - 1}.')
    users = torch.bincount(assignment.long(), minlength=num_prototypes)
    if bool((users > 1).any()):
        prototype = int(users.argmax())
        labels = (assignment == prototype).nonzero().flatten().tolist()
        raise ValueError(f'assignment is no injection: classes {labels[0]} and {labels[1]} share the prototype '
                         f'{prototype}. An average of checkpoints with different assignments looks like this: '
                         f'average only those that agree.')


def restore_whole_numbers(assignment: torch.Tensor) -> torch.Tensor:
    """Return a floating-point assignment as int64 where its numbers are whole, and anything else as it is.

    timm's avg_checkpoints.py writes everything as float32, the average of equal assignments too.
    """
    if assignment.is_floating_point() and torch.equal(assignment, assignment.round()):
        return assignment.long()
    return assignment


def _as_float64(array: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().to('cpu', torch.float64).numpy()
    array = np.asarray(array, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f'{name} must have two dimensions, not the shape {array.shape}.')
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ValueError(f'{name} must be finite: row {int(np.flatnonzero(~finite)[0])} is not.')
    return array


def _as_table(scores: Any) -> torch.Tensor:
    """Return scores as a tensor in whatever dtype they have, on the CPU or a CUDA device."""
    if not isinstance(scores, torch.Tensor):
        scores = torch.from_numpy(np.require(scores, requirements=('C', 'W')))
    if scores.ndim != 2:
        raise ValueError(f'scores must have two dimensions, not the shape {tuple(scores.shape)}.')
    return scores.detach() if scores.is_cuda else scores.detach().cpu()


def _scores_of(scores: Any, class_means: Any, prototypes: Any) -> Scores:
    if (scores is None) == (class_means is None) or (class_means is None) != (prototypes is None):
        raise ValueError('solve_assignment takes either scores, or class_means and prototypes.')
    if scores is not None:
        table = _as_table(scores)
        _check_enough(*table.shape)
        table = Table(table)
        if not np.isfinite(table.ceiling).all():
            raise ValueError(f'scores must be finite: row {int(np.flatnonzero(~np.isfinite(table.ceiling))[0])} '
                             f'is not.')
        return table
    device = next((array.device for array in (prototypes, class_means)
                   if isinstance(array, torch.Tensor) and array.is_cuda), 'cpu')
    means, points = _as_float64(class_means, 'class_means'), _as_float64(prototypes, 'prototypes')
    if means.shape[1] != points.shape[1]:
        raise ValueError(f'class_means and prototypes must have the same dimension, not {means.shape[1]} '
                         f'and {points.shape[1]}.')
    _check_enough(len(means), len(points))
    return Products(means, points, device)


def _start_of(
        start: Any, num_classes: int, num_prototypes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the assignment to start from, and its prices if it has any."""
    prices = None
    if isinstance(start, AssignmentResult):
        start, prices = start.assignment, start.prices
    start = torch.arange(num_classes) if start is None else torch.as_tensor(start).detach().cpu()
    check_assignment(start, num_classes, num_prototypes)
    if prices is not None and tuple(prices.shape) != (num_prototypes,):
        raise ValueError(f'start has prices for {len(prices)} prototypes, but there are {num_prototypes}: give its '
                         f'assignment alone.')
    return start.long().numpy(), None if prices is None else prices.double().cpu().numpy()


def _pins_of(pinned: Any, num_classes: int) -> np.ndarray:
    if pinned is None:
        return np.zeros(num_classes, bool)
    pinned = torch.as_tensor(pinned).detach().cpu()
    if pinned.dtype != torch.bool or tuple(pinned.shape) != (num_classes,):
        raise ValueError(f'pinned must be a mask ({num_classes},) of dtype bool, one entry a class, not '
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
    """Maximise `sum_c scores[c, a(c)]` over all injections a of C classes into K >= C prototypes, with a proof.

    With `class_means` and `prototypes` the scores are their inner products: the matching step of DL2PA. They are never
    all held at once (`matching.best_matching` says how), which is what makes 100,000 classes possible. The better the
    start, the less there is to do; where it is the optimum and its prices are given, one pass over the pairs proves it.

    A class whose scores are all the same has no preference. So has a class that was never seen, whose mean is zero. It
    keeps its prototype of `start` unless a class with a preference takes that one. The assignment in force wins ties:
    classes that exchange their prototypes do so only if that gains them, together, more than rounding (1e-12 of their
    scores' magnitude).

    Args:
        scores: (C, K), any real dtype, on any device. Either this or the next two.
        class_means: (C, d), the mean direction of each class; zero for a class not seen.
        prototypes: (K, d), unit rows. Where these or the means are on a GPU, the passes over all pairs are made there.
        start: The assignment in force, (C,) whole numbers, or an earlier result, whose prices are of help where the
            scores have changed little. Default: class c on prototype c.
        pinned: (C,) bool, classes that keep their prototype of `start` whatever it costs. Default: none.
        time_budget: Seconds after which the best assignment found so far is returned, with the bound on what it may
            lack. The last step of it is not cut short. Default: no limit, the answer is optimal.

    Returns:
        The assignment, its objective and the start's, and the bound and prices that prove how good it is.

    Raises:
        ValueError: Shapes do not fit, something is not finite (the row is named), K < C, `start` is no injection, its
            prices are for another K, `pinned` is no mask, or `time_budget` is not positive.
    """
    began = time.monotonic()
    if time_budget is not None and not time_budget > 0:
        raise ValueError(f'time_budget must be a positive number of seconds or None, not {time_budget!r}.')
    source = _scores_of(scores, class_means, prototypes)
    num_classes, num_prototypes = source.shape
    start, prices = _start_of(start, num_classes, num_prototypes)
    pinned = _pins_of(pinned, num_classes)
    if prices is not None and not np.abs(prices / source.unit).max() < _LARGEST_PRICE:
        prices = None  # of other scores, or not finite: of no help

    everyone = np.arange(num_classes)
    idle = source.indifferent() & ~pinned
    choosy = np.flatnonzero(~idle & ~pinned)
    open_to_all = np.ones(num_prototypes, bool)
    open_to_all[start[pinned]] = False
    columns = np.flatnonzero(open_to_all)
    before = source.pairs(everyone, start)
    assignment = start.copy()
    found_prices, bound, exact = np.zeros(num_prototypes), 0.0, True
    if len(choosy):
        whole = len(choosy) == num_classes
        found = best_matching(
            source if whole and len(columns) == num_prototypes else source.part(choosy, columns),
            np.searchsorted(columns, start[choosy]),
            None if prices is None else prices[columns] / source.unit,
            began + (float('inf') if time_budget is None else time_budget))
        assignment[choosy] = columns[found.assignment]
        found_prices[columns], bound, exact = found.prices, found.bound, found.exact
        assignment = _without_idle_moves(start, assignment, before, source.pairs(everyone, assignment), num_prototypes)
    assignment = _make_room(assignment, start, np.flatnonzero(idle), choosy, open_to_all)

    after = source.pairs(everyone, assignment)
    objective = float(after.sum())
    bound = max(objective, bound + float(after[idle].sum() + after[pinned].sum()))
    return AssignmentResult(
        assignment=torch.from_numpy(assignment),
        moved=int((assignment != start).sum()),
        objective_before=float(before.sum()) * source.unit,
        objective=objective * source.unit,
        bound=bound * source.unit,
        prices=torch.from_numpy(found_prices * source.unit),
        exact=exact,
    )


def _without_idle_moves(
        start: np.ndarray, assignment: np.ndarray, before: np.ndarray, after: np.ndarray, num_prototypes: int
) -> np.ndarray:
    """Return the assignment without the exchanges that gain nothing.

    Two assignments differ in exchanges, cycles of classes or chains that end at a spare prototype, which do not touch
    each other: each may be undone by itself.
    """
    moved = np.flatnonzero(assignment != start)
    links = coo_array((np.ones(len(moved)), (start[moved], assignment[moved])), shape=(num_prototypes,) * 2)
    exchange = connected_components(links, directed=False)[1][start[moved]]
    gain = np.bincount(exchange, after[moved] - before[moved])
    magnitude = np.bincount(exchange, np.abs(after[moved]) + np.abs(before[moved]))
    undone = moved[(gain <= 1e-12 * magnitude)[exchange]]
    assignment = assignment.copy()
    assignment[undone] = start[undone]
    return assignment


def _make_room(assignment: np.ndarray, start: np.ndarray, idle: np.ndarray, choosy: np.ndarray,
               open_to_all: np.ndarray) -> np.ndarray:
    """Return the assignment with the idle classes whose prototypes were taken on the first that are left."""
    left = open_to_all.copy()
    left[assignment[choosy]] = False
    displaced = idle[~left[start[idle]]]
    left[start[idle]] = False
    assignment = assignment.copy()
    assignment[displaced] = np.flatnonzero(left)[:len(displaced)]
    return assignment


def _check_enough(num_classes: int, num_prototypes: int) -> None:
    if num_prototypes < num_classes:
        raise ValueError(f'{num_classes} classes need as many prototypes, but there are {num_prototypes}.')


def _check_size(num_classes: int, num_prototypes: int) -> None:
    """Raise a ValueError unless K >= C and a dense solver can hold the scores."""
    _check_enough(num_classes, num_prototypes)
    if num_classes * num_prototypes > MAX_SCORES:
        raise ValueError(f'{num_classes} classes by {num_prototypes} prototypes need '
                         f'{num_classes * num_prototypes / 2 ** 27:.0f} GiB of scores, more than is held at once '
                         f'({MAX_SCORES / 2 ** 27:.0f} GiB). Leave the warm-up out (warmup=0).')
