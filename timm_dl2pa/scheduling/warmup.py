"""Warmup: what an AssignmentScheduler does to the class vectors of a young network, before labels alone move."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..assignment import AssignmentResult
from ..head import DL2PAHead
from .class_means import ClassMeans

__all__ = ['Warmup']


class Warmup(ABC):
    """The first part of a training, in which class vectors follow the embeddings.

    A scheduler calls `begin` once, `add` for each batch, `solve` (on rank 0) and `end` when the warm-up's length has
    passed; it knows no subclass by name. A subclass has a table of its settings, which are saved with its state.

    Class attributes:
        name: The word for it, as in `AssignmentScheduler(warmup=...)` and in `AssignmentUpdate.event`.
        loss: The loss that it needs, whatever loss the training has: where class vectors follow the embeddings, a loss
            of distances alone is least where all embeddings are one.
        moves_prototypes: Whether it moves the heads' prototypes after each batch. Then class means begin again at its
            end: what was summed is of embeddings that followed moving prototypes.

    Args:
        heads: The heads of the model; the first is observed, all get the same class vectors.
    """
    name: ClassVar[str]
    loss: ClassVar[str] = 'cross_entropy'
    moves_prototypes: ClassVar[bool] = False

    def __init__(self, heads: Sequence[DL2PAHead]):
        self.heads = heads

    @property
    def settings(self) -> dict[str, float]:
        """What decides its course, as plain numbers by name."""
        return {}

    def begin(self) -> None:
        """Tell the heads that it is under way."""
        for head in self.heads:
            head.training_view.warming_up = True
            head.training_view.warmup_loss = self.loss

    @abstractmethod
    def add(self, embeddings: torch.Tensor, targets: torch.Tensor, share: float | None = None) -> None:
        """Fold a batch in; never waits for the device. In a distributed run every process must call it.

        Args:
            embeddings: (B, d) unit rows.
            targets: (B,) or (B, C), on their device.
            share: Of the warm-up that is over, from 0 to 1; None where nobody knows.
        """

    def weight(self, batches: int) -> float:
        """Return how much a sample counts in the class means of `solve` that comes after so many batches."""
        return 1.0

    @abstractmethod
    def solve(self, class_means: ClassMeans) -> tuple[AssignmentResult, torch.Tensor | None]:
        """Return the assignment at its end, and the prototypes (K, d) if they all change with it.

        On rank 0 alone, whose prototypes are sent to all processes after it: it may move those of the classes.

        Args:
            class_means: Those that the scheduler kept, merged, on the device of the prototypes.
        """

    def end(self) -> None:
        """Leave the heads to their prototypes."""
        for head in self.heads:
            head.training_view.warming_up = False
            head.training_view.warmup_loss = None
            head.training_view.class_vectors = None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: tensors on the CPU and plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state; all processes load the same one."""

    def saved_state(self) -> dict[str, Any]:
        """Return the state with the name and the settings of the warm-up that it is of."""
        return {'name': self.name, 'settings': self.settings, **self.state_dict()}

    def resume(self, state: dict[str, Any]) -> None:
        """Begin, and go on from a checked state."""
        self.begin()
        self.load_state_dict(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless a state is of this kind of warm-up, of its settings, and complete."""
        own = self.saved_state()
        if state.get('name') != self.name:
            raise ValueError(f"the saved state is of the warm-up {state.get('name')!r}, not {self.name!r}: make the "
                             f'scheduler with the recipe that it was saved with.')
        missing = sorted(own.keys() ^ state.keys())
        if missing:
            raise ValueError(f"the saved state of the warm-up {self.name!r} lacks, or does not know, "
                             f'{", ".join(missing)}.')
        for name, value in self.settings.items():
            if state['settings'].get(name) != value:
                raise ValueError(f"the saved state of the warm-up {self.name!r} has {name}="
                                 f"{state['settings'].get(name)!r}, the scheduler {value!r}: make it with the same.")
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and getattr(state[name], 'shape', None) != value.shape:
                raise ValueError(f"the saved state of the warm-up {self.name!r} is of another head: {name} has the "
                                 f"shape {tuple(getattr(state[name], 'shape', ()))}, not {tuple(value.shape)}.")
