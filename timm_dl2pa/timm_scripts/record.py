"""What a training with timm's train.py left behind, for the model card."""
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

# Arguments of train.py that say how it was trained: none that names a folder or a machine.
_SETTINGS = ('dataset', 'epochs', 'batch_size', 'img_size', 'opt', 'lr', 'lr_base', 'sched', 'warmup_epochs',
             'weight_decay', 'smoothing', 'mixup', 'cutmix', 'aa', 'reprob', 'drop', 'drop_path', 'amp', 'model_ema',
             'pretrained', 'seed')
_ACCURACIES = {'top1': 'accuracy', 'top5': 'top-5 accuracy'}


def read_training(path: Path, checkpoint: dict[str, Any]) -> Training:
    """Return what a checkpoint of train.py, and the files summary.csv and args.yaml beside it, say.

    A summary.csv whose figures are not the checkpoint's is of another run, and left out.

    Args:
        path: Of the checkpoint.
        checkpoint: Its content.
    """
    said = checkpoint.get('args')
    if said is None:
        said = _arguments(path.with_name('args.yaml'))
    settings = {name: getattr(said, name) for name in _SETTINGS
                if getattr(said, name, None) not in (None, '', 0, 0.0, False)}
    if isinstance(settings.get('dataset'), str) and ('/' in settings['dataset'] or '\\' in settings['dataset']):
        del settings['dataset']
    scheduler = ((checkpoint.get('task_state') or {}).get('dl2pa') or {}).get('scheduler') or {}
    epochs = _summary(path.with_name('summary.csv'))
    row = next((row for row in epochs if row['epoch'] == checkpoint.get('epoch')), None)
    figure = (row or {}).get(f'eval_{getattr(said, "eval_metric", "top1")}')
    metric = checkpoint.get('metric')
    differs = None not in (figure, metric) and not math.isclose(figure, metric, rel_tol=1e-3)
    if epochs and (row is None or differs):
        _logger.warning(f'{path.with_name("summary.csv")} is not of the same run as {path.name}, and left out.')
        epochs = []
    return Training(epoch=checkpoint.get('epoch'), epochs=epochs, settings=settings,
                    history=(scheduler.get('resolver') or {}).get('history', []))


def metrics_of(training: Training, checkpoint: dict[str, Any], use_ema: bool) -> dict[str, float]:
    """Return the accuracies that the weights were measured with, as fractions.

    timm measures the averaged weights where there are some (unless --model-ema-force-cpu is set); for the others there
    is no figure.
    """
    said = checkpoint.get('args')
    measured_ema = 'state_dict_ema' in checkpoint and not getattr(said, 'model_ema_force_cpu', False)
    if measured_ema != use_ema:
        return {}
    percent = {}
    metric = checkpoint.get('metric')
    if isinstance(metric, (int, float)):
        percent[getattr(said, 'eval_metric', None)] = metric
    row = next((row for row in training.epochs if row['epoch'] == training.epoch), {})
    for name in _ACCURACIES:
        if f'eval_{name}' in row:
            percent.setdefault(name, row[f'eval_{name}'])
    return {shown: round(percent[name] / 100, 6) for name, shown in _ACCURACIES.items() if name in percent}


def class_means_of(checkpoint: dict[str, Any]) -> torch.Tensor | None:
    """Return the mean directions (C, d), float64, of the classes' embeddings at a checkpoint; None if it has none."""
    state = ((checkpoint.get('task_state') or {}).get('dl2pa') or {}).get('scheduler') or {}
    sums = (state.get('class_means') or {}).get('sums')
    if not isinstance(sums, torch.Tensor) or sums.dim() != 2 or not bool(sums.isfinite().all()) or not sums.any():
        return None
    return directions_of(sums)


def _arguments(path: Path) -> Namespace | None:
    import yaml
    try:
        found = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return Namespace(**found) if isinstance(found, dict) and all(isinstance(name, str) for name in found) else None


def _summary(path: Path) -> list[dict[str, float]]:
    """Return the rows of timm's summary.csv, its finite numbers; of an epoch that was run twice, the last row."""
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
