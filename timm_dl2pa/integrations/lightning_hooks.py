"""LightningHooks: the hooks of Lightning's callback, whichever of its two packages the callback is for."""
import math
from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch.optim.swa_utils import AveragedModel

from ..head import heads_of
from ..head.averages import copy_class_vectors
from ..scheduling import AssignmentScheduler
from ..scheduling.batches import split_batch
from .logs import log_update
from .loop import SchedulerInLoop

__all__ = ['LightningHooks']


class LightningHooks:
    """A Lightning callback that runs an `AssignmentScheduler`: `Trainer(callbacks=[DL2PACallback()])`.

    The targets are taken from the batch, a pair (images, targets) or a mapping (see `prime`). Where `training_step`
    makes them itself (mixup), or the batch is of another kind, it returns `{'loss': loss, 'targets': targets}`; after
    several forwards in training mode also `'output'`, that of the model which the targets are for.

    The scheduler's state is saved in Lightning's checkpoints, and a training resumed from one goes on to the bit. In
    averages by Lightning's `WeightAveraging` and `EMAWeightAveraging`, prototypes and assignment are those of the model
    in training, whatever `use_buffers` is: averages of labels have no meaning.

    Args:
        scheduler: Of the module's model. Default: one is made when training begins.
        log: Write re-solves to the trainer's loggers, at the trainer's `global_step`: see `log_update`.
        options: Arguments of the `AssignmentScheduler` that is made. `total` is by default the length of the training,
            where the trainer knows it.

    Attributes:
        scheduler: The scheduler; None before training, if it is made then.

    Raises:
        TypeError: `scheduler` is no AssignmentScheduler.
        ValueError: Both a scheduler and options are given.
    """

    def __init__(self, scheduler: AssignmentScheduler | None = None, *, log: bool = False, **options: Any):
        super().__init__()
        self._loop = SchedulerInLoop(scheduler, options)
        self.log_updates = log

    @property
    def scheduler(self) -> AssignmentScheduler | None:
        """The scheduler; None before training, if it is made then."""
        return self._loop.scheduler

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._loop.begin(pl_module, lambda: _batches_of(trainer))

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._loop.begin_epoch(trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        output = None
        if isinstance(outputs, Mapping) and 'targets' in outputs:
            targets, output = outputs['targets'], outputs.get('output')
        else:
            targets = split_batch(batch)[1]
        update = self._loop.step(targets, output)
        if self.log_updates:
            for logger in trainer.loggers:
                log_update(update, logger.log_metrics, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self._loop.end_epoch()
        _update_averages(trainer, pl_module)

    # An average is updated by a callback that may come before this one or after it. These come after all updates and
    # before the average is used.
    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        _update_averages(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        _update_averages(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        _update_averages(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self._loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loop.load_state_dict(state_dict)


def _batches_of(trainer: Any) -> int | None:
    """Return the number of batches of a training; None where it has no end, or the loader no length."""
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * trainer.num_training_batches)
    if trainer.max_steps >= 0:
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    batches = min(ends, default=math.inf)
    return int(batches) if 1 <= batches < math.inf else None


def _update_averages(trainer: Any, pl_module: nn.Module) -> None:
    """Give the averages that callbacks keep of the module its prototypes and assignment."""
    for callback in trainer.callbacks:
        average = getattr(callback, '_average_model', None)
        if isinstance(average, AveragedModel):
            for head, averaged in zip(heads_of(pl_module), heads_of(average.module)):
                copy_class_vectors(head, averaged)
