"""Where `prime` puts prototypes, and the linear map that brings features to them."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..assignment import align_prototypes
from ..head import DL2PAHead
from ..prototypes.energy import UNIFORMITY, block_rows
from .discriminant import Discriminant, Moments, best_scale

__all__ = ['Priming', 'embedding_map', 'held_out', 'held_out_features', 'place_at_means', 'place_prototypes']

# Ridge of the map from unit class directions to prototypes, in units of one class's weight; and how much the energy of
# the class prototypes counts beside their distance from the projected class directions. Of the values 0.3 to 10 and 0
# to 16 they were the best, or within a point of it, on CIFAR-100 and GroceryStore at d = 16 to 64.
_RIDGE = 1.0
_SPREAD = 1.0
_SPREAD_STEPS = 40
_SPREAD_RATE = 0.13
# Pairs of classes whose energy one step counts: all up to 4,096 classes, beyond it of all classes with one block after
# the other, of 64 classes at least.
_SPREAD_PAIRS = 2 ** 24
# How far cosines between class prototypes may be from those of a simplex.
_TOLERANCE = 1e-4
# Scores of all restarts of a rotation.
_ALIGNMENT_SCORES = 3 * 10 ** 5


@dataclass(frozen=True)
class Priming:
    """Assignment and prototypes for the classes of some features.

    Attributes:
        assignment: (C,) int64 on the CPU.
        prototypes: (K, d) float32 on the CPU.
        is_simplex: Whether the class prototypes are equally far from one another.
        is_placed: Whether they were put where the class directions are.
    """
    assignment: torch.Tensor
    prototypes: torch.Tensor
    is_simplex: bool = False
    is_placed: bool = False

    @property
    def class_prototypes(self) -> torch.Tensor:
        """(C, d) float64."""
        return self.prototypes[self.assignment].double()


def place_prototypes(head: DL2PAHead, discriminant: Discriminant) -> Priming:
    """Return assignment and prototypes for the classes of a discriminant.

    Class prototypes that form a simplex, as in d >= C - 1, are equally far from one another: nothing is to be chosen.
    Elsewhere the class directions are projected onto the d directions in which they, as unit vectors, have the largest
    sum of squares. With the recipe 'placed' the projections t_c, spread by the paper's energy U (Eq. 4-5), are the
    prototypes: the least `sum_c |v_c - t_c|^2 + C U(v)`. With the others the set is rotated as a whole and assigned to
    them (`align_prototypes`). Those of a pinned head stay.

    Args:
        head: Whose prototypes and recipe count.
        discriminant: Of its features.
    """
    prototypes, assignment = head.prototypes.cpu(), head.assignment.cpu()
    is_simplex = _is_simplex(prototypes[assignment])
    if is_simplex or head.config.pinned:
        return Priming(assignment, prototypes, is_simplex=is_simplex)
    projected = _projected(discriminant.directions, head.dim)
    if head.config.recipe == 'placed':
        placed = prototypes.index_copy(0, assignment, _spread(F.normalize(projected, dim=1)).float())
        return Priming(assignment, placed, is_placed=True)
    return _aligned(projected, prototypes)


def _aligned(means: torch.Tensor, prototypes: torch.Tensor) -> Priming:
    restarts = max(1, min(200, _ALIGNMENT_SCORES // (len(means) * len(prototypes))))
    aligned = align_prototypes(means, prototypes, restarts=restarts)
    return Priming(aligned.assignment, aligned.prototypes)


def place_at_means(head: DL2PAHead, moments: Moments) -> Priming:
    """Return assignment and prototypes for a head without a neck, whose features are the embeddings.

    With the recipe 'placed' the prototypes are the directions of the class means. With the others the set is rotated as
    a whole and assigned to them. Those of a pinned head stay.

    Args:
        head: Whose prototypes and recipe count.
        moments: Of its features.
    """
    prototypes, assignment, seen = head.prototypes.cpu(), head.assignment.cpu(), moments.seen
    if head.config.pinned:
        return Priming(assignment, prototypes)
    means = torch.where(seen.unsqueeze(1), F.normalize(moments.means + moments.centre, dim=1), 0.0)
    if head.config.recipe != 'placed':
        return _aligned(means, prototypes)
    return Priming(assignment, prototypes.index_copy(0, assignment[seen], means[seen].float()), is_placed=True)


def _is_simplex(points: torch.Tensor) -> bool:
    if len(points) > points.shape[1] + 1:
        return False
    # The rows of a simplex add up to zero, and all have the cosine -1 / (C - 1) with each other.
    cosines = points @ points.t() + 1 / (len(points) - 1)
    return bool((cosines.fill_diagonal_(0).abs() <= _TOLERANCE).all())


def _projected(directions: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the coordinates (C, d) of rows (C, F) along their d leading right singular vectors, by subspace iteration.

    (A full decomposition takes LAPACK a minute where its threads compete with others for two cores.)
    """
    gram = directions.t() @ directions
    width = min(dim, len(gram))
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(gram), min(width + 16, len(gram)), generator=generator, dtype=torch.float64)
    for _ in range(8):
        basis = _orthonormal(gram @ _orthonormal(basis))
    inner = basis.t() @ gram @ basis
    vectors = torch.linalg.eigh(inner).eigenvectors
    basis = basis @ vectors.flip(1)[:, :width]
    return F.pad(directions @ basis, (0, dim - width))


def _orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the columns, by Cholesky's factor of their products, twice."""
    for _ in range(2):
        products = basis.t() @ basis
        jitter = 1e-13 * products.trace() * torch.eye(len(products), dtype=basis.dtype)
        basis = torch.linalg.solve_triangular(torch.linalg.cholesky(products + jitter), basis.t(), upper=False).t()
    return basis


def _spread(targets: torch.Tensor) -> torch.Tensor:
    """Return unit rows near unit targets (C, d), kept apart by the paper's energy."""
    known = targets.norm(dim=1, keepdim=True) > 0.5  # classes that were not seen have no direction of their own
    generator = torch.Generator().manual_seed(0)
    drawn = F.normalize(torch.randn(targets.shape, generator=generator, dtype=targets.dtype), dim=1)
    points = torch.where(known, targets, drawn).float()
    targets = targets.float()
    block = min(len(points), max(64, _SPREAD_PAIRS // len(points)))
    for step in range(_SPREAD_STEPS):
        others = (torch.arange(block) + step * block) % len(points)
        push = 0.5 * _SPREAD * len(points) * _energy_gradient(points, others)
        pull = torch.where(known, targets - points, 0.0)
        points = F.normalize(points + _SPREAD_RATE * (pull - push), dim=1)
    return points.double()


def _energy_gradient(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the gradient (C, d) of the paper's energy, by all points or, as an estimate, by those numbered."""
    chosen, total, gradient = points[others], 0.0, torch.empty_like(points)
    for rows in block_rows(len(points), len(chosen)):
        kernel = (UNIFORMITY * (points[rows] @ chosen.t() - 1)).exp_()
        own = ((others >= rows.start) & (others < rows.stop)).nonzero().squeeze(1)
        kernel[others[own] - rows.start, own] = 0.0
        total += float(kernel.sum())
        gradient[rows] = kernel @ chosen
    return gradient.mul_(2 * UNIFORMITY / total)


def embedding_map(discriminant: Discriminant, priming: Priming) -> torch.Tensor:
    """Return the weight (d, C) of the map from the discriminant's scores to embeddings.

    For a simplex it is `P_a^T`: the cosine with a class's prototype then grows with its score alone, so that the head
    classifies as the discriminant does. Otherwise it is the ridge regression of the prototypes on the unit class
    directions, `P_a^T (T T^T + I)^-1` with the directions T (C, F).
    """
    prototypes, directions = priming.class_prototypes, discriminant.directions
    if priming.is_simplex:
        return prototypes.t()
    if len(directions) <= directions.shape[1]:
        gram = directions @ directions.t() + _RIDGE * torch.eye(len(directions), dtype=directions.dtype)
        return torch.linalg.solve(gram, prototypes).t()
    # The same, without a (C, C) matrix.
    gram = directions.t() @ directions + _RIDGE * torch.eye(directions.shape[1], dtype=directions.dtype)
    return (prototypes - directions @ torch.linalg.solve(gram, directions.t() @ prototypes)).t() / _RIDGE


def held_out(discriminant: Discriminant, priming: Priming, weight: torch.Tensor) -> tuple[float, float]:
    """Return the accuracy of a primed head on the kept samples, and the scale that suits it.

    Each sample is left out of the scores, and of the prototype of its class if that was placed. It stays in the spread
    and in the choice of directions: in few dimensions the accuracy is some points too high.
    """
    embeddings = F.normalize(discriminant.scores @ weight.t().float(), dim=1)
    prototypes, labels = priming.class_prototypes.float(), discriminant.labels
    cosines = embeddings @ prototypes.t()
    if priming.is_placed:
        own = F.normalize(prototypes[labels] + discriminant.shifts @ weight.t().float(), dim=1)
        cosines[torch.arange(len(labels)), labels] = (embeddings * own).sum(dim=1)
    return _accuracy_and_scale(cosines, labels)


def held_out_features(priming: Priming, moments: Moments, samples: torch.Tensor, labels: torch.Tensor
                      ) -> tuple[float, float]:
    """Return accuracy and scale as `held_out` does, for a head without a neck: of samples (R, F), labels (R,).

    A sample is left out of the prototype of its class if that was placed.
    """
    rest = moments.counts[labels] - 1
    samples, labels, rest = samples[rest > 0.5].double(), labels[rest > 0.5], rest[rest > 0.5]
    prototypes, means = priming.class_prototypes, moments.means + moments.centre
    embeddings = F.normalize(samples, dim=1)
    cosines = embeddings @ prototypes.t()
    if priming.is_placed:
        own = F.normalize(means[labels] - (samples - means[labels]) / rest.unsqueeze(1), dim=1)
        cosines[torch.arange(len(labels)), labels] = (embeddings * own).sum(dim=1)
    return _accuracy_and_scale(cosines.float(), labels)


def _accuracy_and_scale(cosines: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    right = (cosines.argmax(dim=1) == labels).sum()
    return float(right) / max(len(labels), 1), best_scale(cosines, labels)[0]
