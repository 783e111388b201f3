"""TrainingView: what a training hears of a head, and what stands in for its prototypes."""
from collections.abc import Callable
from typing import Any

import torch

from .numerics import plain_tensor

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
        scale: The detached factor on the cosines, () float32, of the last forward that `on_forward` heard of. A
            learned one that is sharded (FSDP) is whole during a forward alone.
        compiled: Whether the last forward was one of `torch.compile`.
    """

    def __init__(self) -> None:
        self.on_features: Callable[[torch.Tensor], None] | None = None
        self.on_forward: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.on_mode: Callable[[bool], None] | None = None
        self.class_vectors: torch.Tensor | None = None
        self.warming_up = False
        self.warmup_loss: str | None = None
        self.scale: torch.Tensor | None = None
        self.compiled: bool = False
        self._owner: Any = None

    def hear(self, features: torch.Tensor, embeddings: torch.Tensor, output: torch.Tensor, scale: torch.Tensor, *,
             training: bool, replica: bool) -> None:
        """Tell those who want to hear of a forward.

        Args:
            features: (B, in_features).
            embeddings: (B, d).
            output: What the head returns.
            scale: ().
            training: Whether the head is in training mode.
            replica: Whether the head is a replica that `nn.DataParallel` made for one forward of a part of the batch.

        Raises:
            RuntimeError: Somebody wants to hear of a replica.
        """
        self.compiled = torch.compiler.is_compiling()
        on_forward = self.on_forward if training else None
        if replica and (self.on_features is not None or on_forward is not None):
            raise RuntimeError('an AssignmentScheduler does not work with nn.DataParallel, whose replicas see parts of '
                               'each batch and are thrown away: use DistributedDataParallel, or one device.')
        if self.on_features is not None:
            self.on_features(plain_tensor(features.detach()))
        if on_forward is not None:
            self.scale = scale.detach()
            on_forward(plain_tensor(embeddings.detach()), plain_tensor(output.detach()))

    def attach(self, owner: Any) -> None:
        """Make an object the one that sets this view. The one that did before leaves its warm-up, and hears no more.

        Args:
            owner: Something with `leave_warmup()`.
        """
        before, self._owner = self._owner, owner
        if before is not None and before is not owner:
            before.leave_warmup()
            self.on_forward = None

    def detach(self) -> None:
        """Let nobody set this view, or hear of it."""
        self.attach(None)
        self.on_features = self.on_mode = None
