"""The training task for DL2PA models in timm's scripts: updates of the assignment, checkpoint state and reports."""
import csv
import logging
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask, FeatureDistillationTask, TrainingTask

from ..distributed import solve_on_rank_0
from ..head import heads_of
from ..options import named_as_options
from ..scheduling import AssignmentScheduler, AssignmentUpdate, BackboneModes, Duration, Primer
from .creation import plugin_options
from .criterion import HEAD_LOSSES, OUR_LOSSES, make_criterion

__all__ = ['DL2PATask', 'task_class_for']

_logger = logging.getLogger(__name__)

RECORD_NAME = 'dl2pa.csv'


class DL2PATask(TrainingTask):
    """Mixin for a task class of timm, for models that were created with dl2pa_... options.

    The scheduler takes each batch in the task's forward, after a re-solve that is due. timm's script signals epochs to
    a task only through `train()` and `eval()` of the model: an epoch ends when the model returns to training mode after
    batches of training. The scheduler's state is part of the checkpoint's task state.

    In a distributed run the class means are merged where all processes pass and a checkpoint may follow: when the model
    is set to evaluation mode, and after the updates that precede recovery checkpoints.

    Attributes:
        dl2pa_options: The `PluginOptions` of the model.
        dl2pa_heads: The heads of the model, the main one first.
        assignment_scheduler: The `AssignmentScheduler` of the model.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        found = (plugin_options(module) for module in self.get_trainable_module().modules())
        options = self.dl2pa_options = next(filter(None, found))
        if getattr(self, 'multi_label', False):
            raise ValueError(f'{type(self).__name__}: a DL2PA head gives each image one class, so that multi-label '
                             f'targets have no meaning for it. Leave out the dl2pa_... options.')
        arguments = options.scheduler_arguments()
        if options.prime:
            # Priming replaces the warm-up. The options of a warm-up are ignored.
            arguments.update(warmup='none', evenness=None)
        with named_as_options():
            self.assignment_scheduler = AssignmentScheduler(self.get_trainable_module(), **arguments)
        self._primer = Primer(self.assignment_scheduler.heads) if options.prime else None
        self.dl2pa_heads = tuple(self.assignment_scheduler.heads)
        head = self.dl2pa_heads[0]
        self.criterion, loss_description = make_criterion(self.criterion, options, head)
        # In training these losses need no (B, C) logits. Other distillation tasks compare logits, and a model with
        # several classifiers averages them.
        if options.loss in HEAD_LOSSES and len(self.dl2pa_heads) == 1 \
                and isinstance(self, (ClassificationTask, FeatureDistillationTask)):
            head.config = replace(head.config, train_output='embeddings')
        self.dl2pa_heads[0].training_view.on_mode = self._on_mode
        # The batches and optimiser updates since the model was last set to training mode.
        self._batches = 0
        self._updates = 0
        self._primed_batches = 0
        self._prototypes_moved = False
        self._first_batch_checked = False
        self._merge_interval: int | None = None
        self._script_epochs: int | None = None
        self._record_path: Path | None = None
        self._record_is_complete = False
        if self.verbose:
            self._log_configuration(loss_description)

    def _log_configuration(self, loss_description: str) -> None:
        options, head, scheduler = self.dl2pa_options, self.dl2pa_heads[0], self.assignment_scheduler
        background = f' in the background, {options.lag} batches behind' if options.background else ''
        parts = [
            f'recipe {options.recipe}',
            f'{type(head).__name__} with K={len(head.prototypes)} prototypes in d={head.dim} dimensions for '
            f'{head.num_classes} classes',
            f'loss {options.loss}{loss_description}',
            'static assignment' if scheduler.stop == 0 else
            f're-solved every {scheduler.schedule}{background}, exactly',
        ]
        if options.prime:
            parts.append(f'primed by the first {options.prime} batches')
        elif scheduler.warming_up:
            length = Duration.of(options.warmup_length or scheduler.recipe.warmup_length)
            parts.append(f'after a warm-up of {length} ({scheduler.warmup.name})')
        _logger.info('DL2PA: ' + ', '.join(parts))

    def _on_mode(self, training: bool) -> None:
        if not self._batches:
            return
        if training:
            self.assignment_scheduler.epoch_end()
            self._batches = self._updates = 0
        else:
            self.assignment_scheduler.merge()

    def forward(self, input: Any, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run a re-solve that is due, then timm's forward, and add the batch to the class means.

        Args:
            input: The images of the batch.
            target: (B,) class indices or (B, C) soft targets.

        Returns:
            The result of timm's forward, the loss among others.
        """
        if not self.dl2pa_heads[0].training:
            return super().forward(input, target)
        if not self._first_batch_checked:
            self._check_first_batch(target)
        if self._primer is not None:
            if self._primed_batches < self.dl2pa_options.prime:
                return self._collect_for_priming(input, target)
            self._prime()
        update = self.assignment_scheduler.resolve_if_due()
        if update is not None:
            self._prototypes_moved |= update.event != 'resolve'
            self._report(update)
        result = super().forward(input, target)
        self.assignment_scheduler.step(target)
        self._batches += 1
        return result

    def _collect_for_priming(self, input: Any, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run timm's forward in both modes and collect the features. The loss has a zero gradient.

        The task receives one batch after the other from the script's loader, so these batches are not trained on.
        """
        result = super().forward(input, target)
        self.assignment_scheduler.drop_forwards()
        result['loss'] = 0.0 * result['loss'].nan_to_num()
        self._primer.add(target, training=True)
        with torch.no_grad(), BackboneModes(self.get_trainable_module(), self.dl2pa_heads).evaluation():
            super().forward(input, target)
        self._primer.add(target)
        self._batches += 1
        self._primed_batches += 1
        return result

    def _prime(self) -> None:
        accuracy = self._primer.finish(self.assignment_scheduler)
        self._primer = None
        self._prototypes_moved = True
        if self.verbose:
            _logger.info(f'DL2PA: primed by {self._primed_batches} batches, which were not trained on: '
                         f'{100 * accuracy:.1f} % of images that are left out are classified correctly')

    def _check_first_batch(self, target: torch.Tensor) -> None:
        if target.ndim == 2 and ((target.float().sum(dim=1) - 1).abs() > 0.01).any():
            raise ValueError('the rows of the targets do not sum to one: they are multi-label targets, which have no '
                             'meaning for a DL2PA head. Leave out the dl2pa_... options.')
        # Only rank 0 has the checkpoint saver, which knows the script's arguments.
        self._merge_interval, self._script_epochs = solve_on_rank_0(
            lambda: (self._merge_interval, self._script_epochs), self.dl2pa_heads[0].prototypes.device)
        if self._script_epochs is not None:
            self.assignment_scheduler.clock.total = f'{self._script_epochs} epochs'
        self._first_batch_checked = True

    def on_saver_created(self, saver: Any) -> None:
        """Take the folder of the run, the interval of recovery checkpoints and the number of epochs from the saver.

        Args:
            saver: The `timm.utils.CheckpointSaver` of the script.
        """
        self._record_path = Path(saver.checkpoint_dir) / RECORD_NAME
        script_args = saver.args
        if script_args is not None:
            self._script_epochs = getattr(script_args, 'epochs', None)
            # Without a validation split, the model is not set to evaluation mode before a checkpoint.
            self._merge_interval = 1 if not getattr(script_args, 'val_split', True) else \
                getattr(script_args, 'recovery_interval', None)

    def update_ema(self, step: int | None = None) -> None:
        """Update the averaged weights, whose prototypes are copied and not averaged; merge class means if due.

        Args:
            step: See timm's method.
        """
        super().update_ema(step=step)
        warmup = self.assignment_scheduler.warmup
        is_moving = warmup is not None and warmup.moves_prototypes
        if (self._prototypes_moved or is_moving) and self.has_ema():
            # The average of prototypes before and after a move is not of unit length, and fits neither embeddings.
            averaged_heads = heads_of(self.get_trainable_module(ema=True))
            for averaged, head in zip(averaged_heads, self.assignment_scheduler.heads, strict=True):
                if is_moving:
                    averaged.move_class_prototypes(head.class_prototypes)
                else:
                    averaged.load_state_dict({**averaged.state_dict(), 'prototypes': head.prototypes})
        self._prototypes_moved = False
        self._updates += 1
        # With gradient accumulation, timm's count of batches may jump at the end of an epoch: merge at every update.
        interval = 1 if self._merge_interval and self._updates != self._batches else self._merge_interval
        if interval and self._updates % interval == 0:
            self.assignment_scheduler.merge()

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> TrainingTask:
        """Wrap the model for distributed training, also on the CPU.

        Args:
            device_ids: See timm's method; ignored on the CPU.
            ddp_kwargs: Arguments of DistributedDataParallel.

        Returns:
            This task.
        """
        # timm's script passes device_ids=[cpu], which DistributedDataParallel refuses.
        return super().prepare_distributed(
            device_ids=None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters for gradient clipping.

        Args:
            exclude_head: Whether to leave out the parameters of the heads.

        Returns:
            The parameters.
        """
        # timm excludes the last two parameters, those of a linear classifier. A head may have another number of them.
        heads = {id(parameter) for head in self.dl2pa_heads for parameter in head.parameters()}
        parameters = super().get_clip_parameters(exclude_head=False)
        return [parameter for parameter in parameters if not (exclude_head and id(parameter) in heads)]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task state for a checkpoint: timm's own, and under 'dl2pa' tensors and plain types of this task.

        Args:
            module: See timm's method.
            ema: Whether the state of the averaged model is meant, which has no entry 'dl2pa'.

        Returns:
            The state.
        """
        state = dict(super().get_task_state(module=module, ema=ema))
        if not ema:
            state['dl2pa'] = {
                'options': asdict(self.dl2pa_options),
                'batches': self._batches,
                'primed_batches': self._primed_batches,
                'primer': self._primer and self._primer.state_dict(),
                'criterion': self._criterion_state(),
                'scheduler': self.assignment_scheduler.state_dict(),
            }
        return state

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Load a task state. Without an entry 'dl2pa', class means and schedule start from the beginning.

        Args:
            state: The state of `get_task_state`, or None.
            strict: See timm's method.
            module: See timm's method.
            ema: Whether the state is that of the averaged model.
        """
        super().load_task_state(state, strict=strict, module=module, ema=ema)
        if ema:
            return
        if not state or 'dl2pa' not in state:
            _logger.warning('The checkpoint holds no state of a DL2PA scheduler: class means and schedule start from '
                            'the beginning.')
            return
        self.assignment_scheduler.load_state_dict(state['dl2pa']['scheduler'])
        self._batches = state['dl2pa']['batches']
        self._primed_batches = state['dl2pa'].get('primed_batches', 0)
        counts = state['dl2pa'].get('criterion')
        if counts and self._criterion_state():
            self.criterion.load_state_dict(counts)
        primer = state['dl2pa'].get('primer')
        if self._primer is not None and primer is not None:
            self._primer.load_state_dict(primer)
        elif self._primer is not None:
            self._primer.close()
            self._primer = None

    def _criterion_state(self) -> dict[str, torch.Tensor] | None:
        """Return the state of a loss of this package (class counts, number of samples drawn); None of another."""
        if not isinstance(self.criterion, OUR_LOSSES):
            return None
        return {name: value.cpu().clone() for name, value in self.criterion.state_dict().items()}

    def summary(self) -> dict[str, float]:
        """Return the figures of the last re-solve for timm's summary. Objectives are means over the classes."""
        history = [update for update in self.assignment_scheduler.history if update.event == 'resolve']
        last = history[-1] if history else AssignmentUpdate(0, 0, 0, float('nan'), float('nan'), 0.0)
        return {
            'dl2pa_resolves': len(history),
            'dl2pa_moved': last.moved,
            'dl2pa_objective_before': self._per_class(last.objective_before),
            'dl2pa_objective': self._per_class(last.objective),
            'dl2pa_seconds': last.seconds,
        }

    def _per_class(self, objective: float) -> float:
        return objective / self.dl2pa_heads[0].num_classes

    def _report(self, update: AssignmentUpdate) -> None:
        if self.verbose:
            events = {'resolve': '', 'placed': 'the prototypes are fixed from now on, ',
                      'rotated': 'the prototypes were rotated, '}
            _logger.info(
                f'DL2PA: after epoch {update.epoch}, batch {update.step}: {events[update.event]}{update.moved} of '
                f'{self.dl2pa_heads[0].num_classes} labels moved, objective per class '
                f'{self._per_class(update.objective_before):.4f} -> {self._per_class(update.objective):.4f}, '
                f'{update.seconds:.2f} s')
        if self._record_path is not None:
            self._write_record(update)

    def _write_record(self, update: AssignmentUpdate) -> None:
        """Append a line to the record. The first call writes the whole history, also that of a resumed run."""
        def line(entry: AssignmentUpdate) -> dict[str, Any]:
            return asdict(replace(
                entry,
                objective_before=self._per_class(entry.objective_before),
                objective=self._per_class(entry.objective),
            ))

        if self._record_is_complete:
            with open(self._record_path, 'a', newline='') as file:
                csv.DictWriter(file, fieldnames=list(line(update))).writerow(line(update))
            return
        part = self._record_path.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(line(update)))
            writer.writeheader()
            writer.writerows(map(line, self.assignment_scheduler.history))
        os.replace(part, self._record_path)
        self._record_is_complete = True


@cache
def task_class_for(base: type[TrainingTask]) -> type[TrainingTask]:
    """Return the subclass of a timm task class for DL2PA models.

    Args:
        base: A task class of timm.

    Returns:
        A class with the same name that derives from `DL2PATask` and `base`.
    """
    return type(base.__name__, (DL2PATask, base), {'__module__': base.__module__, '__doc__': base.__doc__})
