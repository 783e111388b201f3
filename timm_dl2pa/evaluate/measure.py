"""All measures of a model's embeddings of labelled images."""
from dataclasses import dataclass

import torch

from ..evaluation import (
    NeighbourErrors,
    Reliability,
    RetrievalMetrics,
    class_counts,
    confusions,
    fit_temperature,
    nearest_neighbours,
    neighbour_errors,
    reliability,
    retrieval_metrics,
    softmax_statistics,
    top_k_accuracy,
)
from ..head import DL2PAHead
from ..prototypes.nearest import nearest_pairs

__all__ = ['Calibration', 'Measures', 'measure']

# The temperature is one number: more samples do not make it better.
_MOST_FITTED = 10_000
_FEWEST_FITTED = 10
_TOP = 5
_NEIGHBOURS = 5
_NEAREST_PAIRS = 20
# Embeddings that are on the head's device at once.
_ROWS = 65_536


@dataclass(frozen=True)
class Calibration:
    """Calibration on the part of the samples that the temperature was not fitted on.

    Attributes:
        temperature: Fitted on `fitted_on` samples, drawn at random.
        fitted_on: Their number.
        measured_on: The number of the others.
        before: Confidence and accuracy of these, as the model gives its logits.
        after: The same with logits divided by the temperature.
    """
    temperature: float
    fitted_on: int
    measured_on: int
    before: Reliability
    after: Reliability


@dataclass(frozen=True)
class Measures:
    """What was measured; shares are from 0 to 1.

    Attributes:
        labels: (N,) int64.
        predictions: (N,) int64.
        top1: The share of right predictions.
        top5: The share of labels among the five likeliest classes; None with five classes or fewer.
        right: (C,) int64, right predictions of each class.
        images: (C,) int64, samples of each class.
        calibration: None with fewer than 20 samples.
        confused: Pairs (class, predicted class, samples), the most frequent first.
        near: The errors that go to the nearest prototypes, and how many these are; None where all are near.
        neighbours: How many prototypes count as near.
        nearest: Pairs of classes with the nearest prototypes, and their angle in degrees.
        retrieval: None where no class has two samples.
    """
    labels: torch.Tensor
    predictions: torch.Tensor
    top1: float
    top5: float | None
    right: torch.Tensor
    images: torch.Tensor
    calibration: Calibration | None
    confused: list[tuple[int, int, int]]
    near: NeighbourErrors | None
    neighbours: int
    nearest: list[tuple[int, int, float]]
    retrieval: RetrievalMetrics | None


@torch.no_grad()
def measure(head: DL2PAHead, embeddings: torch.Tensor, labels: torch.Tensor, *, queries: int, voters: int, seed: int
            ) -> Measures:
    """Measure a head by embeddings of labelled samples, in blocks.

    Args:
        head: The main head of the model, in evaluation mode.
        embeddings: (N, d) float32 unit rows, N >= 1, on the CPU.
        labels: (N,) int64, below C.
        queries: The most samples that are searched among all.
        voters: The number of nearest neighbours that vote.
        seed: Of the samples that the temperature is fitted on, and of the queries.

    Raises:
        ValueError: Shapes or labels do not fit the head.
    """
    num_classes, device = head.num_classes, head.prototypes.device
    parts = [head.nearest(rows.to(device), min(_TOP, num_classes))[1].cpu() for rows in embeddings.split(_ROWS)]
    top = torch.cat(parts)
    predictions = top[:, 0].contiguous()
    right, images = class_counts(predictions, labels, num_classes)
    vectors = head.class_prototypes
    neighbours = min(_NEIGHBOURS, num_classes - 1)
    near = None
    if neighbours < num_classes - 1:
        rows = nearest_neighbours(vectors, vectors, neighbours, torch.arange(num_classes, device=device))[1]
        near = neighbour_errors(labels, predictions, rows.cpu())
    return Measures(
        labels=labels,
        predictions=predictions,
        top1=top_k_accuracy(top, labels),
        top5=top_k_accuracy(top, labels, _TOP) if num_classes > _TOP else None,
        right=right,
        images=images,
        calibration=_calibration(head, vectors, embeddings, labels, predictions, seed),
        confused=confusions(labels, predictions),
        near=near,
        neighbours=neighbours,
        nearest=nearest_pairs(vectors.cpu(), _NEAREST_PAIRS),
        retrieval=retrieval_metrics(embeddings.to(device), labels.to(device), sample=queries, knn=voters, seed=seed),
    )


def _calibration(head: DL2PAHead, vectors: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor,
                 predictions: torch.Tensor, seed: int) -> Calibration | None:
    fitted = min(len(labels) // 2, _MOST_FITTED)
    if fitted < _FEWEST_FITTED:
        return None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device='cpu')
    one, other = order[:fitted].sort().values, order[fitted:].sort().values
    scale, device = head.current_scale().item(), vectors.device
    temperature = fit_temperature(embeddings[one].to(device), labels[one].to(device), vectors, scale)
    right = predictions[other] == labels[other]

    def compared(factor: float) -> Reliability:
        confidence = torch.cat([softmax_statistics(embeddings[rows].to(device), vectors, factor).confidence.cpu()
                                for rows in other.split(_ROWS)])
        return reliability(confidence, right)

    return Calibration(temperature, fitted, len(other), compared(scale), compared(scale / temperature))
