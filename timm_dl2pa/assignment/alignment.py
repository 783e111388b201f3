"""Rotate the whole prototype set and assign classes to it, to fit the class means best."""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .checks import as_means_and_prototypes, check_dense_size

__all__ = ['AlignmentResult', 'align_prototypes']

# The scores of one round, over all restarts by default: some seconds at 1,000 classes.
_DEFAULT_SCORES = 10 ** 7
_MAX_DEFAULT_RESTARTS = 1000
_MAX_ROUNDS = 50
# A restart perturbs the best rotation by a random one of this weight, or with this probability uses a random one alone.
_PERTURBATION = (0.3, 1.0)
_RANDOM_SHARE = 0.1


@dataclass(frozen=True)
class AlignmentResult:
    """The result of `align_prototypes`.

    Attributes:
        prototypes: (K, d) float32 on the CPU, the rotated prototypes R p_k. They are spread as evenly as the originals.
        assignment: (C,) int64 on the CPU, the prototype of each class. It is an injection.
        objective: The sum of scores, `sum_c <m_c, R p_a(c)>`.

    Example:
        >>> result = align_prototypes(torch.randn(5, 4), make_prototypes(5, 4))
        >>> isinstance(result, AlignmentResult), result.prototypes.shape, result.assignment.shape
        (True, torch.Size([5, 4]), torch.Size([5]))
    """
    prototypes: torch.Tensor
    assignment: torch.Tensor
    objective: float


def align_prototypes(
        class_means: torch.Tensor | np.ndarray,
        prototypes: torch.Tensor | np.ndarray,
        *,
        restarts: int | None = None,
        seed: int = 0,
) -> AlignmentResult:
    """Rotate a prototype set as a whole and assign its prototypes to classes, to fit the class means best.

    It maximises `sum_c <m_c, R p_a(c)>` over the orthogonal matrices R (rotations and reflections) and the injections
    a. A rotated set is spread as evenly as the original one. For a fixed R the best assignment is a matching; for a
    fixed assignment the best R is the orthogonal Procrustes solution (Schoenemann 1966). The two steps alternate until
    neither increases the sum, at a local maximum. The first start is the given orientation. Further starts are random
    perturbations of the best rotation so far, and some are random rotations.

    Args:
        class_means: (C, d), any real dtype, on any device. Rows of zeros have no influence. Subtract the mean over the
            classes first: early in training all embeddings lie in a narrow cone around it.
        prototypes: (K, d) unit rows, K >= C, any real dtype, on any device.
        restarts: The number of starts, at least 1. Default: 1,000, fewer for more than 100 classes (10 for 1,000).
        seed: Seed of a separate generator for the random rotations.

    Returns:
        The rotated prototypes, the assignment and the objective, an `AlignmentResult`.

    Raises:
        ValueError: The shapes do not match, a value is not finite (the row is named), K < C, C x K scores are too many
            to hold (16 GiB), or `restarts` is less than 1.

    Example:
        >>> prototypes = make_prototypes(6, 3)
        >>> class_means = prototypes.flip(0) @ torch.tensor([[0., 1, 0], [1, 0, 0], [0, 0, 1]])
        >>> result = align_prototypes(class_means, prototypes, restarts=20)
        >>> result.prototypes.shape, result.assignment.shape
        (torch.Size([6, 3]), torch.Size([6]))
        >>> matched = solve_assignment(class_means=class_means, prototypes=prototypes)
        >>> result.objective >= matched.objective
        True
    """
    means, points = as_means_and_prototypes(class_means, prototypes)
    check_dense_size(len(means), len(points))
    if restarts is None:
        restarts = max(1, min(_MAX_DEFAULT_RESTARTS, _DEFAULT_SCORES // (len(means) * len(points))))
    if restarts < 1:
        raise ValueError(f'restarts must be at least 1, not {restarts}.')
    generator = np.random.default_rng(seed)
    dim = points.shape[1]
    best = None
    for restart in range(restarts):
        rotation = np.eye(dim)
        if restart:
            rotation = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
            if generator.random() >= _RANDOM_SHARE:
                left, _, right = np.linalg.svd(best[1] + generator.uniform(*_PERTURBATION) * rotation)
                rotation = left @ right
        objective = -np.inf
        for _ in range(_MAX_ROUNDS):
            _, assignment = linear_sum_assignment(means @ rotation @ points.T, maximize=True)
            left, singular, right = np.linalg.svd(means.T @ points[assignment])
            rotation = left @ right
            previous, objective = objective, singular.sum()
            if objective <= previous + 1e-9 * abs(objective):
                break
        if best is None or objective > best[0]:
            best = objective, rotation, assignment
    objective, rotation, assignment = best
    rotated = points @ rotation.T
    return AlignmentResult(torch.from_numpy(rotated / np.linalg.norm(rotated, axis=1, keepdims=True)).float(),
                           torch.from_numpy(assignment), float(objective))
