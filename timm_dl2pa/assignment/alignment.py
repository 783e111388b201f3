"""How the whole prototype set stands: the rotation and the assignment that together fit the class means best."""
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .solve import _as_float64, _check_size

__all__ = ['AlignmentResult', 'align_prototypes']

# Cosines of one round that all restarts together may have, and the most restarts: seconds at a thousand classes.
_WORK = 10 ** 7
_MOST_RESTARTS = 1000
_MOST_ROUNDS = 50
# A restart turns the best rotation by this much of a random one; this share of them begins anywhere.
_TURN = (0.3, 1.0)
_ANEW = 0.1


@dataclass(frozen=True)
class AlignmentResult:
    """What `align_prototypes` found.

    Attributes:
        prototypes: (K, d) float32 on the CPU, the prototypes rotated: just as evenly spread.
        assignment: (C,) int64 on the CPU, the prototype of each class, no two the same.
        objective: `sum_c <m_c, p_a(c)>`.
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
    """Maximise `sum_c <m_c, R p_a(c)>` over the rotations (and reflections) R and the injections a, in turns.

    Any rotation of an evenly spread set is as evenly spread. For a given R, the best assignment is a matching; for a
    given assignment, the best R is the orthogonal Procrustes solution (Schoenemann 1966). Neither step lowers the sum,
    and it ends where neither raises it: a local maximum. So the alternation starts from the prototypes as they stand,
    then again and again from the best end so far, turned at random, and now and then from a random rotation.

    Args:
        class_means: (C, d); rows of zeros have no say. Best seen from their mean: in a
            young network they lie in a narrow cone.
        prototypes: (K, d) unit rows, K >= C.
        restarts: Number of starts, at least 1. Default: 1,000, fewer from 101 classes on (10 at 1,000).
        seed: Of the random rotations' own generator.

    Raises:
        ValueError: Shapes do not fit, something is not finite (the row is named), K < C, or `restarts` is below 1.
    """
    means, points = _as_float64(class_means, 'class_means'), _as_float64(prototypes, 'prototypes')
    if means.shape[1] != points.shape[1]:
        raise ValueError(f'class_means and prototypes must have the same dimension, not {means.shape[1]} and '
                         f'{points.shape[1]}.')
    _check_size(len(means), len(points))
    if restarts is None:
        restarts = max(1, min(_MOST_RESTARTS, _WORK // (len(means) * len(points))))
    if restarts < 1:
        raise ValueError(f'restarts must be at least 1, not {restarts}.')
    generator = np.random.default_rng(seed)
    dim = points.shape[1]
    best = None
    for restart in range(restarts):
        rotation = np.eye(dim)
        if restart:
            rotation = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
            if generator.random() >= _ANEW:
                left, _, right = np.linalg.svd(best[1] + generator.uniform(*_TURN) * rotation)
                rotation = left @ right
        objective = -np.inf
        for _ in range(_MOST_ROUNDS):
            _, assignment = linear_sum_assignment(means @ rotation @ points.T, maximize=True)
            left, singular, right = np.linalg.svd(means.T @ points[assignment])
            rotation = left @ right
            before, objective = objective, singular.sum()
            if objective <= before + 1e-9 * abs(objective):
                break
        if best is None or objective > best[0]:
            best = objective, rotation, assignment
    objective, rotation, assignment = best
    rotated = points @ rotation.T
    return AlignmentResult(torch.from_numpy(rotated / np.linalg.norm(rotated, axis=1, keepdims=True)).float(),
                           torch.from_numpy(assignment), float(objective))
