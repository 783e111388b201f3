"""The command `timm-dl2pa inspect`: reads a checkpoint of a DL2PA model and reports its contents."""
import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..assignment import check_assignment, restore_whole_numbers
from ..head import head_prefixes
from ..options import PREFIX
from ..prototypes import check_prototypes, unit_rows
from ..prototypes.nearest import margins

__all__ = ['inspect_checkpoint', 'read_checkpoint']


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Only tensors and plain types are unpickled.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder that holds one.

    Returns:
        The checkpoint. A state dict alone is put under the key 'state_dict'.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint.
    """
    if path.is_dir():
        path = path / 'model.safetensors'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file.')
    try:
        if path.suffix == '.safetensors':
            return {'state_dict': load_file(path)}
        # The arguments of the script are a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f'{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint.')
    return checkpoint if 'state_dict' in checkpoint else {'state_dict': checkpoint}


def inspect_checkpoint(path: str | Path, all_classes: bool = False) -> Iterator[str]:
    """Yield a report on a checkpoint: model, metric, options, heads, history of the assignment and angular margins.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder of `save_model`.
        all_classes: Whether to list the margins of all classes, not only the ten smallest.

    Yields:
        One line of text at a time.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint, or it has no DL2PA head.
    """
    checkpoint = read_checkpoint(Path(path))
    state = clean_state_dict(checkpoint['state_dict'])
    heads = head_prefixes(state)
    if not heads:
        raise ValueError(f'{path} has no DL2PA head: its tensors include no prototypes with an assignment.')
    arguments = checkpoint.get('args')
    model_kwargs = getattr(arguments, 'model_kwargs', None) or {}
    task = (checkpoint.get('task_state') or {}).get('dl2pa') or {}

    yield f'checkpoint     {path}'
    for label, value in (('model', getattr(arguments, 'model', None)), ('epoch', checkpoint.get('epoch')),
                         ('metric', checkpoint.get('metric'))):
        if value is not None:
            yield f'{label:<14} {value}'
    options = task.get('options') or {name.removeprefix(PREFIX): value for name, value in model_kwargs.items()
                                      if name.startswith(PREFIX)}
    if options:
        yield 'options        ' + ' '.join(f'{name}={value}' for name, value in options.items() if value is not None)
    for prefix in heads:
        prototypes, assignment = state[prefix + 'prototypes'], restore_whole_numbers(state[prefix + 'assignment'])
        check_prototypes(prototypes)
        check_assignment(assignment, len(assignment), len(prototypes))
        if prefix + 'log_scale' in state:
            scale = f'{state[prefix + "log_scale"].float().exp().item():.4g} (learned)'
        else:
            scale = f'{state[prefix + "scale"].item():.4g}' if prefix + 'scale' in state else 'unknown'
        neck = sum(value.numel() for name, value in state.items()
                   if name.startswith(prefix + 'neck.') and name.endswith(('weight', 'bias')))
        yield (f'{"head":<14} {prefix.rstrip(".") or "(the model itself)"}: {len(assignment)} classes, '
               f'{len(prototypes)} prototypes in {prototypes.shape[1]} dimensions, scale {scale}, {neck} parameters')

    scheduler = task.get('scheduler')
    if scheduler is None:
        yield 'assignment     no history in this file'
    else:
        count = len(assignment)
        history = scheduler['resolver']['history']
        solves = sum(entry['event'] == 'resolve' for entry in history)
        yield (f'assignment     {solves} re-solves in {scheduler["steps"]} batches, '
               f'{scheduler["epochs"] + bool(task["batches"])} epochs' + (', one is due' if scheduler['due'] else ''))
        yield f'{"epoch":>7} {"batch":>8} {"moved":>6} {"objective per class":>21} {"seconds":>8}'
        for entry in history:
            before, after = entry['objective_before'] / count, entry['objective'] / count
            yield (f'{entry["epoch"]:>7} {entry["step"]:>8} {entry["moved"]:>6} {before:>9.4f} -> {after:>8.4f} '
                   f'{entry["seconds"]:>8.2f}' + ('' if entry['event'] == 'resolve' else f'   {entry["event"]}'))

    prototypes, assignment = state[heads[0] + 'prototypes'], state[heads[0] + 'assignment'].long()
    angles, nearest = margins(unit_rows(prototypes).float()[assignment])
    yield (f'margins        angle to the nearest other prototype: min {angles.min():.2f}, mean {angles.mean():.2f}, '
           f'max {angles.max():.2f} degrees')
    order = range(len(angles)) if all_classes else angles.argsort(stable=True)[:10].tolist()
    yield f'{"class":>7} {"prototype":>10} {"nearest":>8} {"degrees":>8}' + (
        '' if all_classes or len(angles) <= 10 else f'   (the ten smallest of {len(angles)}; --all for the rest)')
    for index in order:
        yield f'{index:>7} {assignment[index].item():>10} {nearest[index].item():>8} {angles[index]:>8.2f}'
