"""TrainingView: what a training hears of a head, and what stands in for its prototypes."""
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['TrainingView']


class TrainingView:
    """The runtime-only side of a head: who hears of its forwards, and class vectors that stand in for its prototypes.

    A head has one; every copy of the head (deepcopy, pickle, an EMA) has a new one, so that a copy reports to nobody.
    Nothing of it is saved.

    Attributes:
        on_features: Called with the detached features (B, in_features) of each forward: for priming.
        on_forward: Called with the detached unit embeddings (B, d) and the detached output of each forward in training
            mode.
        on_mode: Called with the new mode at each `train()` and `eval()`.
        class_vectors: (C, d) float32 unit rows that take the prototypes' place in training mode, or None.
        warming_up: Whether a warm-up is under way: the class vectors of training still move.
        warmup_loss: The loss that this warm-up needs, 'cross_entropy', or None.
        compiled: Whether the last forward was one of `torch.compile`.
    """

    def __init__(self) -> None:
        self.on_features: Callable[[torch.Tensor], None] | None = None
        self.on_forward: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.on_mode: Callable[[bool], None] | None = None
        self.class_vectors: torch.Tensor | None = None
        self.warming_up = False
        self.warmup_loss: str | None = None
        self.compiled = False
        self._owner: Any = None

    def attach(self, owner: Any) -> None:
        """Make an object the one that sets this view. The one that did before leaves its warm-up, and hears no more.

        Args:
            owner: Something with `leave_warmup()`.
        """
        before, self._owner = self._owner, owner
        if before is not None and before is not owner:
            before.leave_warmup()
            self.on_forward = None
