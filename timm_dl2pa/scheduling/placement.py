"""The warm-up 'placed': prototypes follow the embeddings of their classes, and the paper's energy keeps them apart."""
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..assignment import AssignmentResult
from ..distributed import add_over_ranks
from ..head import DL2PAHead
from ..prototypes.energy import UNIFORMITY
from ..values import real_number
from .targets import shares_of
from .warmup import Warmup

__all__ = ['PlacedWarmup', 'PrototypePlacement', 'check_evenness', 'default_evenness']

# A class vector follows about the last 5.5 samples of its class, and a ninth of all seen so far. So it moves fast while
# the network is young, and at the end of the warm-up it averages over many samples.
_MEMORY = 5.5
_MEMORY_SHARE = 1 / 9
# Samples per class that one batch counts for, at most. Where classes are few, faster starts overshoot.
_LARGEST = 0.5
# Largest step that keeps classes apart, in units of 1 / `_curvature`: about one over the energy's largest curvature.
# From two over it on, the steps would overshoot and scatter the classes.
_LONGEST = 1.5
# Number of classes whose repulsion one step computes: all of them up to here, beyond it one block after the other.
_BLOCK = 128


class PrototypePlacement:
    """Moves class vectors (C, d) along a running statistic of the embeddings; no parameters, no optimiser.

    With unit embeddings z_i, (soft) targets y_ic, the class frequencies f_c seen so far, and the probabilities
    pi_ic of `scale * <z_i, v_c> + log f_c`, a batch of B samples moves each unit class vector to

        v_c <- u_c / |u_c|,    u_c = v_c + r * scale * C / B * sum_i (y_ic - pi_ic) z_i - e * C * dU/dv_c

    where U is the paper's uniformity, the log of the mean of exp(-2 |v_b - v_c|^2) over the pairs (DL2PA, Eq. 4-5),
    r = b / (5.5 + n / 9), with b = min(B / C, 0.5) and n the sum of the b before, and e = r * evenness, but no more
    than about one over the largest curvature of C * U at an evenly spread set. The first term is the direction in which
    the cross-entropy of a classifier with these vectors falls, each class's frequency allowed for (Menon et al. 2021,
    logit adjustment); the second spreads them. A step that is not finite, or ends in the origin, leaves a vector where
    it is.

    In a distributed run every process has the same vectors: the batches are added up.

    Args:
        num_classes: C.
        evenness: Weight of the second term, at least 0 and finite. 0: nothing keeps prototypes apart but the classes.
        device: Where the counts (C,) live, float32.
    """

    def __init__(self, num_classes: int, evenness: float, device: torch.device | str | None = None):
        self.num_classes = num_classes
        self.evenness = evenness
        self.counts = torch.zeros(num_classes, device=device, dtype=torch.float32)
        self.seen = torch.zeros((), device=device, dtype=torch.float32)
        self.steps = 0

    def to(self, device: torch.device | str) -> 'PrototypePlacement':
        """Move what was counted, in place."""
        self.counts, self.seen = self.counts.to(device), self.seen.to(device)
        return self

    @torch.no_grad()
    def moved(
            self,
            vectors: torch.Tensor,
            embeddings: torch.Tensor,
            targets: torch.Tensor,
            scale: torch.Tensor,
    ) -> torch.Tensor:
        """Return the class vectors after a batch, (C, d) float32 unit rows; never waits for the device.

        Args:
            vectors: (C, d) unit rows, float32.
            embeddings: (B, d) unit rows.
            targets: As for `ClassMeans.add`.
            scale: (), the factor on the cosines in the logits.
        """
        embeddings = embeddings.float()
        counts, weights = torch.zeros_like(self.counts), torch.zeros_like(embeddings[:, :1])
        shares = []
        for labels, share in shares_of(targets, self.num_classes):
            counts.index_add_(0, labels, share.squeeze(1))
            weights += share
            shares.append((labels, share))
        # Factors go onto the few embeddings and the block, so that few passes over (C, d) are left.
        with torch.autocast(embeddings.device.type, enabled=False):
            probabilities = (scale * embeddings @ vectors.t() + (self.counts + 1).log()).softmax(dim=1)
            add_over_ranks(counts)
            self.counts += counts
            size = counts.sum()
            samples = (size / self.num_classes).clamp(max=_LARGEST)
            rate = samples / (_MEMORY + _MEMORY_SHARE * self.seen)
            self.seen += samples
            pull = rate * scale * self.num_classes / size.clamp_min(1e-6) * embeddings
            step = (weights * probabilities).t() @ -pull
            for labels, share in shares:
                step.index_add_(0, labels, share * pull)
            add_over_ranks(step)
            kernel, chosen = self._repulsion(vectors)
            spread = (rate * self.evenness).clamp(max=_LONGEST / _curvature(*vectors.shape))
            step.addmm_(kernel, -spread * chosen).add_(vectors)
            length = step.norm(dim=1, keepdim=True)
        self.steps += 1
        return torch.where(length.isfinite() & (length > 0), step.div_(length), vectors)

    def _repulsion(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors, (C, n) and (n, d), of C times the gradient of the uniformity; for very many classes, of its
        estimate from a block."""
        count = len(vectors)
        others = torch.arange(min(count, _BLOCK), device=vectors.device)
        if count > _BLOCK:
            others = (others + self.steps * _BLOCK) % count
        chosen = vectors[others]
        kernel = (UNIFORMITY * (vectors @ chosen.t() - 1)).exp_()
        kernel[others, torch.arange(len(others), device=vectors.device)] = 0.0
        return kernel, 2 * UNIFORMITY * count / kernel.sum() * chosen

    def state_dict(self) -> dict[str, torch.Tensor | float]:
        """Return the counts (C,), as a copy on the CPU, and plain numbers. The vectors are the model's."""
        return {'counts': self.counts.cpu().clone(), 'seen': float(self.seen), 'steps': self.steps}

    def load_state_dict(self, state: dict[str, torch.Tensor | float]) -> None:
        """Take over a state; all processes load the same one."""
        self.counts = state['counts'].to(self.counts.device, copy=True)
        self.seen = torch.full_like(self.seen, state['seen'])
        self.steps = state['steps']


def default_evenness(num_classes: int, dim: int) -> float:
    """Return how strongly prototypes are kept apart by default: (2 d / C)^2, at most 4.

    Fitted in trials (`benchmarks/results/accuracy_trials.md`): the fewer dimensions there are to each class, the less
    even spread helps. From d = C on, where the even set is a simplex, more dimensions change nothing.
    """
    return (2 * min(dim / num_classes, 1)) ** 2


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
    """Moves the prototypes of the classes after each batch; at its end they stay where they are.

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
        self.placement = PrototypePlacement(head.num_classes, evenness, device=head.prototypes.device)

    @property
    def settings(self) -> dict[str, float]:
        """`evenness`."""
        return {'evenness': float(self.placement.evenness)}

    def add(self, embeddings: torch.Tensor, targets: torch.Tensor) -> None:
        """Move the prototypes by a batch. See `Warmup.add`."""
        head = self.heads[0]
        scale = head.training_view.scale
        if scale is None:  # no forward came: the embeddings are given
            scale = head.current_scale().detach()
        vectors = self.placement.to(embeddings.device).moved(head.class_prototypes, embeddings, targets, scale)
        for head in self.heads:
            head.move_class_prototypes(vectors)

    def solve(self, class_means: torch.Tensor) -> tuple[AssignmentResult, torch.Tensor | None]:
        """Return the assignment in force: nothing is left to solve. See `Warmup.solve`."""
        head = self.heads[0]
        objective = float((class_means * head.class_prototypes.cpu().double()).sum())
        return AssignmentResult(head.assignment.cpu(), 0, objective, objective), None

    def state_dict(self) -> dict[str, Any]:
        """See `Warmup.state_dict`. The prototypes are the model's."""
        return self.placement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Warmup.load_state_dict`."""
        self.placement.load_state_dict(state)
