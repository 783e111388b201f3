"""prime: sets a head by the features of a trained backbone, before the first step of training."""
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from ..distributed import rank, solve_on_rank_0
from ..head import DL2PAHead, heads_of
from ..losses.targets import as_labels
from ..values import whole_number
from .backbone_modes import BackboneModes
from .batches import split_batch, to_model
from .discriminant import Moments, fit_discriminant
from .feature_sums import FeatureSums
from .neck_fit import NeckMap, check_neck, refuse_sharded, write_neck
from .prime_fit import Priming, embedding_map, held_out, held_out_features, place_at_means, place_prototypes
from .scheduler import AssignmentScheduler
from .targets import IGNORED

__all__ = ['Primer', 'prime']


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
        self.ignore_index = ignore_index
        self.features: list[torch.Tensor | None] = [None] * len(heads)
        self._sums = [FeatureSums(head, ignore_index) for head in heads]
        self._training_sums: list[FeatureSums] | None = None
        for number, head in enumerate(heads):
            head.training_view.on_features = partial(self.features.__setitem__, number)

    def add(self, targets: torch.Tensor, training: bool = False) -> None:
        """Add the features of the last forward.

        Args:
            targets: (B,) or (B, C), of any kind that `as_labels` takes.
            training: Whether the model was in training mode. If both are added, with the same images, the heads are set
                by both.

        Raises:
            ValueError: The targets do not fit the features.
        """
        targets = as_labels(targets)
        if training and self._training_sums is None:
            self._training_sums = [FeatureSums(head, self.ignore_index) for head in self.heads]
        for number, sums in enumerate(self._training_sums if training else self._sums):
            if self.features[number] is None:
                raise ValueError('a DL2PA head of the model saw no features in this forward: is it the model in use?')
            sums.add(self.features[number], targets)
            self.features[number] = None

    def close(self) -> None:
        """Stop gathering features."""
        for head in self.heads:
            head.training_view.on_features = None

    @torch.no_grad()
    def finish(self, scheduler: AssignmentScheduler | None = None) -> float:
        """Set the heads, end the scheduler's warm-up and stop gathering features. Returns and raises what `prime` does.
        """
        self.close()
        for found in [*self._sums, *(self._training_sums or ())]:
            found.gather()
        samples, left_out = self._sums[0].tally.tolist()
        seen = self._sums[0].counts.cpu() > 0
        if not seen.any():
            raise ValueError(f'the features or targets of all {samples} samples are not finite: is the backbone sound?'
                             if left_out else 'loader has no batch with labels: prime needs images of the classes.')
        if left_out:
            warnings.warn(f'{left_out} samples were left out: their features or targets are not finite.', stacklevel=3)
        if not seen.all():
            given = 'keep theirs' if self.heads[0].config.pinned else 'get the prototypes that are left'
            warnings.warn(f'{int((~seen).sum())} of {len(seen)} classes had no images (the first is class '
                          f'{int((~seen).nonzero()[0])}): they {given}.', stacklevel=3)
        # On one process: processors differ in the last bit.
        device = self.heads[0].prototypes.device
        with torch.autocast('cpu', enabled=False), torch.autocast(device.type, enabled=False):
            priming, maps, scales, accuracy = solve_on_rank_0(self._fit, device)
            for head, neck_map in zip(self.heads, maps):
                check_neck(head, neck_map)
        for head, neck_map, scale in zip(self.heads, maps, scales):
            head.assign(priming.assignment, priming.prototypes)
            if neck_map is not None:
                write_neck(head.neck, neck_map)
            if head.config.learn_scale:
                head.hold_scale(scale)
        if scheduler is not None:
            scheduler.skip_warmup()
        return accuracy

    def _fit(self) -> tuple[Priming, list[NeckMap | None], list[float], float]:
        """Return assignment and prototypes, of each head the map and the scale, and the main head's accuracy."""
        priming, maps, scales, accuracies = None, [], [], []
        for number, (head, sums) in enumerate(zip(self.heads, self._sums)):
            moments = Moments.of(sums.counts, sums.sums, sums.squares)
            in_training = None
            if self._training_sums is not None and self._training_sums[number].counts.any():
                found = self._training_sums[number]
                in_training = Moments.of(found.counts, found.sums, found.squares)
            if head.config.neck == 'none':
                priming, neck_map = priming or place_at_means(head, moments), None
                accuracy, scale = held_out_features(priming, moments, sums.samples.cpu(), sums.labels.cpu())
            else:
                discriminant = fit_discriminant(moments, sums.samples.cpu(), sums.labels.cpu(), in_training)
                priming = priming or place_prototypes(head, discriminant)
                weight = embedding_map(discriminant, priming)
                accuracy, scale = held_out(discriminant, priming, weight)
                neck_map = NeckMap.of(head.neck, (weight @ discriminant.rows).numpy(), moments.centre.numpy(),
                                      moments.covariance.numpy())
            maps.append(neck_map), scales.append(scale), accuracies.append(accuracy)
        return priming, maps, scales, accuracies[0]

    def state_dict(self) -> dict[str, list[dict[str, torch.Tensor]] | None]:
        """Return the sums so far, of each head in each mode, as copies on the CPU."""
        return {'evaluation': [found.state_dict() for found in self._sums],
                'training': self._training_sums and [found.state_dict() for found in self._training_sums]}

    def load_state_dict(self, state: dict[str, list[dict[str, torch.Tensor]] | None]) -> None:
        """Take over a state. In a distributed run all processes load the same one, and rank 0 keeps it."""
        if state['training'] is not None:
            self._training_sums = [FeatureSums(head, self.ignore_index) for head in self.heads]
        for found, saved in zip([*self._sums, *(self._training_sums or ())],
                                [*state['evaluation'], *(state['training'] or ())], strict=True):
            found.load_state_dict(saved)


def prime(
        model: nn.Module,
        loader: Iterable[Any],
        scheduler: AssignmentScheduler | None = None,
        *,
        max_batches: int | None = None,
        progress: bool = True,
        ignore_index: int = IGNORED,
) -> float:
    """Set prototypes, assignment, neck and scale by a trained backbone's features, in one pass over images.

    The classes are told apart by a discriminant analysis: class directions in the metric of the covariance within
    classes, shrunk towards a sphere. How strongly, is chosen by leaving out samples, in closed form (`Discriminant`).
    So the primed head lies between a full discriminant analysis and the nearest class mean. Where the class
    prototypes form a simplex (d >= C - 1) it classifies as the discriminant does, to the digit. In fewer dimensions
    'placed' puts the prototypes where the class directions are, spread by the paper's energy, and the other recipes
    rotate their even set towards them; the neck is a ridge regression of the prototypes (`place_prototypes`,
    `embedding_map`).

    Where modules of the backbone are in training mode and their features differ then (batch norm, dropout), each batch
    runs in both modes, and the neck serves both: so training begins where `prime` ended. The neck is long, so that
    training turns it slowly. A learned scale is set to what suits samples that are left out, and training leaves it so:
    the images that `prime` has seen would raise it, and the head would be too sure of itself. (A saved head knows that,
    and so does the scheduler's state; a model's state dict alone does not.) The scheduler's warm-up is skipped, since
    there is an assignment already. Nothing else is changed. The memory is O(F^2 + C F). Of a pinned head
    (`wrap_dl2pa(head=...)`) neck and scale alone are set.

    Args:
        model: A wrapped model (also inside DistributedDataParallel or PEFT), in the mode in which it will be trained:
            call `eval()` on what will stay frozen. It is restored. If it has several heads, the first decides the
            assignment, and each neck is set by its own features.
        loader: Batches whose first two entries are images, which are moved to the model's device, and targets: class
            indices (B,), or soft targets (B, C). Batches may also be mappings with 'pixel_values' and 'labels', and
            images the mapping that NaFlexViT takes. Training images without augmentation are best, each once: on
            CIFAR-100 with 20 images a class, at d = 32, 47.2 against 45.4 to 46.0 with crops and flips. In a
            distributed run every process gives its own part of them.
        scheduler: The model's scheduler, if there is one.
        max_batches: Largest number of batches to take. A few dozen images a class suffice.
        progress: Show a bar on stderr (on rank 0), where that is a terminal.
        ignore_index: The label of samples that are left out. Those whose features are not finite are left out too, with
            a warning.

    Returns:
        The accuracy of the primed head on up to 768 of the images, each left out in turn, 0 to 1. Several versions of
        an image, as an augmented loader gives over several passes, make it too high.

    Raises:
        ValueError: The model has no DL2PA head or is sharded, the scheduler belongs to another model, the loader is
            empty, targets do not fit, no features are finite, or the neck cannot be set: a parametrisation (spectral
            norm), a hook (pruning) or an adapter stands in the way. The model was not changed.

    Example:
        >>> scheduler = AssignmentScheduler(model)
        >>> accuracy = prime(model, loader, scheduler, progress=False)
        >>> 0 <= accuracy <= 1 and not scheduler.warming_up
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
    # None: quiet where the output is no terminal.
    disable = None if progress and rank() == 0 else True
    total = len(loader) if hasattr(loader, '__len__') else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    modes = BackboneModes(inner, heads)
    primer = Primer(heads, ignore_index)
    try:
        with torch.no_grad(), tqdm(total=total, desc='prime', disable=disable, unit='batch') as bar:
            for batch in islice(loader, max_batches):
                images, targets = split_batch(batch)
                images = to_model(images, first)
                with modes.evaluation():
                    inner(images)
                if modes.may_differ and len(targets) > 1:  # batch norm refuses one sample
                    before = list(primer.features)
                    with modes.training():
                        inner(images)
                    if modes.differ(before, primer.features):
                        primer.add(targets, training=True)
                    primer.features[:] = before
                primer.add(targets)
                bar.update()
    finally:
        primer.close()
    return primer.finish(scheduler)
