"""ClassWeights: how much the samples of each class count in a loss, given or from their frequencies."""
from typing import Literal

import torch
import torch.nn as nn

from .targets import counted

__all__ = ['ClassWeights']


class ClassWeights(nn.Module):
    """Holds the weight of each class, as given; or with 'auto' the inverse of the frequencies that it counts.

    'auto' gives class c the weight `mean(n) / n_c`, where n_c is one more than its number of samples so far (soft
    targets count by their shares). So the weights of the samples have the mean 1, and the learning rate still fits.
    Samples are counted while gradients are enabled. Each process of a distributed run counts its own, which are about
    proportional.

    The weights act on the loss alone. Class means and the assignment do not depend on them: a class mean is a
    direction, and each class counts once in the assignment's objective.

    Buffers: `given` (C,) float32, not saved; with 'auto' `counts` (C,) float32, in the state dict.

    Args:
        num_classes: C.
        weights: (C,) numbers of at least 0, not all 0; or 'auto'; or None for no weights.
        ignore_index: The label of samples that do not count.

    Raises:
        ValueError: The weights are none of these.
    """

    given: torch.Tensor | None
    counts: torch.Tensor | None

    def __init__(self, num_classes: int, weights: torch.Tensor | Literal['auto'] | None, ignore_index: int = -100):
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        automatic = isinstance(weights, str) and weights == 'auto'
        if weights is not None and not automatic:
            weights = self._checked(weights)
        self.register_buffer('counts', torch.ones(num_classes, dtype=torch.float32) if automatic else None)
        self.register_buffer('given', None if automatic else weights, persistent=False)

    def _checked(self, weights: torch.Tensor) -> torch.Tensor:
        try:
            found = torch.as_tensor(weights).detach().float().clone()
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        if found.shape != (self.num_classes,) or not bool((found.isfinite() & (found >= 0)).all()) or not found.any():
            raise ValueError(f"class_weights must be {self.num_classes} finite numbers of at least 0, one for each "
                             f"class and not all 0, or 'auto', not {weights!r}.")
        return found

    def forward(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Return the weights (C,), float32, on the targets' device, or None; with 'auto', count the targets first.

        Args:
            targets: (B,) int64 or (B, C) float32, checked.
        """
        held = self.given if self.counts is None else self.counts
        if held is None:
            return None
        if held.device != targets.device:
            self.to(targets.device)
        if self.counts is None:
            return self.given
        if torch.is_grad_enabled():
            self.counts = counted(self.counts, targets, self.ignore_index)
        return self.counts.mean() / self.counts

    def extra_repr(self) -> str:
        return 'auto' if self.counts is not None else f'num_classes={self.num_classes}'
