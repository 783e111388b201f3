"""What a training task of timm's does with a DL2PA model: step 2, its state, its report."""
import csv
import logging
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from timm.task import ClassificationTask, FeatureDistillationTask, TrainingTask

from ..distributed import broadcast_from_rank_0
from ..head import heads_of
from ..losses import BalancedSoftmaxLoss, DotRegressionLoss, SquaredCosineLoss
from ..scheduling import AssignmentScheduler, AssignmentUpdate, Duration, Primer
from .creation import plugin_options

__all__ = ['DL2PATask', 'task_class_for']

_logger = logging.getLogger(__name__)

RECORD_NAME = 'dl2pa.csv'

_LOSSES = {'squared_cosine': SquaredCosineLoss, 'dot_regression': DotRegressionLoss}


class DL2PATask(TrainingTask):
    """Mixed into a task class of timm's for a model that was created with dl2pa_... options.

    The scheduler takes each batch in the task's forward; a re-solve that is due comes before that forward. timm's
    script tells a task of epochs only through `train()` and `eval()` of the model: an epoch is over when the model is
    set to training again after batches of training. The scheduler's state is in the checkpoint's task state.

    In a distributed run the processes' class means are merged where all of them pass and a checkpoint may follow: when
    the model is set to evaluation, and after the updates that recovery checkpoints follow.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        found = (plugin_options(module) for module in self.get_trainable_module().modules())
        options = self.dl2pa_options = next(filter(None, found))
        if getattr(self, 'multi_label', False):
            raise ValueError(f'{type(self).__name__}: a DL2PA head gives each image one class, so that multi-label '
                             f'targets have no meaning for it. Leave the dl2pa options out.')
        arguments = options.scheduler_arguments()
        if options.prime:
            # Priming takes the place of the warm-up, and of what was set for it.
            arguments.update(warmup='none', evenness=None)
        self.assignment_scheduler = AssignmentScheduler(self.get_trainable_module(), **arguments)
        self._primer = Primer(self.assignment_scheduler.heads) if options.prime else None
        self.dl2pa_heads = tuple(self.assignment_scheduler.heads)
        replaced = self._take_loss()
        self.dl2pa_heads[0].training_view.on_mode = self._mode_changed
        # Counted since the model was last set to training.
        self._batches = 0
        self._updates = 0
        self._primed_batches = 0
        self._prototypes_moved = False
        self._checked = False
        self._merge_interval: int | None = None
        self._script_epochs: int | None = None
        self._record: Path | None = None
        self._record_is_ours = False
        if self.verbose:
            head, scheduler = self.dl2pa_heads[0], self.assignment_scheduler
            where = f' in the background, {options.lag} batches behind' if options.background else ''
            _logger.info(
                f'DL2PA: recipe {options.recipe}, {type(head).__name__} with K={len(head.prototypes)} prototypes in '
                f'd={head.dim} dimensions for {head.num_classes} classes, loss {options.loss}{replaced}, '
                + ('static assignment' if options.stop == 0 else
                   f're-solved every {scheduler.schedule}{where}, exactly')
                + (f', primed by the first {options.prime} batches' if options.prime else
                   f', after a warm-up of {Duration.of(options.warmup_length or scheduler.recipe.warmup_length)} '
                   f'({scheduler.warmup.name})' if scheduler.warming_up else ''))

    def _take_loss(self) -> str:
        """Put our loss in the criterion's place if it is asked for; return what to say of that."""
        options, head = self.dl2pa_options, self.dl2pa_heads[0]
        if options.loss == 'criterion':
            return f' ({type(self.criterion).__name__})'
        if isinstance(self.criterion, (BinaryCrossEntropy, JsdCrossEntropy)):
            raise ValueError(f'dl2pa_loss={options.loss} takes the place of the criterion, here '
                             f'{type(self.criterion).__name__}: leave out either it or --bce-loss / --jsd-loss.')
        replaced = type(self.criterion).__name__
        if options.loss == 'balanced_softmax':
            self.criterion = BalancedSoftmaxLoss(head.num_classes).to(head.prototypes.device)
            return f' (in place of {replaced})'
        self.criterion = _LOSSES[options.loss](head, **options.loss_arguments())
        # No (B, C) logits in training where nothing else takes them: other distillation compares logits, and a model
        # with several classifiers averages them.
        if isinstance(self, (ClassificationTask, FeatureDistillationTask)) and len(self.dl2pa_heads) == 1:
            head.config = replace(head.config, train_output='embeddings')
        return f' (in place of {replaced})'

    def _mode_changed(self, training: bool) -> None:
        if not self._batches:
            return
        if training:
            self.assignment_scheduler.epoch_end()
            self._batches = self._updates = 0
        else:
            self.assignment_scheduler.merge()

    def forward(self, input: Any, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the re-solve that is due, if any, then timm's forward, and fold the batch into the class means."""
        if not self.dl2pa_heads[0].training:
            return super().forward(input, target)
        if not self._checked:
            self._check_first_batch(target)
        if self._primer is not None:
            if self._primed_batches < self.dl2pa_options.prime:
                return self._gather(input, target)
            self._prime()
        update = self.assignment_scheduler.resolve_if_due()
        if update is not None:
            self._prototypes_moved |= update.event != 'resolve'
            self._report(update)
        result = super().forward(input, target)
        self.assignment_scheduler.step(target)
        self._batches += 1
        return result

    def _gather(self, input: Any, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run timm's forward and gather the features, with a loss that has no gradient.

        The script has the loader, the task sees one batch after the other: those that it gathers are not trained on.
        """
        result = super().forward(input, target)
        result['loss'] = 0.0 * result['loss'].nan_to_num()
        self._primer.add(target)
        self._batches += 1
        self._primed_batches += 1
        return result

    def _prime(self) -> None:
        explained = self._primer.finish(self.assignment_scheduler)
        self._primer = None
        self._prototypes_moved = True
        if self.verbose:
            _logger.info(f'DL2PA: primed by {self._primed_batches} batches, which were not trained on: the features '
                         f"explain {100 * explained:.1f} % of the prototypes' variance")

    def _check_first_batch(self, target: torch.Tensor) -> None:
        if target.ndim == 2 and ((target.float().sum(dim=1) - 1).abs() > 0.01).any():
            raise ValueError('the rows of the targets do not sum to one: they are multi-label targets, which have no '
                             'meaning for a DL2PA head. Leave the dl2pa options out.')
        # Rank 0 alone has the checkpoint saver, and knows the script's arguments.
        self._merge_interval, self._script_epochs = broadcast_from_rank_0(
            (self._merge_interval, self._script_epochs), self.dl2pa_heads[0].prototypes.device)
        if self._script_epochs is not None:
            self.assignment_scheduler.clock.total = f'{self._script_epochs} epochs'
        self._checked = True

    def saver_made(self, saver: Any) -> None:
        """Learn from timm's CheckpointSaver where the run's files are, how often it saves, and how long the run is."""
        self._record = Path(saver.checkpoint_dir) / RECORD_NAME
        script = saver.args
        if script is not None:
            self._script_epochs = getattr(script, 'epochs', None)
            # Without a validation split there is no switch to evaluation before a checkpoint.
            self._merge_interval = 1 if not getattr(script, 'val_split', True) else \
                getattr(script, 'recovery_interval', None)

    def update_ema(self, step: int | None = None) -> None:
        super().update_ema(step=step)
        warmup = self.assignment_scheduler.warmup
        moving = warmup is not None and warmup.moves_prototypes
        if (self._prototypes_moved or moving) and self.has_ema():
            # A mean of prototypes before and after they moved is on no sphere and fits neither's embeddings.
            averaged = heads_of(self.get_trainable_module(ema=True))
            for mine, head in zip(averaged, self.assignment_scheduler.heads, strict=True):
                if moving:
                    mine.move_class_prototypes(head.class_prototypes)
                else:
                    mine.load_state_dict({**mine.state_dict(), 'prototypes': head.prototypes})
        self._prototypes_moved = False
        self._updates += 1
        # Under gradient accumulation timm's count within an epoch may jump at its end: then every update.
        interval = 1 if self._merge_interval and self._updates != self._batches else self._merge_interval
        if interval and self._updates % interval == 0:
            self.assignment_scheduler.merge()

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> TrainingTask:
        # timm's script passes device_ids=[cpu], which DistributedDataParallel refuses.
        return super().prepare_distributed(
            device_ids=None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        # timm leaves out the last two parameters, a linear classifier's: ours may have another number.
        heads = {id(parameter) for head in self.dl2pa_heads for parameter in head.parameters()}
        parameters = super().get_clip_parameters(exclude_head=False)
        return [parameter for parameter in parameters if not (exclude_head and id(parameter) in heads)]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return timm's own task state and, under 'dl2pa', the scheduler's: tensors and plain types only."""
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
        """Take over a task state. One without ours (of a model trained elsewhere) starts the class means anew."""
        super().load_task_state(state, strict=strict, module=module, ema=ema)
        if ema:
            return
        if not state or 'dl2pa' not in state:
            _logger.warning('The checkpoint holds no state of a DL2PA scheduler: class means and schedule start anew.')
            return
        self.assignment_scheduler.load_state_dict(state['dl2pa']['scheduler'])
        self._batches = state['dl2pa']['batches']
        self._primed_batches = state['dl2pa'].get('primed_batches', 0)
        counts = state['dl2pa'].get('criterion')
        if counts and isinstance(self.criterion, BalancedSoftmaxLoss):
            self.criterion.load_state_dict(counts)
        primer = state['dl2pa'].get('primer')
        if self._primer is not None and primer is not None:
            self._primer.load_state_dict(primer)
        elif self._primer is not None:
            self._primer.close()
            self._primer = None

    def _criterion_state(self) -> dict[str, torch.Tensor] | None:
        """Return the class counts of a balanced softmax."""
        if not isinstance(self.criterion, BalancedSoftmaxLoss):
            return None
        return {name: value.cpu().clone() for name, value in self.criterion.state_dict().items()}

    def summary(self) -> dict[str, float]:
        """Return the figures of the last re-solve, for timm's summary: objectives are means over the classes."""
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
            what = {'resolve': '', 'placed': 'the prototypes are placed, ', 'rotated': 'the prototypes were rotated, '}
            _logger.info(
                f'DL2PA: after epoch {update.epoch}, batch {update.step}: {what[update.event]}{update.moved} of '
                f'{self.dl2pa_heads[0].num_classes} labels moved, objective per class '
                f'{self._per_class(update.objective_before):.4f} -> {self._per_class(update.objective):.4f}, '
                f'{update.seconds:.2f} s')
        if self._record is not None:
            self._write_record(update)

    def _write_record(self, update: AssignmentUpdate) -> None:
        """Append a line; the first time, write the whole history, so that a resumed run's file is complete."""
        def line(entry: AssignmentUpdate) -> dict[str, Any]:
            return asdict(replace(
                entry,
                objective_before=self._per_class(entry.objective_before),
                objective=self._per_class(entry.objective),
            ))

        if self._record_is_ours:
            with open(self._record, 'a', newline='') as file:
                csv.DictWriter(file, fieldnames=list(line(update))).writerow(line(update))
            return
        part = self._record.with_suffix('.part')
        with open(part, 'w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(line(update)))
            writer.writeheader()
            writer.writerows(map(line, self.assignment_scheduler.history))
        os.replace(part, self._record)
        self._record_is_ours = True


@cache
def task_class_for(base: type[TrainingTask]) -> type[TrainingTask]:
    """Return the subclass of a task class of timm's that serves DL2PA models, with the same name."""
    return type(base.__name__, (DL2PATask, base), {'__module__': base.__module__, '__doc__': base.__doc__})
