"""Retrieval: recall@k, R-precision and mAP@R, and the accuracy of the nearest neighbours' vote."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..values import whole_number
from .checks import check_labels, check_rows
from .neighbours import neighbour_blocks

__all__ = ['RetrievalMetrics', 'retrieval_metrics']


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries whose class is in the gallery; all from 0 to 1.

    R is the number of gallery rows of the query's class. The last two are R-precision and MAP@R of Musgrave, Belongie
    and Lim, "A Metric Learning Reality Check" (ECCV 2020).

    Attributes:
        recall: For each k, the share of queries with their class among the k nearest.
        knn_accuracy: The share of queries whose class the k nearest vote for. Of several classes with the most votes,
            the one that a nearer row is of wins.
        r_precision: The share of the query's class among the R nearest.
        map_at_r: `1/R sum_i P(i)` over the i <= R whose i-th nearest is of the query's class; P(i) is the share of it
            among the i nearest.
        queries: The number of queries.
        without_match: The number of further queries, whose class is not in the gallery; they count nowhere else.
    """
    recall: dict[int, float]
    knn_accuracy: float
    r_precision: float
    map_at_r: float
    queries: int
    without_match: int


@torch.no_grad()
def retrieval_metrics(
        queries: torch.Tensor,
        labels: torch.Tensor,
        gallery: torch.Tensor | None = None,
        gallery_labels: torch.Tensor | None = None,
        *,
        ks: Sequence[int] = (1, 5, 10),
        knn: int = 20,
        sample: int | None = None,
        seed: int = 0,
) -> RetrievalMetrics | None:
    """Search each query among all others, or in a gallery, by cosine, in blocks.

    Time is that of N M d multiply-adds; beyond the arguments, memory depends on neither N nor M.

    Args:
        queries: (N, d) unit rows.
        labels: (N,) int64.
        gallery: (M, d) unit rows. Default: the queries, of which each is left out of its own search.
        gallery_labels: (M,) int64, with a gallery.
        ks: The k of recall@k. Those that are larger than the gallery are left out.
        knn: The number of neighbours that vote, fewer in a smaller gallery.
        sample: Search at most this many of the queries, drawn by the seed. The gallery stays whole.
        seed: Of the sample.

    Returns:
        The measures, or None if no query has a row of its class in the gallery.

    Raises:
        ValueError: Shapes or numbers are out of range, or one of gallery and its labels is missing.

    Example:
        >>> found = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), ks=[1, 5])
        >>> sorted(found.recall), found.queries
        ([1, 5], 8)
    """
    check_rows('queries', queries)
    check_labels('labels', labels, len(queries))
    if (gallery is None) != (gallery_labels is None):
        raise ValueError('gallery and gallery_labels go together: give both or neither.')
    ks = [whole_number('ks', k, 1) for k in ks]
    knn = whole_number('knn', knn, 1)
    own = None
    if gallery is None:
        gallery, gallery_labels, own = queries, labels, torch.arange(len(queries), device=queries.device)
    check_rows('gallery', gallery, queries.shape[1])
    check_labels('gallery_labels', gallery_labels, len(gallery))
    size = len(gallery) - (own is not None)
    if size < 1 or not len(queries):
        return None
    ks, knn = [k for k in ks if k <= size], min(knn, size)
    chosen = torch.arange(len(queries), device=queries.device)
    if sample is not None and whole_number('sample', sample, 1) < len(queries):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(queries), generator=generator, device='cpu')[:sample].sort().values.to(chosen)
    classes = int(max(labels.max(), gallery_labels.max())) + 1
    relevant = torch.bincount(gallery_labels, minlength=classes)[labels[chosen]] - int(own is not None)
    searched = chosen[relevant > 0]
    if not len(searched):
        return None
    relevant = relevant[relevant > 0]
    totals = torch.zeros(len(ks) + 3, dtype=torch.float64, device=queries.device)
    # By powers of two of R: a class of many rows must not make every search as long as its own.
    levels = relevant.double().log2().ceil()
    for level in levels.unique():
        rows, counts = searched[levels == level], relevant[levels == level]
        depth = max(int(counts.max()), knn, *ks)
        for part, _, found in neighbour_blocks(queries[rows], gallery, depth, None if own is None else own[rows]):
            nearest, wanted = gallery_labels[found], labels[rows[part]]
            totals += torch.stack(_sums(nearest, wanted, counts[part], ks, knn))
    *recall, vote, precision, average = (totals / len(searched)).tolist()
    return RetrievalMetrics(dict(zip(ks, recall)), vote, precision, average, len(searched), len(chosen) - len(searched))


def _sums(nearest: torch.Tensor, wanted: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int], knn: int
          ) -> list[torch.Tensor]:
    """Return the sums over some queries, () float64 each, of what the means are made from.

    Args:
        nearest: (n, depth) int64, the classes of the nearest rows, the nearest first.
        wanted: (n,) int64, the classes of the queries.
        relevant: (n,) int64, R.
        ks: Of recall@k.
        knn: The number of votes.
    """
    matches = nearest == wanted.unsqueeze(1)
    places = torch.arange(1, nearest.shape[1] + 1, device=nearest.device)
    counted = matches & (places <= relevant.unsqueeze(1))
    precision = counted.sum(dim=1) / relevant
    average = (counted.cumsum(dim=1) / places * counted).sum(dim=1) / relevant
    return [*(matches[:, :k].any(dim=1).double().sum() for k in ks),
            (_vote(nearest[:, :knn]) == wanted).double().sum(), precision.double().sum(), average.double().sum()]


def _vote(nearest: torch.Tensor) -> torch.Tensor:
    """Return the most frequent class of each row (n, k), the first such."""
    votes = torch.zeros_like(nearest)
    for column in nearest.T:
        votes += nearest == column.unsqueeze(1)
    return nearest.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1)
