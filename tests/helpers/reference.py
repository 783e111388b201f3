"""The paper in the plainest float64 code: what every fast path is tested against.

DL2PA: M. S. Ebrahimi Saadabadi, A. Dabouei, S. Rahimi Malakshan, N. M. Nasrabadi, "Hyperspherical Classification with
Dynamic Label-to-Prototype Assignment", CVPR 2024. Loops where the paper has sums; no concern for speed.
"""
import itertools
import math

import numpy as np


def uniformity(points) -> float:
    """Eq. 4-5: log mean_{i<j} exp(-2 |p_i - p_j|^2)."""
    points = np.asarray(points, dtype=np.float64)
    pairs = [math.exp(-2 * np.sum((p - q) ** 2)) for p, q in itertools.combinations(points, 2)]
    return math.log(sum(pairs) / len(pairs))


def embed(features):
    """z = f / |f|, row by row."""
    features = np.asarray(features, dtype=np.float64)
    return np.stack([f / np.linalg.norm(f) for f in features])


def logits(embeddings, prototypes, assignment, scale: float):
    """scale * <z, p_a(c)> for each sample and class."""
    embeddings = np.asarray(embeddings, np.float64)
    return np.array([[scale * np.dot(z, prototypes[a]) for a in assignment] for z in embeddings])


def squared_cosine_loss(embeddings, targets, prototypes, assignment) -> float:
    """The balanced loss, summed over the batch: (1 - cos(z, p_a(y)))^2. Soft targets (B, C): its expectation."""
    embeddings, prototypes = np.asarray(embeddings, np.float64), np.asarray(prototypes, np.float64)
    total = 0.0
    for z, target in zip(embeddings, np.asarray(targets)):
        shares = {int(target): 1.0} if np.ndim(target) == 0 else dict(enumerate(target))
        for label, share in shares.items():
            total += share * (1 - np.dot(z, prototypes[assignment[label]])) ** 2
    return float(total)


def dot_regression_loss(embeddings, labels, prototypes, assignment) -> float:
    """The long-tailed loss: 1/2 mean((h.m - |m| |h|)^2 / |h|), m = L_c p_a(c), L_c = sqrt((B / present) / n_c)."""
    embeddings, labels = np.asarray(embeddings, np.float64), np.asarray(labels)
    present = set(labels.tolist())
    terms = []
    for h, label in zip(embeddings, labels):
        length = math.sqrt(len(labels) / len(present) / np.sum(labels == label))
        m = length * np.asarray(prototypes[assignment[label]], np.float64)
        terms.append((np.dot(h, m) - np.linalg.norm(m) * np.linalg.norm(h)) ** 2 / np.linalg.norm(h))
    return float(0.5 * np.mean(terms))


def mixed_dot_regression_loss(embeddings, labels_a, labels_b, lam: float, prototypes, assignment) -> float:
    """Mixup: lam L(a) + (1 - lam) L(b)."""
    return (lam * dot_regression_loss(embeddings, labels_a, prototypes, assignment)
            + (1 - lam) * dot_regression_loss(embeddings, labels_b, prototypes, assignment))


def class_means(batches, num_classes: int, dim: int, momentum: float = 1.0, resolve_after=()):
    """Mean directions from (embeddings, label shares (B, C)) batches; sums are multiplied by momentum at re-solves."""
    sums = [np.zeros(dim) for _ in range(num_classes)]
    for number, (embeddings, shares) in enumerate(batches, start=1):
        for z, row in zip(np.asarray(embeddings, np.float64), np.asarray(shares, np.float64)):
            for label in range(num_classes):
                sums[label] = sums[label] + row[label] * z
        if number in resolve_after:
            sums = [momentum * s for s in sums]
    return np.stack([s / np.linalg.norm(s) if np.any(s) else s for s in sums])


def best_objective(scores) -> float:
    """max over injections a of sum_c scores[c, a(c)], by trying them all."""
    scores = np.asarray(scores, dtype=np.float64)
    num_classes, num_prototypes = scores.shape
    return max(sum(scores[c, a] for c, a in enumerate(places))
               for places in itertools.permutations(range(num_prototypes), num_classes))
