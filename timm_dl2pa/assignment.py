"""Who stands where: the bijection of classes and prototypes that maximises the sum of their scores."""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

__all__ = ['MAX_SCORES', 'AssignmentResult', 'check_assignment', 'solve_assignment']

# The exact solver holds all C x K scores in float64; more than this many (16 GiB) are refused.
MAX_SCORES = 2 ** 31


@dataclass(frozen=True)
class AssignmentResult:
    """What `solve_assignment` found.

    Attributes:
        assignment: (C,) int64 on the CPU, the prototype of each class, no two the same.
        moved: Number of classes whose prototype differs from the start's.
        objective_before: Sum of scores of the start.
        objective: Sum of scores of `assignment`: the maximum.
    """
    assignment: torch.Tensor
    moved: int
    objective_before: float
    objective: float


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


def solve_assignment(
        scores: torch.Tensor | np.ndarray | None = None,
        *,
        class_means: torch.Tensor | np.ndarray | None = None,
        prototypes: torch.Tensor | np.ndarray | None = None,
        start: torch.Tensor | np.ndarray | None = None,
) -> AssignmentResult:
    """Maximise `sum_c scores[c, a(c)]` over all injections a of C classes into K >= C prototypes, exactly.

    With `class_means` and `prototypes` the scores are their inner products: the matching step of DL2PA. Solved by
    scipy's shortest augmenting paths (Crouse 2016) on a dense float64 matrix.

    A class whose scores are all the same has no preference. So has a class that was never seen, whose mean is zero. It
    keeps its prototype of `start` unless a class with a preference takes that one. Where the maximum is no better than
    `start` beyond rounding (1e-12 of the scores' magnitude), `start` is the answer. Where it is better, ties are broken
    as the solver happens to.

    Args:
        scores: (C, K), any real dtype, on any device. Either this or the next two.
        class_means: (C, d), the mean direction of each class; zero for a class not seen.
        prototypes: (K, d), unit rows.
        start: (C,), whole numbers, the assignment in force. Default: class c on prototype c.

    Returns:
        The optimal assignment, with its objective and the start's.

    Raises:
        ValueError: Shapes do not fit, something is not finite (the row is named), K < C, `start` is no injection, or
            C * K is over `MAX_SCORES`.
    """
    if (scores is None) == (class_means is None) or (class_means is None) != (prototypes is None):
        raise ValueError('solve_assignment takes either scores, or class_means and prototypes.')
    if scores is not None:
        scores = _as_float64(scores, 'scores')
    else:
        class_means = _as_float64(class_means, 'class_means')
        prototypes = _as_float64(prototypes, 'prototypes')
        if class_means.shape[1] != prototypes.shape[1]:
            raise ValueError(f'class_means and prototypes must have the same dimension, not {class_means.shape[1]} '
                             f'and {prototypes.shape[1]}.')
        _check_size(len(class_means), len(prototypes))
        scores = class_means @ prototypes.T
    num_classes, num_prototypes = scores.shape
    _check_size(num_classes, num_prototypes)

    if start is None:
        start = torch.arange(num_classes)
    start = torch.as_tensor(start).detach().cpu()
    check_assignment(start, num_classes, num_prototypes)
    start = start.long().numpy()

    everyone = np.arange(num_classes)
    choosy = np.flatnonzero(scores.max(axis=1) > scores.min(axis=1))
    assignment = start.copy()
    # Indexing by all rows would copy the matrix.
    _, assignment[choosy] = linear_sum_assignment(
        scores if len(choosy) == num_classes else scores[choosy], maximize=True)
    taken = np.zeros(num_prototypes, dtype=bool)
    taken[assignment[choosy]] = True
    indifferent = np.setdiff1d(everyone, choosy, assume_unique=True)
    displaced = indifferent[taken[start[indifferent]]]
    taken[start[indifferent]] = True
    assignment[displaced] = np.flatnonzero(~taken)[:len(displaced)]

    before, after = scores[everyone, start], scores[everyone, assignment]
    objective_before, objective = float(before.sum()), float(after.sum())
    if objective - objective_before <= 1e-12 * np.abs(after).sum():
        assignment, objective = start, objective_before
    return AssignmentResult(
        assignment=torch.from_numpy(assignment),
        moved=int((assignment != start).sum()),
        objective_before=objective_before,
        objective=objective,
    )


def _check_size(num_classes: int, num_prototypes: int) -> None:
    if num_prototypes < num_classes:
        raise ValueError(f'{num_classes} classes need as many prototypes, but there are {num_prototypes}.')
    if num_classes * num_prototypes > MAX_SCORES:
        raise ValueError(f'{num_classes} classes by {num_prototypes} prototypes need '
                         f'{num_classes * num_prototypes / 2 ** 27:.0f} GiB of scores, more than the exact solver '
                         f'takes ({MAX_SCORES / 2 ** 27:.0f} GiB). Keep the assignment static (stop=0).')
