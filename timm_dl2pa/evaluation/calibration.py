"""Calibration: how far confidence is from accuracy, and the temperature that brings them together."""
import math
from dataclasses import dataclass

import torch
from scipy.optimize import brentq

from ..values import real_number, whole_number
from .checks import check_labels, check_rows, check_scores
from .softmax import softmax_statistics

__all__ = ['Reliability', 'calibration_error', 'fit_temperature', 'reliability']

# A fitted temperature is within these. Without any error among the samples, the best temperature would be zero.
_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in bins of confidence of equal width, (bins,) each; NaN in empty bins.

    Attributes:
        confidence: The mean confidence, float64.
        accuracy: The share of right predictions, float64.
        count: The number of samples, int64.
    """
    confidence: torch.Tensor
    accuracy: torch.Tensor
    count: torch.Tensor

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1: the mean gap between confidence and accuracy over the samples'
        bins (Guo et al. 2017)."""
        gaps = (self.confidence - self.accuracy).abs().nan_to_num() * self.count
        return (gaps.sum() / self.count.sum()).item()


def reliability(confidence: torch.Tensor, right: torch.Tensor, bins: int = 15) -> Reliability:
    """Compare confidence and accuracy in bins of confidence.

    Args:
        confidence: (N,) floats from 0 to 1, the largest probability of each sample.
        right: (N,) bool, whether its prediction is right.
        bins: The number of bins. Bin i holds confidences above i / bins, up to (i + 1) / bins.

    Raises:
        ValueError: The shapes do not fit, or a confidence is not from 0 to 1.
    """
    check_scores('confidence', confidence)
    bins = whole_number('bins', bins, 1)
    if not isinstance(right, torch.Tensor) or right.shape != confidence.shape:
        raise ValueError(f'right must be bools ({len(confidence)},), one for each confidence.')
    # Rounding may leave a probability a little above one.
    if confidence.min() < 0 or confidence.max() > 1 + 1e-4:
        raise ValueError(f'confidence must be from 0 to 1, not from {confidence.min().item():g} to '
                         f'{confidence.max().item():g}.')
    confidence = confidence.double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins)
    sums = [torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, index, values)
            for values in (confidence, right.double())]
    return Reliability(sums[0] / count, sums[1] / count, count)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error, from 0 to 1. See `reliability`.

    Example:
        >>> round(calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 3)
        0.4
    """
    return reliability(confidence, right, bins).error


def fit_temperature(embeddings: torch.Tensor, labels: torch.Tensor, class_vectors: torch.Tensor, scale: float) -> float:
    """Return the temperature T whose probabilities, softmax(l / T), are the likeliest for the labels (Guo et al. 2017).

    The mean negative log-likelihood is convex in 1 / T. Its derivative, the mean of `expected logit - logit of the
    label`, is brought to zero; each evaluation goes over the logits in blocks, about ten times in all. Fit it on other
    samples than those that it is judged by.

    Args:
        embeddings: (N, d) unit rows.
        labels: (N,) int64.
        class_vectors: (C, d) unit rows.
        scale: The factor on the cosines.

    Returns:
        T, from 0.01 to 100.

    Raises:
        ValueError: There are no samples, or shapes or values are out of range.

    Example:
        >>> temperature = fit_temperature(embeddings, torch.arange(8), head.class_prototypes, head.current_scale())
        >>> 0.01 <= temperature <= 100
        True
    """
    check_rows('embeddings', embeddings)
    check_rows('class_vectors', class_vectors, embeddings.shape[1])
    check_labels('labels', labels, len(embeddings), len(class_vectors))
    if not len(embeddings):
        raise ValueError('embeddings must be at least one row.')
    scale = real_number('scale', scale)
    of_labels = scale * (embeddings.float() * class_vectors[labels].float()).sum(dim=1)

    def slope(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        expected = softmax_statistics(embeddings, class_vectors, scale / temperature).expected * temperature
        return (expected - of_labels).double().mean().item()

    ends = math.log(_COLDEST), math.log(_HOTTEST)
    # It falls as the temperature rises: hotter, the expected logit comes down to the mean of all.
    if slope(ends[0]) <= 0:
        return _COLDEST
    if slope(ends[1]) >= 0:
        return _HOTTEST
    return math.exp(brentq(slope, *ends, xtol=1e-3))
