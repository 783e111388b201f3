"""SchedulerInLoop: an AssignmentScheduler in a training loop that is not the user's own."""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from ..head import heads_of
from ..scheduling import AssignmentScheduler, AssignmentUpdate

__all__ = ['SchedulerInLoop']


class SchedulerInLoop:
    """What the callbacks of all frameworks do: make a scheduler or take one, tell it of batches and epochs, save it.

    Epochs are told by their numbers. A checkpoint may be written between the last batch of an epoch and its end, and
    whether a framework then ends that epoch after resuming differs: an epoch whose end was not told is ended when
    another begins.

    Args:
        scheduler: The scheduler, or None to make one when training begins.
        options: Its arguments, where it is to be made.

    Raises:
        TypeError: The scheduler is none.
        ValueError: Both are given.
    """

    def __init__(self, scheduler: AssignmentScheduler | None, options: dict[str, Any]):
        if scheduler is not None and not isinstance(scheduler, AssignmentScheduler):
            raise TypeError(f'scheduler must be an AssignmentScheduler, not {type(scheduler).__name__}.')
        if scheduler is not None and options:
            raise ValueError(f'{", ".join(options)}: a scheduler that is given has these already. Leave out one of '
                             f'the two.')
        self.scheduler = scheduler
        self._options = options
        self._own = scheduler is None
        self._epoch: int | None = None  # the one that has begun and not ended
        self._state: dict[str, Any] | None = None  # which waits for the scheduler

    def begin(self, model: nn.Module, total: Callable[[], int | str | None]) -> None:
        """Make the scheduler, if it is not there, and let it take over a state that was loaded.

        Args:
            model: The model, wrapped by the framework or not.
            total: Tells the length of the training, for a scheduler that is made without one.

        Raises:
            ValueError: The scheduler is of another model, or it refuses an argument or the state.
        """
        heads = heads_of(model)
        if self.scheduler is not None and not (heads and self.scheduler.heads[0] is heads[0]):
            if not self._own:
                raise ValueError('the scheduler is of another model than the one that is trained: make it with the '
                                 'model that the trainer gets.')
            self.scheduler = None
        if self.scheduler is None:
            options = self._options if 'total' in self._options else {**self._options, 'total': total()}
            self.scheduler = AssignmentScheduler(model, **options)
        self.scheduler.announce_epochs()
        if self._state is not None:
            self.scheduler.load_state_dict(self._state['scheduler'])
            self._epoch = self._state['epoch']
            self._state = None

    def step(self, targets: Any, output: torch.Tensor | None = None) -> AssignmentUpdate | None:
        """Fold a batch in: see `AssignmentScheduler.step`."""
        return self.scheduler.step(targets, output)

    def begin_epoch(self, number: int) -> None:
        """Tell which epoch begins, or goes on after resuming."""
        if self._epoch is not None and self._epoch != number:
            self.end_epoch()
        self._epoch = number

    def end_epoch(self) -> None:
        """Tell that the epoch is over."""
        if self._epoch is not None:
            self.scheduler.epoch_end()
        self._epoch = None

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; empty before training. In a distributed run every process must call it."""
        if self.scheduler is None or self._state is not None:
            return self._state or {}
        self.scheduler.merge()
        return {'scheduler': self.scheduler.state_dict(), 'epoch': self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until `begin`.

        Raises:
            ValueError: It is no state of this.
        """
        if state and state.keys() != {'scheduler', 'epoch'}:
            raise ValueError(f"the saved state of the callback must have 'scheduler' and 'epoch', not "
                             f'{", ".join(map(str, state))}.')
        self._state = state or None
