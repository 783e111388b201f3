"""The record of a training with timm's train.py, for the model card."""
import csv
import logging
import math
from argparse import Namespace
from pathlib import Path

import torch

from ..files.card import Training
from ..scheduling.class_means import directions_of
from .checkpoint import Checkpoint

__all__ = ['class_means_of', 'metrics_of', 'read_training']

_logger = logging.getLogger(__name__)

# Arguments of train.py that describe the training. None of them names a folder or a machine.
_SETTINGS = ('dataset', 'epochs', 'batch_size', 'img_size', 'opt', 'lr', 'lr_base', 'sched', 'warmup_epochs',
             'weight_decay', 'smoothing', 'mixup', 'cutmix', 'aa', 'reprob', 'drop', 'drop_path', 'amp', 'model_ema',
             'pretrained', 'seed')
_ACCURACIES = {'top1': 'accuracy', 'top5': 'top-5 accuracy'}


def read_training(checkpoint: Checkpoint) -> Training:
    """Read the record of a training from a checkpoint of train.py and the files summary.csv and args.yaml beside it.

    A summary.csv whose metric differs from the checkpoint's belongs to another run. It is ignored, with a warning.

    Args:
        checkpoint: The checkpoint, see `read_checkpoint`.

    Returns:
        The record, empty as far as nothing is known.
    """
    path, script_args = checkpoint.path, checkpoint.args
    if not vars(script_args):
        script_args = _read_args_yaml(path.with_name('args.yaml'))
    given = {name: getattr(script_args, name, None) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if isinstance(value, (str, int, float)) and value}
    if isinstance(settings.get('dataset'), str) and ('/' in settings['dataset'] or '\\' in settings['dataset']):
        del settings['dataset']
    epochs = _read_summary(path.with_name('summary.csv'))
    row = next((row for row in epochs if row['epoch'] == checkpoint.epoch), None)
    recorded = (row or {}).get(f'eval_{_eval_metric(script_args)}')
    metric = checkpoint.metric
    differs = None not in (recorded, metric) and not math.isclose(recorded, metric, rel_tol=1e-3)
    if epochs and (row is None or differs):
        _logger.warning(f'{path.with_name("summary.csv")} is not of the same run as {path.name}, and is ignored.')
        epochs = []
    return Training(epoch=checkpoint.epoch, epochs=epochs, settings=settings,
                    history=checkpoint.record.history if checkpoint.record else [])


def _eval_metric(script_args: Namespace | None) -> str | None:
    """Return the name of the metric that train.py compares epochs by."""
    name = getattr(script_args, 'eval_metric', 'top1')
    return name if isinstance(name, str) else None


def metrics_of(training: Training, checkpoint: Checkpoint, use_ema: bool) -> dict[str, float]:
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
    on_cpu = getattr(checkpoint.args, 'model_ema_force_cpu', False) is True
    measured_ema = checkpoint.averaged_state is not None and not on_cpu
    if measured_ema != use_ema:
        return {}
    percent = {}
    if checkpoint.metric is not None and hasattr(checkpoint.args, 'eval_metric'):
        percent[_eval_metric(checkpoint.args)] = checkpoint.metric
    row = next((row for row in training.epochs if row['epoch'] == training.epoch), {})
    for name in _ACCURACIES:
        if f'eval_{name}' in row:
            percent.setdefault(name, row[f'eval_{name}'])
    return {title: round(percent[name] / 100, 6) for name, title in _ACCURACIES.items() if name in percent}


def class_means_of(checkpoint: Checkpoint) -> torch.Tensor | None:
    """Return the mean directions of the classes' embeddings at a checkpoint.

    Args:
        checkpoint: The checkpoint, see `read_checkpoint`.

    Returns:
        (C, d) float64 unit rows, with rows of zeros for classes without samples; None if the checkpoint has no class
        means.
    """
    sums = checkpoint.record and checkpoint.record.class_sums
    if sums is None or not sums.is_floating_point() or not bool(sums.isfinite().all()) or not sums.any():
        return None
    return directions_of(sums)


def _read_args_yaml(path: Path) -> Namespace | None:
    """Return the arguments in timm's args.yaml, or None if it cannot be read."""
    import yaml
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return Namespace(**values) if isinstance(values, dict) and all(isinstance(name, str) for name in values) else None


def _read_summary(path: Path) -> list[dict[str, float]]:
    """Return the finite numbers in the rows of timm's summary.csv. Of an epoch with several rows, the last one counts.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        _logger.warning(f'{path} cannot be read, and is ignored: {error}.')
        return []
    rows = {}
    for line in lines:
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
