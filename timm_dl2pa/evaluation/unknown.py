"""Scores that are larger for samples of known classes than for others."""
import torch

from .checks import check_rows
from .neighbours import neighbour_blocks
from .softmax import softmax_statistics

__all__ = ['unknown_scores']


def unknown_scores(embeddings: torch.Tensor, class_vectors: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    """Return scores that are larger for what is known, in blocks of classes.

    With the cosines `c_1 >= c_2 >= ...` of an embedding with the class vectors, and the factor s:

    - `cosine`: c_1, the largest.
    - `energy`: log sum_i exp(s c_i), the negative energy (Liu et al. 2020).
    - `gap`: c_1 - c_2, how much farther the second class is.
    - `probability`: the largest of softmax(s c) (Hendrycks and Gimpel 2017).

    Args:
        embeddings: (N, d) unit rows.
        class_vectors: (C, d) unit rows, C >= 2, such as `head.class_prototypes`, on the same device.
        scale: s, such as `head.current_scale()`.

    Returns:
        (N,) float32 for each score.

    Raises:
        ValueError: The shapes do not fit, there are fewer than two classes, or the scale is not positive.

    Example:
        >>> scores = unknown_scores(embeddings, head.class_prototypes, head.current_scale())
        >>> sorted(scores)
        ['cosine', 'energy', 'gap', 'probability']
    """
    check_rows('embeddings', embeddings)
    check_rows('class_vectors', class_vectors, embeddings.shape[1])
    if len(class_vectors) < 2:
        raise ValueError(f'class_vectors must be at least 2 rows, not {len(class_vectors)}.')
    found = softmax_statistics(embeddings, class_vectors, scale)
    first_two = torch.cat([cosines for _, cosines, _ in neighbour_blocks(embeddings, class_vectors, 2)])
    return {'cosine': first_two[:, 0], 'energy': found.log_sum, 'gap': first_two[:, 0] - first_two[:, 1],
            'probability': found.confidence}
