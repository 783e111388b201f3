"""DL2PACallback for the Trainer of transformers, and its TimmWrapper models that save a head and load it."""
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..head import heads_of
from ..models.wrapping import REGISTRY_NAME
from ..options import PREFIX
from ..scheduling import AssignmentScheduler, AssignmentUpdate
from .logs import log_update, values_of
from .loop import SchedulerInLoop

__all__ = ['DL2PACallback', 'record_head']

STATE_NAME = 'dl2pa_scheduler.pt'


def record_head(model: PreTrainedModel) -> None:
    """Write into the config of a TimmWrapper model that its timm model is wrapped, so that `from_pretrained` makes it.

    For a model whose timm model `wrap_dl2pa` has changed. Otherwise what `save_pretrained` saves is loaded into a model
    of the old config, whose linear classifier is new and random. `DL2PACallback` calls it.

    Args:
        model: A `TimmWrapperForImageClassification`. Its `config` is changed; `timm_dl2pa` must be imported where the
            model is loaded.

    Raises:
        ValueError: It has no wrapped timm model.

    Example:
        >>> wrap_dl2pa(model.timm_model, dim=128)
        >>> record_head(model)
        >>> model.save_pretrained('my-model')
    """
    timm_model = getattr(model, 'timm_model', None)
    if timm_model is None or not heads_of(timm_model):
        raise ValueError(f'model ({type(model).__name__}) must have a timm model with a DL2PA head: '
                         f'wrap_dl2pa(model.timm_model) makes one.')
    arguments = {name: value for name, value in (model.config.model_args or {}).items() if not name.startswith(PREFIX)}
    # Neither are the prototypes, which are among the weights, nor the number of classes, which the config has.
    arguments.update((name, value) for name, value in timm_model._model_args.items()
                     if name not in ('num_classes', f'{PREFIX}prototypes'))
    model.config.architecture, model.config.model_args = REGISTRY_NAME, arguments
    model.config.num_labels = model.num_labels = timm_model.num_classes


class DL2PACallback(TrainerCallback):
    """A callback that runs an `AssignmentScheduler` in a Trainer: `Trainer(..., callbacks=[DL2PACallback()])`.

    It takes the labels that the model's forward gets in training mode. Where the loss takes them out of the batch
    (`compute_loss_func`, a Trainer of one's own), call `callback.step(labels)` there, once for each batch.

    The scheduler's state is saved in each checkpoint's folder, as `dl2pa_scheduler.pt`, and a training resumed from one
    goes on to the bit. Each re-solve has an entry in the Trainer's `state.log_history`.

    Args:
        scheduler: Of the Trainer's model. Default: one is made when training begins.
        writer: Where re-solves are logged too, at the Trainer's `global_step`: see `log_update`.
        resume_from: The folder of the checkpoint that training resumes from. Default: that of `output_dir`.
        options: Arguments of the `AssignmentScheduler` that is made. `total` is by default the length of the training.

    Raises:
        TypeError: `scheduler` is no AssignmentScheduler.
        ValueError: Both a scheduler and options are given.
    """

    def __init__(self, scheduler: AssignmentScheduler | None = None, *, writer: Any = None,
                 resume_from: str | os.PathLike[str] | None = None, **options: Any):
        self._loop = SchedulerInLoop(scheduler, options)
        self.writer = writer
        self.resume_from = resume_from
        self._labels: Any = None  # those of the forward
        self._told = False  # whether `step` was called for this batch
        self._update: AssignmentUpdate | None = None
        self._hook: Any = None

    @property
    def scheduler(self) -> AssignmentScheduler | None:
        """The scheduler; None before training, if it is made then."""
        return self._loop.scheduler

    def step(self, targets: torch.Tensor, output: torch.Tensor | None = None) -> None:
        """Fold a batch in, in the place of the labels of the model's forward. In evaluation this does nothing.

        Args:
            targets: See `AssignmentScheduler.step`.
            output: Its `embeddings`: the logits of the forward that counts, where there were several.
        """
        if self.scheduler is not None and self.scheduler.heads[0].training:
            self._update = self._loop.step(targets, output)
            self._told = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *,
                       model: nn.Module, **kwargs: Any) -> None:
        if isinstance(getattr(model, 'config', None), TimmWrapperConfig):
            record_head(model)
        if state.global_step:
            self._loop.load_state_dict(self._read(args, state))
        self._loop.begin(model, lambda: state.max_steps * args.gradient_accumulation_steps)
        self._unhook()
        self._hook = model.register_forward_pre_hook(self._observe, with_kwargs=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                     **kwargs: Any) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            self._labels = kwargs.get('labels')

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **kwargs: Any) -> None:
        self._loop.begin_epoch(int(state.epoch + 1e-6))  # a sum of fractions

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                     **kwargs: Any) -> None:
        self._loop.end_epoch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._told:
            if self._labels is None:
                raise ValueError('the forward of the model got no labels: the loss takes them out of the batch '
                                 '(compute_loss_func, label_smoothing_factor). Compute the loss in compute_loss_func, '
                                 'and call callback.step(labels) there.')
            self.step(self._labels)
        update, self._labels, self._told, self._update = self._update, None, False, None
        if update is not None:
            state.log_history.append({**values_of(update), 'epoch': state.epoch, 'step': state.global_step})
        if self.writer is not None:
            log_update(update, self.writer, state.global_step)

    on_substep_end = on_step_end  # the batches of an accumulation but the last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.save_only_model or state.is_hyper_param_search:
            return
        saved = self._loop.state_dict()
        if args.should_save:
            path = _checkpoint(args, state) / STATE_NAME
            part = path.with_suffix('.part')
            torch.save({**saved, 'global_step': state.global_step}, part)
            os.replace(part, path)

    def _read(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Return the state beside the checkpoint that training resumes from."""
        folder = _checkpoint(args, state) if self.resume_from is None else Path(self.resume_from)
        if not (folder / STATE_NAME).is_file():
            raise FileNotFoundError(f'{folder} has no {STATE_NAME}, the state of the AssignmentScheduler. If training '
                                    f'resumes from another folder, give that as DL2PACallback(resume_from=...); '
                                    f'otherwise resume from a checkpoint that has the file.')
        saved = torch.load(folder / STATE_NAME, map_location='cpu', weights_only=True)
        step = saved.pop('global_step', None)
        if step != state.global_step:
            raise ValueError(f'{folder / STATE_NAME} is of step {step}, and training resumes from step '
                             f'{state.global_step}: give the folder of that checkpoint as '
                             f'DL2PACallback(resume_from=...).')
        return saved


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the Trainer's checkpoint at this step."""
    return Path(args.output_dir) / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'
