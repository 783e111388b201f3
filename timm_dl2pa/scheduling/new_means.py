"""The mean embeddings of classes that a model does not have yet."""
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn

from ..head import DL2PAHead, plain_tensor
from ..head.numerics import unit_embeddings
from ..losses.targets import as_labels
from .backbone_modes import BackboneModes
from .batches import split_batch, to_model
from .class_means import ClassMeans
from .targets import samples_that_count

__all__ = ['gather_new_means', 'means_found']

# Rows of given features that are embedded at a time.
_BLOCK = 8192


def gather_new_means(model: nn.Module, heads: Sequence[DL2PAHead], data: Any, num_new: int) -> ClassMeans:
    """Return the sums of the unit embeddings of n new classes, by a model in evaluation mode. Nothing is changed.

    In a distributed run every process gives its own samples, and rank 0 has the sums.

    Args:
        model: The model, not a wrapper of it.
        heads: Its heads; the embeddings are those of the first.
        data: Batches (images, labels), or a pair of tensors: features (N, F) and labels (N,). Labels are 0..n-1.
        num_new: n.

    Raises:
        ValueError: It is none of these, or a label is out of range.
    """
    head = heads[0]
    means = ClassMeans(num_new, head.dim, head.prototypes.device)
    embeddings_of = _of_features if _is_pair_of_tensors(data) else _of_batches
    with torch.no_grad():
        for embeddings, labels in embeddings_of(model, heads, data):
            embeddings = embeddings.flatten(0, -2)
            labels = _checked_labels(labels, len(embeddings), num_new).to(embeddings.device)
            labels = labels.repeat_interleave(len(embeddings) // max(1, len(labels)))  # of images with several features
            embeddings, labels, tally = samples_that_count(embeddings, labels)
            means.add(embeddings, labels)
            means.count(tally)
    means.merge()
    return means


def means_found(means: ClassMeans) -> torch.Tensor:
    """Return the mean directions (n, d), float64 on the CPU; on rank 0 in a distributed run.

    Raises:
        ValueError: A class has no sample with a direction.
    """
    left_out = means.check()
    directions = means.directions()
    missing = (directions == 0).all(dim=1)
    if missing.any():
        raise ValueError(f'data has no usable sample of {int(missing.sum())} of the {len(directions)} new classes '
                         f'(the first has the label {int(missing.nonzero()[0])}'
                         + (f'; {left_out} samples are not finite' if left_out else '')
                         + '): each needs at least one.')
    if left_out:
        warnings.warn(f'{left_out} samples were left out: their features are not finite.', stacklevel=5)
    return directions


def _is_pair_of_tensors(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data)


def _of_features(model: nn.Module, heads: Sequence[DL2PAHead], data: tuple[torch.Tensor, torch.Tensor]
                 ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield embeddings and labels of a pair (features, labels)."""
    head, (features, labels) = heads[0], data
    if features.shape[1:] != (head.in_features,) or not features.is_floating_point():
        raise ValueError(f'data is a pair of tensors, so that the first must be features (N, {head.in_features}), as '
                         f'head.embed takes them, not {features.dtype} of the shape {tuple(features.shape)}. A batch '
                         f'of images is given in a list: [(images, labels)].')
    if len(labels) != len(features):
        raise ValueError(f'data has {len(features)} features and {len(labels)} labels.')
    with BackboneModes(model, heads).evaluation():
        for part, own in zip(features.split(_BLOCK), labels.split(_BLOCK)):
            yield head.embed(to_model(part, next(head.neck.parameters(), head.prototypes))), own


def _of_batches(model: nn.Module, heads: Sequence[DL2PAHead], loader: Iterable[Any]
                ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield embeddings and labels of the batches of a loader."""
    head, first = heads[0], next(model.parameters(), heads[0].prototypes)
    modes, heard = BackboneModes(model, heads), []
    before, head.training_view.on_features = head.training_view.on_features, heard.append
    try:
        for batch in loader:
            images, labels = split_batch(batch)
            heard.clear()
            with modes.evaluation():
                model(to_model(images, first))
                if not heard:
                    raise ValueError('the DL2PA head of the model saw no features in this forward: is it the model in '
                                     'use?')
                embeddings = unit_embeddings(head.neck(plain_tensor(heard[-1])))
            yield embeddings, labels
    finally:
        head.training_view.on_features = before


def _checked_labels(labels: torch.Tensor, num_rows: int, num_new: int) -> torch.Tensor:
    labels = as_labels(labels)
    if labels.ndim != 1:
        raise ValueError(f'labels of new classes must be class indices (B,), not of the shape {tuple(labels.shape)}.')
    if not len(labels) or num_rows % len(labels):
        raise ValueError(f'data has {len(labels)} labels for {num_rows} embeddings.')
    outside = (labels < 0) | (labels >= num_new)
    if bool(outside.any()):
        raise ValueError(f'labels must number the {num_new} new classes from 0, in the order of names, not '
                         f'{int(labels[outside][0])}. Labels that begin after those of the old classes: subtract '
                         f'their number.')
    return labels.long()
