"""The warm-up 'rotated': training towards running class means, to which the even set is then rotated and matched."""
from collections.abc import Sequence
from typing import Any

import torch

from ..assignment import MAX_SCORES, AssignmentResult, align_prototypes
from ..head import DL2PAHead
from .class_means import ClassMeans, MovingClassMeans
from .warmup import Warmup

__all__ = ['RotatedWarmup']

# About the last 50 samples of a class count: few enough to follow a young network, enough to average noise away.
_MEMORY = 0.98


class RotatedWarmup(Warmup):
    """Trains towards the directions of running class means; at its end it rotates the prototypes as a whole.

    The set stays as evenly spread as it was: `align_prototypes` finds the rotation and the assignment that fit the
    class means best. In evaluation the head classifies by its prototypes, which before the end is no better than
    chance.

    Args:
        heads: See `Warmup`.

    Raises:
        ValueError: There are too many classes for the rotation, which holds all C x K scores.
    """
    name = 'rotated'

    def __init__(self, heads: Sequence[DL2PAHead]):
        super().__init__(heads)
        head = heads[0]
        if head.num_classes * len(head.prototypes) > MAX_SCORES:
            raise ValueError(f'{head.num_classes} classes by {len(head.prototypes)} prototypes are too many for the '
                             f"rotation at the end of the warm-up 'rotated', which holds all scores (at most "
                             f"{MAX_SCORES}). Use recipe='placed', or warmup='none'.")
        self.class_means = MovingClassMeans(head.num_classes, head.dim, _MEMORY, device=head.prototypes.device)

    def begin(self) -> None:
        """See `Warmup.begin`."""
        super().begin()
        self._give_vectors()

    def _give_vectors(self) -> None:
        # A new tensor each time: a backward pass that is still to come may need the old one.
        vectors = self.class_means.centred_directions()
        for head in self.heads:
            head.training_view.class_vectors = vectors

    def add(self, embeddings: torch.Tensor, targets: torch.Tensor, share: float | None = None) -> None:
        """See `Warmup.add`."""
        self.class_means.to(embeddings.device).add(embeddings, targets)
        self._give_vectors()

    def solve(self, class_means: ClassMeans) -> tuple[AssignmentResult, torch.Tensor | None]:
        """Rotate and match, in turns, by the running class means. See `Warmup.solve`."""
        head, means = self.heads[0], self.class_means.centred_directions()
        aligned = align_prototypes(means, head.prototypes, seed=head.config.seed)
        before = head.assignment.cpu()
        return AssignmentResult(
            assignment=aligned.assignment,
            moved=int((aligned.assignment != before).sum()),
            objective_before=float((means.double() * head.class_prototypes.double()).sum()),
            objective=aligned.objective,
        ), aligned.prototypes

    def state_dict(self) -> dict[str, Any]:
        """See `Warmup.state_dict`."""
        return self.class_means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Warmup.load_state_dict`."""
        self.class_means.load_state_dict({name: state[name] for name in self.class_means.state_dict()})
        self._give_vectors()
