"""BackboneModes: runs a backbone in evaluation mode, or as it will be trained, and leaves no trace."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from ..distributed import is_distributed
from ..head import DL2PAHead

__all__ = ['BackboneModes']


class BackboneModes:
    """Switches a model between evaluation mode and the modes that its modules are in, which are those of its training.

    Not by `train()` and `eval()`, which a training task takes for the end of an epoch. Heads and their necks stay in
    evaluation mode. What a forward in training mode changes is restored: running statistics and random states.

    Args:
        model: The model.
        heads: Its heads.

    Attributes:
        may_differ: Whether a module of the backbone is in training mode, and nothing showed yet that this makes no
            difference.
    """

    def __init__(self, model: nn.Module, heads: Sequence[DL2PAHead]):
        own = {module for head in heads for module in (head, *head.neck.modules())}
        self._modes = {module: module.training for module in model.modules()}
        self._trained = [module for module, training in self._modes.items() if training and module not in own]
        self._device = heads[0].prototypes.device
        # Its statistics are of all processes, whose numbers of batches may differ.
        synchronised = is_distributed() and any(isinstance(module, nn.SyncBatchNorm) for module in self._trained)
        self.may_differ = bool(self._trained) and not synchronised

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put all modules in evaluation mode; afterwards they are as they were."""
        try:
            for module in self._modes:
                module.training = False
            yield
        finally:
            for module, training in self._modes.items():
                module.training = training

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put the backbone's modules in the modes that they were in."""
        buffers = [(buffer, buffer.clone()) for module in self._trained for buffer in module.buffers(recurse=False)]
        devices = [self._device] if self._device.type == 'cuda' else []
        with self.evaluation(), torch.random.fork_rng(devices=devices):
            for module in self._trained:
                module.training = True
            try:
                yield
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)

    def differ(self, features: Sequence[torch.Tensor], in_training: Sequence[torch.Tensor]) -> bool:
        """Return whether the heads' features differ between the modes; if not, `may_differ` is false from then on."""
        self.may_differ = any(bool((one - other).norm() > 1e-3 * one.norm())
                              for one, other in zip(features, in_training))
        return self.may_differ
