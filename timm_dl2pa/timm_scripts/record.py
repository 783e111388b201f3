"""The record of a training with timm's train.py, for the model card."""
import csv
import logging
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ..files.card import Training
from ..scheduling.class_means import directions_of

__all__ = ['class_means_of', 'metrics_of', 'read_training']

_logger = logging.getLogger(__name__)

# Arguments of train.py that describe the training. None of them names a folder or a machine.
_SETTINGS = ('dataset', 'epochs', 'batch_size', 'img_size', 'opt', 'lr', 'lr_base', 'sched', 'warmup_epochs',
             'weight_decay', 'smoothing', 'mixup', 'cutmix', 'aa', 'reprob', 'drop', 'drop_path', 'amp', 'model_ema',
             'pretrained', 'seed')
_ACCURACIES = {'top1': 'accuracy', 'top5': 'top-5 accuracy'}


def read_training(path: Path, checkpoint: dict[str, Any]) -> Training:
    """Read the record of a training from a checkpoint of train.py and the files summary.csv and args.yaml beside it.

    A summary.csv whose metric differs from the checkpoint's belongs to another run. It is ignored, with a warning.

    Args:
        path: The checkpoint.
        checkpoint: Its content, see `read_checkpoint`.

    Returns:
        The record, empty as far as nothing is known.
    """
    script_args = checkpoint.get('args')
    if script_args is None:
        script_args = _read_args_yaml(path.with_name('args.yaml'))
    settings = {name: getattr(script_args, name) for name in _SETTINGS
                if getattr(script_args, name, None) not in (None, '', 0, 0.0, False)}
    if isinstance(settings.get('dataset'), str) and ('/' in settings['dataset'] or '\\' in settings['dataset']):
        del settings['dataset']
    scheduler = ((checkpoint.get('task_state') or {}).get('dl2pa') or {}).get('scheduler') or {}
    epochs = _read_summary(path.with_name('summary.csv'))
    row = next((row for row in epochs if row['epoch'] == checkpoint.get('epoch')), None)
    recorded = (row or {}).get(f'eval_{getattr(script_args, "eval_metric", "top1")}')
    metric = checkpoint.get('metric')
    differs = None not in (recorded, metric) and not math.isclose(recorded, metric, rel_tol=1e-3)
    if epochs and (row is None or differs):
        _logger.warning(f'{path.with_name("summary.csv")} is not of the same run as {path.name}, and is ignored.')
        epochs = []
    return Training(epoch=checkpoint.get('epoch'), epochs=epochs, settings=settings,
                    history=(scheduler.get('resolver') or {}).get('history', []))


def metrics_of(training: Training, checkpoint: dict[str, Any], use_ema: bool) -> dict[str, float]:
    """Return the accuracies that were measured for the weights of a checkpoint.

    If there are averaged weights, timm measures those (unless --model-ema-force-cpu is set), and the accuracies of the
    other weights are unknown.

    Args:
        training: The record of the training.
        checkpoint: The checkpoint, see `read_checkpoint`.
        use_ema: Whether the averaged weights are meant.

    Returns:
        'accuracy' and 'top-5 accuracy', as far as they are known, as fractions.
    """
    script_args = checkpoint.get('args')
    measured_ema = 'state_dict_ema' in checkpoint and not getattr(script_args, 'model_ema_force_cpu', False)
    if measured_ema != use_ema:
        return {}
    percent = {}
    metric = checkpoint.get('metric')
    if isinstance(metric, (int, float)):
        percent[getattr(script_args, 'eval_metric', None)] = metric
    row = next((row for row in training.epochs if row['epoch'] == training.epoch), {})
    for name in _ACCURACIES:
        if f'eval_{name}' in row:
            percent.setdefault(name, row[f'eval_{name}'])
    return {title: round(percent[name] / 100, 6) for name, title in _ACCURACIES.items() if name in percent}


def class_means_of(checkpoint: dict[str, Any]) -> torch.Tensor | None:
    """Return the mean directions of the classes' embeddings at a checkpoint.

    Args:
        checkpoint: The checkpoint, see `read_checkpoint`.

    Returns:
        (C, d) float64 unit rows, with rows of zeros for classes without samples; None if the checkpoint has no class
        means.
    """
    state = ((checkpoint.get('task_state') or {}).get('dl2pa') or {}).get('scheduler') or {}
    sums = (state.get('class_means') or {}).get('sums')
    if not isinstance(sums, torch.Tensor) or sums.dim() != 2 or not bool(sums.isfinite().all()) or not sums.any():
        return None
    return directions_of(sums)


def _read_args_yaml(path: Path) -> Namespace | None:
    """Return the arguments in timm's args.yaml, or None if it cannot be read."""
    import yaml
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return Namespace(**values) if isinstance(values, dict) and all(isinstance(name, str) for name in values) else None


def _read_summary(path: Path) -> list[dict[str, float]]:
    """Return the finite numbers in the rows of timm's summary.csv. Of an epoch with several rows, the last one counts.
    """
    if not path.is_file():
        return []
    rows = {}
    with open(path, newline='', encoding='utf-8') as file:
        for line in csv.DictReader(file):
            row = {}
            for name, value in line.items():
                try:
                    row[name] = float(value)
                except (TypeError, ValueError):
                    continue
            row = {name: value for name, value in row.items() if math.isfinite(value)}
            if 'epoch' in row:
                rows[row['epoch']] = row
    return [rows[epoch] for epoch in sorted(rows)]
