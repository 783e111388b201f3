"""prime: sets a head by the features of a trained backbone, before the first step of training."""
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..assignment import align_prototypes
from ..distributed import add_over_ranks, rank, solve_on_rank_0
from ..head import DL2PAHead, heads_of
from ..losses.targets import as_labels
from ..values import whole_number
from .batches import split_batch, to_model
from .neck_fit import NeckMap, check_neck, refuse_sharded, write_neck
from .scheduler import AssignmentScheduler
from .targets import IGNORED, check_values, samples_that_count, shares_of

__all__ = ['Primer', 'prime']

# Share of the mean variance that is added to the variance of each direction, so that directions without variance have
# little influence.
_RIDGE = 0.01
_SUMS = ('counts', 'sums', 'squares', 'tally')


class _Features:
    """Sums of a head's features (B, F), for each class and over all samples, in float64."""

    def __init__(self, head: DL2PAHead, ignore_index: int):
        device = head.prototypes.device
        # MPS has no float64.
        kind = dict(dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
        self.num_classes = head.num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(head.num_classes, **kind)
        self.sums = torch.zeros(head.num_classes, head.in_features, **kind)
        self.squares = torch.zeros(head.in_features, head.in_features, **kind)
        # How many samples came, without those to ignore, and how many of them were left out as not finite.
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self.features: torch.Tensor | None = None
        head.training_view.on_features = self._observe

    def _observe(self, features: torch.Tensor) -> None:
        self.features = features

    def add(self, targets: torch.Tensor) -> None:
        if self.features is None:
            raise ValueError('a DL2PA head of the model saw no features in this forward: is it the model in use?')
        if targets.shape not in ((len(self.features),), (len(self.features), self.num_classes)):
            raise ValueError(f'targets must be class indices (B,) or soft targets (B, {self.num_classes}) for the '
                             f'{len(self.features)} images, not of the shape {tuple(targets.shape)}.')
        check_values(targets, self.num_classes, self.ignore_index)
        # An auxiliary head may see many patches of an image (B, N, F): each is a sample of the image's class.
        patches = math.prod(self.features.shape[1:-1])
        features = self.features.flatten(0, -2).to(self.sums)
        targets = targets.to(features.device).repeat_interleave(patches, dim=0)
        features, targets, tally = samples_that_count(features, targets, self.ignore_index)
        self.tally += tally
        for labels, share in shares_of(targets, self.num_classes):
            share = share.to(features)
            self.counts.index_add_(0, labels, share.squeeze(1))
            self.sums.index_add_(0, labels, share * features)
        self.squares += features.t() @ features
        self.features = None

    def gather(self) -> None:
        """Add up the processes' sums."""
        add_over_ranks(*(getattr(self, name) for name in _SUMS))

    def solution(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the centre (F,), the centred class means (C, F), which classes were seen (C,), and the covariance
        (F, F) in which each class counts the same, with its ridge."""
        counts, sums, squares, (_, left_out) = (getattr(self, name).double().cpu().numpy() for name in _SUMS)
        if left_out:
            warnings.warn(f'{left_out:.0f} samples were left out: their features or targets are not finite.',
                          stacklevel=4)
        seen = counts > 0
        means = np.divide(sums, counts[:, None], out=np.zeros_like(sums), where=seen[:, None])
        centre = means[seen].mean(axis=0)
        within = (squares - sums.T @ means) / counts.sum()
        centred = np.where(seen[:, None], means - centre, 0.0)
        covariance = within + centred.T @ centred / seen.sum()
        ridge = max(_RIDGE * np.trace(covariance) / len(covariance), np.finfo(np.float32).tiny)
        return centre, centred, seen, covariance + ridge * np.eye(len(covariance))


class Primer:
    """Gathers the features of a model's heads batch by batch, then sets the heads by them: `prime` in two steps.

    Args:
        heads: The heads of a model, the main one first.
        ignore_index: The label of samples that are left out.

    Raises:
        ValueError: The neck of a head cannot be set, because of what another tool has put around it.

    Example:
        >>> primer = Primer(heads)
        >>> for images, targets in loader:
        ...     model(images)
        ...     primer.add(targets)
        >>> primer.finish()
    """

    def __init__(self, heads: Sequence[DL2PAHead], ignore_index: int = IGNORED):
        for head in heads:
            check_neck(head)
        self.heads = heads
        self._statistics = [_Features(head, ignore_index) for head in heads]

    def add(self, targets: torch.Tensor) -> None:
        """Add the features of the last forward, with its targets (B,) or (B, C), of any kind that `as_labels` takes.

        Raises:
            ValueError: The targets do not fit the features.
        """
        targets = as_labels(targets)
        for found in self._statistics:
            found.add(targets)

    def close(self) -> None:
        """Stop gathering features."""
        for head in self.heads:
            head.training_view.on_features = None

    @torch.no_grad()
    def finish(self, scheduler: AssignmentScheduler | None = None) -> float:
        """Set the heads, end the scheduler's warm-up and stop gathering features. Returns and raises what `prime` does.
        """
        self.close()
        for found in self._statistics:
            found.gather()
        counts = self._statistics[0].counts
        if not counts.sum() > 0:
            samples, left_out = self._statistics[0].tally.tolist()
            raise ValueError(f'the features or targets of all {samples} samples are not finite: is the backbone sound?'
                             if left_out else 'loader has no batch with labels: prime needs images of the classes.')
        solutions = [found.solution() for found in self._statistics]
        head, (centre, means, seen, covariance) = self.heads[0], solutions[0]
        if not seen.all():
            warnings.warn(f'{(~seen).sum()} of {len(seen)} classes had no images (the first is class '
                          f'{np.flatnonzero(~seen)[0]}): they get the prototypes that are left.', stacklevel=3)

        def answer() -> tuple[torch.Tensor, torch.Tensor, float]:
            if head.config.neck != 'none':
                return _fit(means, covariance, head.prototypes)
            # There is no neck that could subtract the centre.
            aligned = align_prototypes(_unit_rows(means + np.where(seen[:, None], centre, 0.0)), head.prototypes)
            return aligned.assignment, aligned.prototypes, aligned.objective / seen.sum()

        assignment, prototypes, explained = solve_on_rank_0(answer, head.prototypes.device)
        maps = [_best_map(head, prototypes[assignment], *solution) for head, solution in zip(self.heads, solutions)]
        for head, neck_map in zip(self.heads, maps):
            check_neck(head, neck_map)
        for head, neck_map in zip(self.heads, maps):
            head.assign(assignment, prototypes)
            if neck_map is not None:
                write_neck(head.neck, neck_map)
        if scheduler is not None:
            scheduler.skip_warmup()
        return float(explained)

    def state_dict(self) -> list[dict[str, torch.Tensor]]:
        """Return the sums so far, of each head, as copies on the CPU."""
        return [{name: getattr(found, name).cpu().clone() for name in _SUMS} for found in self._statistics]

    def load_state_dict(self, state: list[dict[str, torch.Tensor]]) -> None:
        """Take over a state. In a distributed run all processes load the same one, and rank 0 keeps it."""
        keep = rank() == 0
        for found, saved in zip(self._statistics, state, strict=True):
            for name in _SUMS:
                getattr(found, name).copy_(saved[name] if keep else torch.zeros_like(saved[name]))


def prime(
        model: nn.Module,
        loader: Iterable[Any],
        scheduler: AssignmentScheduler | None = None,
        *,
        max_batches: int | None = None,
        progress: bool = True,
        ignore_index: int = IGNORED,
) -> float:
    """Set assignment, rotation of the prototypes and neck by a trained backbone's features, in one pass over images.

    The neck is the least-squares map from each sample's features to its class's prototype, with equal weights for the
    classes: `W = P_a^T M S^-1 / C`, with the centred class means M (C, F) and the features' covariance S (with a
    hundredth of its mean variance added). The variance that it explains is proportional to
    `sum_cd G_cd <p_a(c), p_a(d)>`, with the similarity `G = M S^-1 M^T` of the classes. So the prototypes are aligned
    (`align_prototypes`) to the d leading directions of G, under three weightings; the one that explains the most is
    kept.

    The outputs of a linear neck keep their total variance, so that the learning rate still fits. The scheduler's
    warm-up is skipped, since there is an assignment already. Nothing else is changed.

    Args:
        model: A wrapped model (also inside DistributedDataParallel or PEFT). It runs in evaluation mode, and is
            restored. If it has several heads, the first decides the assignment, and each neck is set by its own
            features.
        loader: Batches whose first two entries are images, which are moved to the model's device, and targets: class
            indices (B,), or soft targets (B, C). Batches may also be mappings with 'pixel_values' and 'labels', and
            images the mapping that NaFlexViT takes. Training images without augmentation are best. In a distributed run
            every process gives its own part of them.
        scheduler: The model's scheduler, if there is one.
        max_batches: Largest number of batches to take. A few dozen images a class suffice.
        progress: Show a bar on stderr (on rank 0).
        ignore_index: The label of samples that are left out. Those whose features are not finite are left out too, with
            a warning.

    Returns:
        The share of the prototypes' variance that the features explain, 0 to 1. (With `neck='none'` there is no fit: it
        is the mean cosine of a class mean with its prototype.)

    Raises:
        ValueError: The model has no DL2PA head or is sharded, the scheduler belongs to another model, the loader is
            empty, targets do not fit, no features are finite, or the neck cannot be set: a parametrisation (spectral
            norm), a hook (pruning) or an adapter stands in the way. The model was not changed.

    Example:
        >>> scheduler = AssignmentScheduler(model)
        >>> explained = prime(model, loader, scheduler, progress=False)
        >>> 0 < explained <= 1 and not scheduler.warming_up
        True
    """
    if max_batches is not None:
        max_batches = whole_number('max_batches', max_batches, least=1)
    heads = heads_of(model)
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    if scheduler is not None and scheduler.heads[0] is not heads[0]:
        raise ValueError('scheduler belongs to another model: make it with the model that is primed.')
    refuse_sharded(model)
    # DistributedDataParallel's own forward would wait for the other processes, whose parts may be smaller;
    # DataParallel's would split the batch.
    inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    first = next(inner.parameters(), heads[0].prototypes)
    quiet = not progress or rank() != 0
    total = len(loader) if hasattr(loader, '__len__') else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    modes = {module: module.training for module in inner.modules()}
    primer = Primer(heads, ignore_index)
    try:
        for module in modes:  # not by eval(), which a training task takes for the end of an epoch
            module.training = False
        with torch.no_grad(), tqdm(total=total, desc='prime', disable=quiet, unit='batch') as bar:
            for batch in islice(loader, max_batches):
                images, targets = split_batch(batch)
                inner(to_model(images, first))
                primer.add(targets)
                bar.update()
    finally:
        primer.close()
        for module, mode in modes.items():
            module.training = mode
    return primer.finish(scheduler)


def _fit(means: np.ndarray, covariance: np.ndarray, prototypes: torch.Tensor
         ) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return assignment, rotated prototypes and the share of variance explained."""
    similarity = means @ np.linalg.solve(covariance, means.T)  # G, (C, C)
    values, vectors = np.linalg.eigh(similarity)
    dim, best = prototypes.shape[1], None
    values, vectors = np.maximum(values[::-1][:dim], 0.0), vectors[:, ::-1][:, :dim]
    # How much weight the leading directions, those of groups of classes, should have depends on the classes.
    for power in (0.5, 1.0, 2.0):
        rows = np.pad(vectors * values ** power, ((0, 0), (0, dim - vectors.shape[1])))
        found = align_prototypes(rows, prototypes)
        placed = found.prototypes.double().numpy()[found.assignment.numpy()]
        explained = float((similarity @ placed * placed).sum()) / len(means) ** 2
        if best is None or explained > best[2]:
            best = found.assignment, found.prototypes, explained
    return best


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _best_map(head: DL2PAHead, placed: torch.Tensor, centre: np.ndarray, means: np.ndarray, seen: np.ndarray,
              covariance: np.ndarray) -> NeckMap | None:
    """Return the least-squares map from features to the prototypes (C, d) of their classes; None without a neck."""
    if head.config.neck == 'none':
        return None
    placed = placed.cpu().double().numpy() * seen[:, None]
    weight = np.linalg.solve(covariance, means.T @ placed).T / seen.sum()  # (d, F)
    return NeckMap.of(head.neck, weight, centre, covariance)
