"""Discriminant: the classes of a backbone's features, seen by a metric in which they are told apart best."""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

__all__ = ['Discriminant', 'Moments', 'best_scale', 'fit_discriminant']

# Shares of a sphere in the covariance within classes, from a full discriminant analysis to the nearest class mean.
_SHRINKAGES = (0.02, 0.06, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
_SCALES = (4.0, 6.0, 9.0, 13.0, 19.0, 28.0, 40.0)


@dataclass(frozen=True)
class Moments:
    """What discriminant analysis needs to know of features, float64 on the CPU.

    Attributes:
        counts: (C,), samples of each class.
        centre: (F,), the mean of the class means, in which each class that was seen counts the same.
        means: (C, F), the class means from there; zero for classes that were not seen.
        within: (F, F), the pooled covariance within classes.
        covariance: (F, F), of all features, with equal weights for the classes.
    """
    counts: torch.Tensor
    centre: torch.Tensor
    means: torch.Tensor
    within: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor) -> 'Moments':
        """Return the moments of sums: counts (C,), sums (C, F) and the sum of outer products (F, F)."""
        counts, sums, squares = (each.cpu().double() for each in (counts, sums, squares))
        seen = (counts > 0).unsqueeze(1)
        means = torch.where(seen, sums / counts.clamp_min(1e-300).unsqueeze(1), 0.0)
        centre = means.sum(dim=0) / seen.sum()
        within = (squares - sums.t() @ means) / counts.sum()
        means = torch.where(seen, means - centre, 0.0)
        return cls(counts, centre, means, within, within + means.t() @ means / seen.sum())

    def pooled(self, other: 'Moments') -> 'Moments':
        """Return the moments of these features and others of the same images, each taken from its own centre.

        The centre and the covariance of all features stay these.
        """
        apart = (self.means - other.means) / 2
        return replace(self, means=self.means - apart, within=(self.within + other.within) / 2
                       + apart.t() @ apart / self.seen.sum())

    @property
    def seen(self) -> torch.Tensor:
        """(C,), which classes had samples."""
        return self.counts > 0

    def shrunk(self, shrinkage: float) -> torch.Tensor:
        """Return the covariance within classes, (F, F), mixed with a sphere of the same mean variance."""
        size = len(self.within)
        variance = self.within.trace() / size
        if not variance > 1e-12 * self.covariance.trace() / size:  # one sample in each class
            shrinkage, variance = 1.0, (self.covariance.trace() / size).clamp_min(torch.finfo(torch.float32).tiny)
        mixed = (1 - shrinkage) * self.within
        mixed.diagonal().add_(shrinkage * variance)
        return mixed


@dataclass(frozen=True)
class Discriminant:
    """The directions of classes in the metric of the shrunk covariance A within classes.

    With A = L L^T, features are whitened by L^-1. There a class's direction is its mean, divided by its length.

    Attributes:
        centre: (F,), float64.
        rows: (C, F), float64: the unit class directions times L^-1. `rows @ (x - centre)` are the scores of features x,
            the lengths of their whitened form along the class directions. Zero for classes that were not seen.
        directions: (C, F), float64: the unit class directions in the whitened space.
        shrinkage: The share of a sphere in A.
        scores: (R, C), float32: the scores of kept samples, each left out of its class mean and of A.
        shifts: (R, C), float32: the scores of what leaving out a sample adds to the direction of its class.
        labels: (R,), int64, their classes.
    """
    centre: torch.Tensor
    rows: torch.Tensor
    directions: torch.Tensor
    shrinkage: float
    scores: torch.Tensor
    shifts: torch.Tensor
    labels: torch.Tensor


def fit_discriminant(moments: Moments, samples: torch.Tensor, labels: torch.Tensor, in_training: Moments | None = None
                     ) -> Discriminant:
    """Choose the shrinkage by which samples that are left out are told apart best, and return the discriminant.

    Of those whose leave-one-out accuracy is within one standard error of the best, it is the one with the least
    cross-entropy of the cosines. (The cross-entropy alone shrinks too much where images are many; the accuracy alone is
    a noisy guide where they are few.)

    Args:
        moments: Of all features.
        samples: (R, F), features among those.
        labels: (R,), their classes.
        in_training: Moments of the same images' features in training mode, if they differ: the class directions are
            then those of both. The shrinkage is chosen by the features in evaluation mode alone, of which a sample can
            be left out.
    """
    usable = moments.counts[labels] > 1.5  # nothing is left of a class without its only sample
    samples, labels = samples[usable].double() - moments.centre, labels[usable]
    found = []
    for shrinkage in _SHRINKAGES if len(labels) else (0.5,):
        factor = torch.linalg.cholesky(moments.shrunk(shrinkage).float())
        means = torch.linalg.solve_triangular(factor, moments.means.float().t(), upper=False).t()
        whitened = torch.linalg.solve_triangular(factor, samples.float().t(), upper=False).t()
        scores, shifts, cosines = _left_out(whitened, means, labels, moments.counts.float(), shrinkage)
        right = float((cosines.argmax(dim=1) == labels).float().mean()) if len(labels) else 0.0
        found.append((shrinkage, right, best_scale(cosines, labels)[1], scores, shifts))
    best = max(right for _, right, *_ in found)
    error = (best * (1 - best) / max(len(labels), 1)) ** 0.5
    shrinkage, _, _, scores, shifts = min((each for each in found if each[1] >= best - error), key=lambda each: each[2])
    both = moments if in_training is None else moments.pooled(in_training)
    factor = torch.linalg.cholesky(both.shrunk(shrinkage))
    means = torch.linalg.solve_triangular(factor, both.means.t(), upper=False).t()
    directions = F.normalize(means, dim=1)
    rows = torch.linalg.solve_triangular(factor.t(), directions.t(), upper=True).t()
    return Discriminant(moments.centre, rows, directions, shrinkage, scores, shifts, labels)


def _left_out(whitened: torch.Tensor, means: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor,
              shrinkage: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, shifts and cosines (R, C) of samples with class directions, as if each had not been seen.

    Without a sample x of class y with n samples, its class mean is `m_y - r / (n - 1)`, r = x - m_y, and the scatter
    within classes lacks `n / (n - 1) r r^T`: a change of rank one, whose inverse is known (Sherman and Morrison 1950).

    Args:
        whitened: (R, F), the samples in the metric of the shrunk covariance.
        means: (C, F), the class means there.
        labels: (R,).
        counts: (C,), samples of each class.
        shrinkage: See `Discriminant`.
    """
    own = (torch.arange(len(labels)), labels)
    with_means, own_with_means = whitened @ means.t(), means[labels] @ means.t()
    lengths = means.square().sum(dim=1)
    rest = counts[labels] - 1
    size = whitened.square().sum(dim=1)
    along = size - with_means[own]  # <x, r>
    height = size - 2 * with_means[own] + lengths[labels]  # |r|^2
    weight = (1 - shrinkage) / counts.sum() * counts[labels] / rest
    gain = weight / (1 - weight * height).clamp_min(1e-3)
    residuals = with_means - own_with_means  # <r, m_c>
    scores = with_means + (gain * along).unsqueeze(1) * residuals
    squared = lengths + gain.unsqueeze(1) * residuals.square()
    grown = 1 + gain * height
    scores[own] -= along * grown / rest
    squared[own] += (height * grown / rest - 2 * residuals[own] * grown) / rest
    length_without = squared[own].clamp_min(1e-12).sqrt().unsqueeze(1)
    shifts = (own_with_means - residuals / rest.unsqueeze(1)) / length_without
    shifts = (shifts - own_with_means / lengths[labels].clamp_min(1e-12).sqrt().unsqueeze(1)
              ) / lengths.clamp_min(1e-12).sqrt()
    scores = scores / squared.clamp_min(1e-12).sqrt()
    return scores, shifts, scores / (size + gain * along.square()).clamp_min(1e-12).sqrt().unsqueeze(1)


def best_scale(cosines: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return the scale that suits cosines (R, C) with labels (R,), and the least cross-entropy that they have.

    It is the smallest whose cross-entropy is within 0.01 of the least: where classes are easily told apart, larger ones
    would leave no gradient.
    """
    if not len(labels):
        return _SCALES[0], 0.0
    entropies = {scale: float(F.cross_entropy(scale * cosines, labels)) for scale in _SCALES}
    least = min(entropies.values())
    return next(scale for scale, entropy in entropies.items() if entropy <= least + 0.01), least
