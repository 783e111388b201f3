"""The command `timm-dl2pa inspect`: reports the contents of a checkpoint of a DL2PA model."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..options import PREFIX
from ..prototypes import unit_rows
from ..prototypes.nearest import margins
from ..values import shown
from .checkpoint import read_checkpoint

__all__ = ['inspect_checkpoint']


def inspect_checkpoint(path: str | Path, all_classes: bool = False) -> Iterator[str]:
    """Yield a report on a checkpoint: model, metric, options, heads, history of the assignment and angular margins.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder of `save_model`.
        all_classes: Whether to list the margins of all classes, not only the ten smallest.

    Yields:
        One line of text at a time.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint, it has no DL2PA head, or a part of it is damaged.
    """
    checkpoint = read_checkpoint(Path(path))
    heads = checkpoint.heads()

    yield f'checkpoint     {path}'
    for label, value in (('model', getattr(checkpoint.args, 'model', None)), ('epoch', checkpoint.epoch),
                         ('metric', checkpoint.metric)):
        if value is not None:
            yield f'{label:<14} {_text(value)}'
    options = checkpoint.options or {name.removeprefix(PREFIX): value
                                     for name, value in checkpoint.model_kwargs.items() if name.startswith(PREFIX)}
    if options:
        yield 'options        ' + ' '.join(f'{_text(name)}={_text(value)}' for name, value in options.items()
                                           if value is not None)
    for prefix, (prototypes, assignment) in heads.items():
        state = checkpoint.state
        if prefix + 'log_scale' in state:
            held = checkpoint.record is not None and checkpoint.record.is_scale_held
            scale = f'{state[prefix + "log_scale"].float().exp().item():.4g} ({"set by prime" if held else "learned"})'
        else:
            scale = f'{state[prefix + "scale"].item():.4g}' if prefix + 'scale' in state else 'unknown'
        neck = sum(value.numel() for name, value in state.items() if isinstance(value, torch.Tensor)
                   and name.startswith(prefix + 'neck.') and name.endswith(('weight', 'bias')))
        yield (f'{"head":<14} {_text(prefix.rstrip(".") or "(the model itself)")}: {len(assignment)} classes, '
               f'{len(prototypes)} prototypes in {prototypes.shape[1]} dimensions, scale {scale}, {neck} parameters')

    record = checkpoint.record
    prototypes, assignment = next(iter(heads.values()))
    if record is None:
        yield 'assignment     no history in this file'
    else:
        solves = sum(entry['event'] == 'resolve' for entry in record.history)
        yield (f'assignment     {solves} re-solves in {record.batches} batches, {record.epochs} epochs'
               + (', one is due' if record.due else ''))
        yield f'{"epoch":>7} {"batch":>8} {"moved":>6} {"objective per class":>21} {"seconds":>8}'
        for entry in record.history:
            before, after = entry['objective_before'] / len(assignment), entry['objective'] / len(assignment)
            yield (f'{entry["epoch"]:>7} {entry["step"]:>8} {entry["moved"]:>6} {before:>9.4f} -> {after:>8.4f} '
                   f'{entry["seconds"]:>8.2f}' + ('' if entry['event'] == 'resolve' else f'   {_text(entry["event"])}'))

    angles, nearest = margins(unit_rows(prototypes).float()[assignment])
    yield (f'margins        angle to the nearest other prototype: min {angles.min():.2f}, mean {angles.mean():.2f}, '
           f'max {angles.max():.2f} degrees')
    order = range(len(angles)) if all_classes else angles.argsort(stable=True)[:10].tolist()
    yield f'{"class":>7} {"prototype":>10} {"nearest":>8} {"degrees":>8}' + (
        '' if all_classes or len(angles) <= 10 else f'   (the ten smallest of {len(angles)}; --all for the rest)')
    for index in order:
        yield f'{index:>7} {assignment[index].item():>10} {nearest[index].item():>8} {angles[index]:>8.2f}'


def _text(value: Any) -> str:
    """Return a value as text. A checkpoint of someone else must not send control characters to the terminal."""
    return value if isinstance(value, str) and value.isprintable() else shown(value)
