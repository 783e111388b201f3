"""The warm-up 'placed': prototypes follow the embeddings of their classes, and the paper's energy keeps them apart."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from ..assignment import AssignmentResult
from ..distributed import add_over_ranks
from ..head import MANY_CLASSES, NUM_SAMPLED, ClassSample, ClassSampler, DL2PAHead
from ..prototypes.energy import UNIFORMITY
from ..values import real_number
from .class_means import ClassMeans
from .gathering import Gathering
from .targets import shares_of
from .warmup import Warmup

__all__ = ['PlacedWarmup', 'PrototypePlacement', 'check_evenness', 'default_evenness']

# Length of the first step of a class whose gradient is as large as that of an untrained classifier is, in radians.
_STEP = 0.3
# Largest step that a single sample makes, on the tangent: 56 degrees. Rare classes and those of very many need it.
_STEP_OF_A_SAMPLE = 1.5
# Where nobody knows when the warm-up ends: samples per class after which the step is half as long.
_HALVED_AFTER = 50
# Samples of a class in the warm-up by which the mean of its embeddings counts half as much as its prototype.
_MEAN_HALVED_AFTER = 50
# Number of classes whose means are folded in at a time: of 256 dimensions, 8 MB.
_CLASSES_AT_A_TIME = 2 ** 13
# Largest step that keeps classes apart, in units of 1 / `_curvature`: about one over the energy's largest curvature.
# From two over it on, the steps would overshoot and scatter the classes.
_LONGEST = 1.5
# Number of classes whose repulsion one step computes: all of them up to here, beyond it one block after the other.
_BLOCK = 128


class PrototypePlacement:
    """Moves class vectors (C, d) down the gradient of a classifier's loss; no parameters, no optimiser.

    With unit embeddings z_i, (soft) targets y_ic, the class frequencies f_c seen so far, and the probabilities
    pi_ic of `scale * <z_i, v_c> + log f_c`, a batch of B samples moves each unit class vector to

        v_c <- u_c / |u_c|,    u_c = v_c + r_c P_c (1 / B * sum_i (y_ic - pi_ic) z_i - e / scale * dU/dv_c)

    where P_c is the projection onto the tangent space at v_c and U is the paper's uniformity, the log of the mean of
    exp(-2 |v_b - v_c|^2) over the pairs (DL2PA, Eq. 4-5). The first term is, over the scale, the direction in which the
    cross-entropy of a classifier with these vectors falls, each class's frequency allowed for (Menon et al. 2021, logit
    adjustment); the second, with the evenness e, spreads them. The step is `r_c = 0.3 (1 - s) / sqrt(f_c / B + f_c^2)`:
    the root is that of the mean square that the first term has while all samples of a class are missed and lie in one
    direction (n_c of them in a batch, and the mean of n_c^2 is B f_c + B^2 f_c^2). So it does not depend on how many
    classes there are, how often a class is seen and what the scale is. What the class vectors move gets shorter as the
    samples are classified, and with s, the share of the warm-up that is over: they have come to rest when they are
    fixed. Where s is not known, `1 / (1 + n / 50)` stands in for `1 - s`, after n samples per class. r_c is at most
    1.5 B (1 - s), so that no sample moves a vector by more than 1.5, and r_c e C / scale at most about one over the
    largest curvature of C * U at an evenly spread set. A step that is not finite leaves a vector where it is.

    Of more than 8,192 classes a batch moves its own and a sample of 1,024 others: sums over classes are estimated, and
    each sampled class's step is as many times as long as it stands for classes (`ClassSampler`). Then time and memory
    do not grow with C.

    In a distributed run every process has the same vectors: the batches are added up.

    Args:
        num_classes: C.
        evenness: Weight of the second term, at least 0 and finite. 0: nothing keeps prototypes apart but the classes.
        seed: Of the samples of classes.
        device: Where the counts (C,) live, float32.
    """

    def __init__(self, num_classes: int, evenness: float, seed: int = 0, device: torch.device | str | None = None):
        self.num_classes = num_classes
        self.evenness = evenness
        self.counts: torch.Tensor = torch.zeros(num_classes, device=device, dtype=torch.float32)
        self.seen = torch.zeros((), device=device, dtype=torch.float32)
        self.steps = 0
        self._sampler = ClassSampler(num_classes, NUM_SAMPLED, seed) if num_classes > MANY_CLASSES else None
        self._gathering = Gathering()

    def to(self, device: torch.device | str) -> 'PrototypePlacement':
        """Move what was counted, in place."""
        self.counts, self.seen = self.counts.to(device), self.seen.to(device)
        return self

    @torch.no_grad()
    def moved(
            self,
            vectors_of: Callable[[torch.Tensor], torch.Tensor],
            embeddings: torch.Tensor,
            targets: torch.Tensor,
            scale: torch.Tensor,
            share: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return classes (n,) int64, and their vectors after a batch, (n, d) float32 unit rows.

        A class that occurs twice has the same vector twice. Never waits for the device, but for the first batch of a
        distributed run with more than 8,192 classes.

        Args:
            vectors_of: Returns the vectors (n, d) of classes (n,), unit rows, float32.
            embeddings: (B, d) unit rows.
            targets: As for `ClassMeans.add`.
            scale: (), the factor on the cosines in the logits.
            share: Of the warm-up that is over, from 0 to 1; None where nobody knows.

        Raises:
            RuntimeError: There are more than 8,192 classes, and a process of a distributed run has a larger batch than
                any had at first.
        """
        embeddings = embeddings.float()
        parts = list(shares_of(targets, self.num_classes))
        labels, shares = (torch.cat(part) for part in zip(*parts))
        sample, rows, counted = self._classes(labels, shares)
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = vectors_of(sample.classes)
            prior = (self.counts[sample.classes] + 1).log() + sample.log_weights
            probabilities = (scale * embeddings @ vectors.t() + prior).softmax(dim=1)
            size = self._count(*counted)
            rates = self._rates(sample.classes, size, share)
            # Factors go onto the few embeddings and the block, so that few passes over (n, d) are left.
            pull = embeddings / size.clamp_min(1e-6)
            step = (sum(share for _, share in parts) * probabilities).t() @ -pull
            step.index_add_(0, rows, shares * pull.repeat(len(parts), 1))
            add_over_ranks(step)
            weights = sample.log_weights.exp().unsqueeze(1)
            spread = (weights * rates * (self.evenness / self.num_classes) / scale).clamp(
                max=_LONGEST / _curvature(self.num_classes, vectors.shape[1]))
            kernel, chosen = self._repulsion(vectors, weights)
            step.mul_(rates).sub_(spread * (kernel @ chosen))
            step.sub_((step * vectors).sum(dim=1, keepdim=True) * vectors).add_(vectors)
            length = step.norm(dim=1, keepdim=True)
        self.steps += 1
        moved = torch.where(length.isfinite(), step.div_(length), vectors)
        return sample.classes, moved if self._sampler is None else moved[sample.rows]

    def _classes(self, labels: torch.Tensor, shares: torch.Tensor) -> tuple[
            ClassSample, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Return the classes that a batch moves, the rows in them of its labels (m,), and the labels with their shares
        (m, 1) of all processes."""
        if self._sampler is None:
            every = torch.arange(self.num_classes, device=labels.device)
            counts = torch.zeros_like(self.counts).index_add_(0, labels, shares.squeeze(1))
            add_over_ranks(counts)
            return ClassSample(every, torch.zeros_like(counts), every), labels, (every, counts.unsqueeze(1))
        own, (labels, shares) = self._gathering(labels, shares)
        sample = self._sampler(labels, shares.squeeze(1) > 0)
        return sample, sample.rows[own], (labels, shares)

    def _count(self, labels: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Count a batch, and return its size, ()."""
        self.counts.index_add_(0, labels, shares.squeeze(1))
        size = shares.sum()
        self.seen += size / self.num_classes
        return size

    def _rates(self, classes: torch.Tensor, size: torch.Tensor, share: float | None) -> torch.Tensor:
        """Return the steps (n, 1) of classes (n,) for a batch of `size` when that share of the warm-up is over."""
        in_a_batch = size * (self.counts[classes] + 1) / (self.num_classes * (self.seen + 1))
        of_a_sample = (_STEP * (in_a_batch * (1 + in_a_batch)).rsqrt()).clamp(max=_STEP_OF_A_SAMPLE)
        rates = (size * of_a_sample).unsqueeze(1)
        return rates / (1 + self.seen / _HALVED_AFTER) if share is None else rates * (1 - share)

    def _repulsion(self, vectors: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors, (n, m) and (m, d), of C times the gradient of the uniformity; of many classes, its
        estimate from a block.

        Args:
            vectors: (n, d) unit rows.
            weights: (n, 1), the number of classes that each row stands for.
        """
        count = len(vectors)
        others = torch.arange(min(count, _BLOCK), device=vectors.device)
        if self._sampler is not None:
            others += count - len(others)  # sampled ones, not the batch's
        elif count > _BLOCK:
            others = (others + self.steps * _BLOCK) % count
        chosen = vectors[others]
        kernel = (UNIFORMITY * (vectors @ chosen.t() - 1)).exp_()
        kernel.scatter_(0, others.unsqueeze(0), 0.0)  # of a class with itself; brackets would wait for the device
        kernel *= weights[others].t() > 0
        return kernel, 2 * UNIFORMITY * self.num_classes / (weights.t() @ kernel).sum() * chosen

    def state_dict(self) -> dict[str, torch.Tensor | float]:
        """Return the counts (C,), as a copy on the CPU, and plain numbers. The vectors are the model's."""
        return {'counts': self.counts.cpu().clone(), 'seen': float(self.seen), 'steps': self.steps}

    def load_state_dict(self, state: dict[str, torch.Tensor | float]) -> None:
        """Take over a state; all processes load the same one."""
        self.counts = state['counts'].to(self.counts.device, copy=True)
        self.seen = torch.full_like(self.seen, state['seen'])
        self.steps = state['steps']
        if self._sampler is not None:
            self._sampler.step.fill_(self.steps)


def default_evenness(num_classes: int, dim: int) -> float:
    """Return how strongly prototypes are kept apart by default: 0.4 (d / C)^2, at most 0.4.

    Fitted in trials (`benchmarks/results/accuracy_trials.md`): the fewer dimensions there are to each class, the less
    even spread helps. From d = C on, where the even set is a simplex, more dimensions change nothing.
    """
    return 0.4 * min(dim / num_classes, 1) ** 2


def check_evenness(evenness: float) -> None:
    """Raise a ValueError unless it is a finite number of at least 0."""
    if not 0 <= real_number('evenness', evenness) < math.inf:
        raise ValueError(f"evenness must be a finite number of at least 0, not {evenness!r}. (Exactly even prototypes: "
                         f"recipe 'even'.)")


def _curvature(num_classes: int, dim: int) -> float:
    """Return a bound on the curvature of C * U at an evenly spread set: of its pull to a common mean, and of its change
    with the distances, both at their largest. At a simplex of 3 to 10 classes it is 1.4 to 1.5 times the largest."""
    dim = min(dim, num_classes - 1)
    return 2 * UNIFORMITY * num_classes / (num_classes - 1) * (1 + 2 * UNIFORMITY / dim)


class PlacedWarmup(Warmup):
    """Moves the prototypes of the classes after each batch, and at its end once more by the class means.

    A head, and a checkpoint of it, always has the prototypes that it is trained with.

    Args:
        heads: See `Warmup`.
        evenness: See `PrototypePlacement`. Default: `default_evenness`.

    Raises:
        ValueError: `evenness` is out of range.
    """
    name = 'placed'
    moves_prototypes = True

    def __init__(self, heads: Sequence[DL2PAHead], evenness: float | None = None):
        super().__init__(heads)
        head = heads[0]
        if evenness is None:
            evenness = default_evenness(head.num_classes, head.dim)
        check_evenness(evenness)
        self.placement = PrototypePlacement(head.num_classes, evenness, head.config.seed, head.prototypes.device)

    @property
    def settings(self) -> dict[str, float]:
        """`evenness`."""
        return {'evenness': float(self.placement.evenness)}

    def add(self, embeddings: torch.Tensor, targets: torch.Tensor, share: float | None = None) -> None:
        """Move the prototypes by a batch. See `Warmup.add`."""
        head = self.heads[0]
        scale = head.training_view.scale
        if scale is None:  # no forward came: the embeddings are given
            scale = head.current_scale().detach()
        self.placement.to(embeddings.device)
        classes, vectors = self.placement.moved(head.vectors_of, embeddings, targets, scale, share)
        for head in self.heads:
            head.move_class_prototypes(vectors, classes)

    def weight(self, batches: int) -> float:
        """Let samples count by the square of the time, so that the class means are those of the end."""
        return (batches + 1.0) ** 2

    def solve(self, class_means: ClassMeans) -> tuple[AssignmentResult, torch.Tensor | None]:
        """Move the prototypes once more, by the class means, and return the assignment in force.

        Those of classes with few samples lag behind their embeddings. With n samples, the prototype v, and the unit
        direction m in which the class mean lies from the mean of all, they come to v + m / (1 + (n / 50)^2),
        normalised. On the training's device, some thousand classes at a time: there may be very many.
        """
        head, counts, before, after = self.heads[0], self.placement.counts, 0.0, 0.0
        parts = torch.arange(head.num_classes, device=counts.device).split(_CLASSES_AT_A_TIME)
        seen = (counts > 0).unsqueeze(1)
        # Early in training all embeddings lie in a narrow cone: what tells classes apart is where they lie in it.
        centre = sum(normalize(class_means.sums[part], dim=1).sum(dim=0) for part in parts) / seen.sum().clamp_min(1)
        for part in parts:
            means = normalize(seen[part] * (normalize(class_means.sums[part], dim=1) - centre), dim=1)
            weights = 1 / (1 + (counts[part].unsqueeze(1) / _MEAN_HALVED_AFTER) ** 2)
            old = head.vectors_of(part)
            new = normalize(old + weights * means, dim=1)
            before, after = before + (means * old).sum(), after + (means * new).sum()
            for each in self.heads:
                each.move_class_prototypes(new, part)
        return AssignmentResult(head.assignment.cpu(), 0, float(before), float(after)), None

    def state_dict(self) -> dict[str, Any]:
        """See `Warmup.state_dict`. The prototypes are the model's."""
        return self.placement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Warmup.load_state_dict`."""
        self.placement.load_state_dict(state)
