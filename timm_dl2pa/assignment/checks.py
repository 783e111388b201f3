"""Checks of assignments, and of the arrays that the solvers take."""
import numpy as np
import torch

__all__ = ['MAX_SCORES', 'as_means_and_prototypes', 'check_assignment', 'check_dense_size', 'check_enough_prototypes',
           'restore_whole_numbers']

# `align_prototypes` holds all C x K scores in float64. More than these, 16 GiB, are refused.
MAX_SCORES = 2 ** 31


def check_assignment(assignment: torch.Tensor, num_classes: int, num_prototypes: int) -> None:
    """Check that an assignment is an injection of classes into prototypes.

    Args:
        assignment: The tensor to check. It must be (C,), of an integer dtype, on any device.
        num_classes: C.
        num_prototypes: K.

    Raises:
        ValueError: The shape is not (C,), the dtype is not an integer one, an entry is outside 0..K-1, or two classes
            have the same prototype.
    """
    if not isinstance(assignment, torch.Tensor):
        raise ValueError(f'assignment must be a tensor ({num_classes},) of whole numbers, not a '
                         f'{type(assignment).__name__}: give torch.tensor(...).')
    if tuple(assignment.shape) != (num_classes,):
        raise ValueError(f'assignment must have the shape ({num_classes},), one prototype for each class, '
                         f'not {tuple(assignment.shape)}.')
    if assignment.is_floating_point() or assignment.is_complex() or assignment.dtype == torch.bool:
        raise ValueError(f'assignment must hold whole numbers (int64), not {assignment.dtype}. '
                         f'Assignments cannot be averaged: use the assignment of one checkpoint.')
    outside = (assignment < 0) | (assignment >= num_prototypes)
    if bool(outside.any()):
        label = int(outside.nonzero()[0])
        raise ValueError(f'assignment gives class {label} the prototype {int(assignment[label])}, '
                         f'outside 0..{num_prototypes - 1}.')
    users = torch.bincount(assignment.long(), minlength=num_prototypes)
    if bool((users > 1).any()):
        prototype = int(users.argmax())
        labels = (assignment == prototype).nonzero().flatten().tolist()
        raise ValueError(f'assignment is not an injection: classes {labels[0]} and {labels[1]} share the prototype '
                         f'{prototype}. The average of checkpoints with different assignments looks like this: '
                         f'average only checkpoints with the same assignment.')


def restore_whole_numbers(assignment: torch.Tensor) -> torch.Tensor:
    """Convert a floating-point assignment to int64 if all its values are whole numbers.

    timm's avg_checkpoints.py writes every tensor as float32, also the average of equal assignments.

    Args:
        assignment: (C,), of any dtype.

    Returns:
        (C,) int64, or `assignment` itself if it has another dtype or other values.
    """
    if assignment.is_floating_point() and torch.equal(assignment, assignment.round()):
        return assignment.long()
    return assignment


def as_means_and_prototypes(
        class_means: torch.Tensor | np.ndarray, prototypes: torch.Tensor | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Convert class means and prototypes to float64 arrays of the same dimension.

    Args:
        class_means: (C, d), any real dtype, on any device.
        prototypes: (K, d), any real dtype, on any device.

    Returns:
        The class means (C, d) and the prototypes (K, d), float64.

    Raises:
        ValueError: One of them is not a matrix or has a row that is not finite (the first one is named), or the
            dimensions differ.
    """
    means, points = _as_float64(class_means, 'class_means'), _as_float64(prototypes, 'prototypes')
    if means.shape[1] != points.shape[1]:
        raise ValueError(f'class_means and prototypes must have the same dimension, not {means.shape[1]} and '
                         f'{points.shape[1]}.')
    return means, points


def _as_float64(array: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
    """Return a finite float64 matrix, or raise a ValueError that names the argument."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array if array.is_complex() else array.double()).numpy()
    if np.iscomplexobj(array):
        raise ValueError(f'{name} must be real, not complex.')
    array = np.asarray(array, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f'{name} must have two dimensions, not the shape {array.shape}.')
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ValueError(f'{name} must be finite: row {int(np.flatnonzero(~finite)[0])} is not.')
    return array


def check_enough_prototypes(num_classes: int, num_prototypes: int) -> None:
    """Check that there is a prototype for each class.

    Args:
        num_classes: C.
        num_prototypes: K.

    Raises:
        ValueError: K < C.
    """
    if num_prototypes < num_classes:
        raise ValueError(f'{num_classes} classes need as many prototypes, but there are {num_prototypes}.')


def check_dense_size(num_classes: int, num_prototypes: int) -> None:
    """Check that a dense solver can hold the scores of all classes and prototypes.

    Args:
        num_classes: C.
        num_prototypes: K.

    Raises:
        ValueError: K < C, or C x K is greater than `MAX_SCORES`.
    """
    check_enough_prototypes(num_classes, num_prototypes)
    if num_classes * num_prototypes > MAX_SCORES:
        raise ValueError(f'{num_classes} classes by {num_prototypes} prototypes need '
                         f'{num_classes * num_prototypes / 2 ** 27:.0f} GiB of scores, more than the '
                         f'{MAX_SCORES / 2 ** 27:.0f} GiB that align_prototypes can hold. Use solve_assignment, which '
                         f"does not rotate the prototypes; in training, recipe='placed' or warmup='none'.")
