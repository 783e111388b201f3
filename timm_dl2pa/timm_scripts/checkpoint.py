"""A checkpoint of timm's train.py, a state dict or a safetensors file: read and checked. Nothing in it is executed."""
import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..assignment import check_assignment, restore_whole_numbers
from ..head import head_prefixes
from ..prototypes import check_prototypes
from ..scheduling import AssignmentUpdate
from ..values import is_kind

__all__ = ['AssignmentRecord', 'Checkpoint', 'one_line', 'read_checkpoint']

# More entries than these in the arguments of a script are taken for lists that hold one another: their text is endless.
_MOST_ENTRIES = 100_000
_KINDS = {int: int, float: (int, float), str: str}


@dataclass(frozen=True)
class AssignmentRecord:
    """What a checkpoint holds of the `AssignmentScheduler` of its training.

    Attributes:
        batches: Number of batches that were folded in.
        epochs: Number of epochs that were begun.
        due: Whether a re-solve is due.
        history: The updates, each with the values of an `AssignmentUpdate` by their names.
        class_sums: (C, d) sums of the classes' embeddings; None if they are unknown.
        is_scale_held: Whether `prime` has set the scale, so that it is not learned.
    """
    batches: int
    epochs: int
    due: bool
    history: list[dict[str, Any]]
    class_sums: torch.Tensor | None
    is_scale_held: bool


@dataclass(frozen=True)
class Checkpoint:
    """What this package uses of a checkpoint. All of it has been checked; other contents are left out.

    Attributes:
        path: The file.
        state: The model's tensors by name.
        averaged_state: Those of the averaged model; None if there is none.
        args: The arguments of the script that wrote the checkpoint, empty if it does not hold them.
        epoch: The epoch, or None.
        metric: The metric of that epoch, or None.
        options: The options of the head and its training without their prefix, as far as they are recorded.
        record: The record of the assignment, or None.
    """
    path: Path
    state: dict[str, Any]
    averaged_state: dict[str, Any] | None = None
    args: argparse.Namespace = field(default_factory=argparse.Namespace)
    epoch: int | None = None
    metric: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    record: AssignmentRecord | None = None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of the model in the script's `--model-kwargs`."""
        return getattr(self.args, 'model_kwargs', None) or {}

    def heads(self, use_ema: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return prototypes (K, d) and assignment (C,) int64 of each DL2PA head by the prefix of its tensors' names.

        Args:
            use_ema: Whether to return those of the averaged model.

        Raises:
            ValueError: There is no head, or its tensors are not those of a head.
        """
        state = self.averaged_state if use_ema else self.state
        prefixes = head_prefixes(state)
        if not prefixes:
            raise ValueError(f'{self.path} has no DL2PA head: its tensors include no prototypes with an assignment.')
        found = {}
        for prefix in prefixes:
            try:
                found[prefix] = _checked_head({name.removeprefix(prefix): value for name, value in state.items()
                                               if name.startswith(prefix)})
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f'{self.path} has a DL2PA head that is no good: {prefix}{one_line(error)}') from error
        return found


def one_line(error: BaseException) -> str:
    """Return the message of an exception, or else the name of its class, as one line of at most 400 characters."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + ' ...'


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Only tensors and plain types are unpickled.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder that holds one.

    Returns:
        The checked checkpoint.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: It cannot be opened.
        ValueError: It is not a checkpoint, or a part of it is not what train.py and the plugin write.
    """
    if path.is_dir():
        path = path / 'model.safetensors'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file.')
    contents = _read(path)
    if not isinstance(contents, dict):
        raise ValueError(f'{path} holds a {type(contents).__name__}, not a checkpoint: give a checkpoint of timm\'s '
                         f'train.py or a state dict.')
    if 'state_dict' not in contents:
        contents = {'state_dict': contents}
    task = contents.get('task_state')
    task = task.get('dl2pa') if isinstance(task, dict) else None
    task = task if isinstance(task, dict) else {}
    epoch, metric = contents.get('epoch'), contents.get('metric')
    try:
        return Checkpoint(
            path=path,
            state=_checked_state(contents, 'state_dict'),
            averaged_state=_checked_state(contents, 'state_dict_ema') if 'state_dict_ema' in contents else None,
            args=_checked_args(contents.get('args')),
            epoch=epoch if is_kind(epoch, int) else None,
            metric=metric if is_kind(metric, (int, float)) else None,
            options=_checked_mapping(task.get('options', {}), 'task_state.dl2pa.options'),
            record=_checked_record(task) if 'scheduler' in task else None,
        )
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _read(path: Path) -> Any:
    """Return the contents of a file, or raise a ValueError with the reason in one line."""
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        # The arguments of the script are a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever the call that it happens to make raises
        # torch's own message begins with advice to trust the file.
        found = re.search(r'WeightsUnpickler error: *(.+)', str(error))
        reason = 'the file is empty' if not path.stat().st_size else found[1] if found else one_line(error)
        raise ValueError(f'{path} cannot be read as a checkpoint: {reason.rstrip(".")}.') from error


def _checked_state(contents: dict[Any, Any], key: str) -> dict[str, Any]:
    """Return a state dict without the prefixes of wrappers."""
    state = contents[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f'{key} must hold tensors by their names, not a {type(state).__name__} of other things.')
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            _check_is_stored(value, f'{key}[{name!r}]')
    return clean_state_dict(state)


def _check_is_stored(tensor: torch.Tensor, name: str) -> None:
    """Raise a ValueError unless the file holds each entry of a tensor: any shape could be claimed with strides of 0."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta \
            or tensor.is_quantized or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f'{name} must be a dense tensor with all of its {tensor.numel()} entries in the file.')


def _checked_args(args: Any) -> argparse.Namespace:
    """Return the arguments of a script; no namespace means no arguments."""
    if not isinstance(args, argparse.Namespace):
        return argparse.Namespace()
    checked = _checked_mapping(vars(args), 'args')
    if checked.get('model_kwargs') is not None:
        _checked_mapping(checked['model_kwargs'], 'args.model_kwargs')
    if not isinstance(checked.get('model'), (str, type(None))):
        raise ValueError(f'args.model must be the name of a model, not a {type(checked["model"]).__name__}.')
    return argparse.Namespace(**checked)


def _checked_mapping(mapping: Any, name: str) -> dict[str, Any]:
    """Return a mapping from names to values whose text ends, or raise a ValueError."""
    if not isinstance(mapping, Mapping) or not all(isinstance(key, str) for key in mapping):
        raise ValueError(f'{name} must be a mapping from names to values, not a {type(mapping).__name__}.')
    queue, count = [dict(mapping)], 0
    while queue and count <= _MOST_ENTRIES:
        value = queue.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, (list, tuple, set, frozenset)):
            count += len(value)
            queue.extend(list(value)[:_MOST_ENTRIES])
        elif isinstance(value, (str, bytes)):
            count += len(value) // 1000
    if count > _MOST_ENTRIES:
        raise ValueError(f'{name} holds more than {_MOST_ENTRIES} values, or lists that hold one another.')
    return dict(mapping)


def _checked_record(task: dict[str, Any]) -> AssignmentRecord:
    """Return the record of the assignment in the state of a task."""
    where = 'task_state.dl2pa.scheduler'
    try:
        scheduler, batches = task['scheduler'], task['batches']
        clock, history = scheduler['clock'], scheduler['resolver']['history']
        steps, epochs = clock['batches'], clock['epochs']
        means, due, scales = scheduler.get('class_means'), scheduler.get('due'), scheduler.get('held_scales')
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f'{where} is not the state of an AssignmentScheduler: {type(error).__name__} '
                         f'{one_line(error)}.') from None
    if not all(is_kind(number, int) for number in (batches, steps, epochs)) or not isinstance(history, list):
        raise ValueError(f'{where} is not the state of an AssignmentScheduler: it must count batches and epochs, and '
                         f'list its updates.')
    for index, entry in enumerate(history):
        for spec in fields(AssignmentUpdate):
            if not isinstance(entry, dict) or not is_kind(entry.get(spec.name), _KINDS[spec.type]):
                raise ValueError(f'{where} is not the state of an AssignmentScheduler: update {index} of its history '
                                 f'must have {spec.name}, of the type {spec.type.__name__}.')
    sums = means.get('sums') if isinstance(means, dict) else None
    if not isinstance(sums, torch.Tensor) or sums.dim() != 2:
        sums = None
    else:
        _check_is_stored(sums, f'{where}.class_means.sums')
    return AssignmentRecord(batches=steps, epochs=epochs + bool(batches), due=due is True,
                            history=history, class_sums=sums,
                            is_scale_held=isinstance(scales, list) and any(is_kind(scale, float) for scale in scales))


def _checked_head(tensors: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prototypes and assignment of a head, or raise an error of their checks."""
    for name in ('prototypes', 'assignment', 'scale', 'log_scale'):
        if name in tensors and not isinstance(tensors[name], torch.Tensor):
            raise ValueError(f'{name} must be a tensor, not a {type(tensors[name]).__name__}.')
    for name in ('scale', 'log_scale'):
        if name in tensors and tensors[name].numel() != 1:
            raise ValueError(f'{name} must be one number, not of the shape {tuple(tensors[name].shape)}.')
    prototypes, assignment = tensors['prototypes'], restore_whole_numbers(tensors['assignment'])
    if not prototypes.is_floating_point():
        raise ValueError(f'prototypes must have a floating-point dtype, not {prototypes.dtype}.')
    check_prototypes(prototypes)
    if assignment.ndim != 1 or len(assignment) < 2:
        raise ValueError(f'assignment must have the shape (C,) with at least two classes, not '
                         f'{tuple(assignment.shape)}.')
    check_assignment(assignment, len(assignment), len(prototypes))
    return prototypes, assignment.long()
