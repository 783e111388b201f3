"""What is measured of a trained classifier, from its logits and its embeddings."""
import torch
import torch.nn.functional as F

__all__ = ['angular_separation', 'calibration_error', 'recall_at_1', 'superclass_agreement', 'tail_groups', 'top_k']


def top_k(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Return the share of rows (N, C) with the label (N,) among the k largest, in percent."""
    found = logits.topk(min(k, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return 100 * found.any(dim=1).double().mean().item()


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error in percent: the mean gap of confidence and accuracy over equal bins of
    confidence, weighed by their samples (Guo et al. 2017)."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, confidence - right)
    return 100 * gap.abs().sum().item() / len(labels)


def tail_groups(train_counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the classes (C,) bool with more than 100, with 20 to 100, and with fewer than 20 training images: head,
    medium and tail (Liu et al. 2019)."""
    return {'head': train_counts > 100, 'medium': (train_counts >= 20) & (train_counts <= 100),
            'tail': train_counts < 20}


def angular_separation(class_vectors: torch.Tensor) -> dict[str, float]:
    """Return the mean and the smallest angle from a class vector (C, d) to its nearest other, in degrees."""
    unit = F.normalize(class_vectors.double(), dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-1).max(dim=1).values.clamp(-1, 1)
    angles = torch.rad2deg(cosines.acos())
    return {'mean': angles.mean().item(), 'smallest': angles.min().item()}


def superclass_agreement(class_vectors: torch.Tensor, groups: torch.Tensor) -> float:
    """Return, in percent, how many of a class's nearest class vectors are of its own superclass (C,), among as many
    as that has other classes."""
    unit = F.normalize(class_vectors.double(), dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-2)
    shares = []
    for label, group in enumerate(groups.tolist()):
        others = int((groups == group).sum()) - 1
        if others:
            nearest = cosines[label].topk(others).indices
            shares.append((groups[nearest] == group).double().mean().item())
    return 100 * sum(shares) / len(shares)


def recall_at_1(embeddings: torch.Tensor, labels: torch.Tensor, gallery: torch.Tensor | None = None) -> float:
    """Return, in percent, how often an embedding's nearest other one, by the cosine, (N, d) is of its class (N,).

    Args:
        embeddings: (N, d).
        labels: (N,).
        gallery: (N, d), another model's embeddings of the same images, among which the nearest is looked for. Default:
            these.
    """
    unit, right = F.normalize(embeddings.float(), dim=1), 0
    others = unit if gallery is None else F.normalize(gallery.float(), dim=1)
    for first in range(0, len(unit), 1024):
        cosines = unit[first:first + 1024] @ others.t()
        rows = torch.arange(len(cosines), device=unit.device)
        cosines[rows, first + rows] = -2
        right += (labels[cosines.argmax(dim=1)] == labels[first:first + 1024]).sum().item()
    return 100 * right / len(unit)
