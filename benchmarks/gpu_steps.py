"""The steps of `gpu.py`: what each runs, what it leaves behind, how long it may take; the most telling first."""
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accuracy_arguments import make_parser, recipe_of
from accuracy_queue import peers
from accuracy_recipe import SIZES

__all__ = ['KINDS', 'Step', 'all_steps', 'seconds_an_epoch']

KINDS = ('tests', 'head_step', 'cifar', 'assignment', 'prototypes', 'train_step', 'tiny_imagenet')
# What an epoch of CIFAR-100 is taken to last until a training has ended, for choosing what to begin with: on an H100 it
# took 7 to 9 seconds with eight trainings at once, so half of that with four.
_GUESSED_EPOCH = 4.0
HEAD_STEP_SIZES = ('1000,512', '21841,128', '100000,128', '1000000,128')


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name: What it is called in the output, and its log.
        kind: One of `KINDS`.
        script: The script in this folder.
        arguments: Its arguments; the folder of its results is added.
        record: The file that it leaves, in the folder of the results.
        least: Seconds without which it is not begun.
        limit: Seconds after which it is ended.
        folder: The folder of its results, in that of the run.
        complete: Whether a record says that all is done.
        needs: What has to be there: 'arrays', 'tiny_imagenet' or nothing.
        training: It ends by itself in time, with a checkpoint.
        alone: Nothing else runs meanwhile, as it takes times.
    """
    name: str
    kind: str
    script: str
    arguments: tuple[str, ...]
    record: str
    least: float
    limit: float
    folder: str = '.'
    complete: Callable[[dict[str, Any]], bool] = lambda record: True
    needs: str | None = None
    training: bool = False
    alone: bool = True

    def done(self, *folders: Path) -> bool:
        """Whether one of the folders has a complete record."""
        paths = [folder / self.folder / self.record for folder in folders]
        return any(self.complete(json.loads(path.read_text())) for path in paths if path.exists())


def seconds_an_epoch(folders: list[Path]) -> float | None:
    """Return what an epoch of a ResNet-32 on CIFAR-100 lasted on a GPU, from the slowest record; None without any."""
    found = []
    for path in (path for folder in folders for path in folder.glob('accuracy/*.json')):
        record = json.loads(path.read_text())
        if record['environment']['gpu'] and record['recipe']['model'] == 'cifar_resnet32':
            found.append(record['training_seconds'] / record['recipe']['epochs'])
    return max(found, default=None)


def all_steps(device: str, *, seconds: float, parallel: int, epoch: float | None, dry_run: bool) -> list[Step]:
    """Return the steps in order.

    Args:
        device: 'cuda', or 'cpu' in a dry run.
        seconds: What is left of the time: it decides whether trainings begin with the schedule's short version.
        parallel: How many trainings run side by side.
        epoch: What an epoch lasts, if it is known.
        dry_run: Toy sizes.
    """
    make = _toy_steps if dry_run else _steps
    return make(device, seconds, parallel, epoch or _GUESSED_EPOCH)


def _steps(device: str, seconds: float, parallel: int, epoch: float) -> list[Step]:
    on = ('--device', device)
    trainings = {size: [_training(run, on, 'cifar', 'arrays') for dim in (50, 10, 100) for run in peers(size, dim)]
                 for size in ('distiller_100', 'distiller', 'paper')}
    # All methods at one d, in the long version.
    fits = 8 * SIZES['distiller']['epochs'] * epoch / parallel <= seconds
    order = ('distiller', 'paper') if fits else ('distiller_100', 'distiller', 'paper')
    return [
        Step('tests', 'tests', 'gpu_tests.py', on, f'gpu_tests_{device}.json', 30, 120, complete=_tests_passed),
        Step('head_step', 'head_step', 'head_step.py',
             (*on, '--batch-size', '256', '--sizes', *HEAD_STEP_SIZES, '--resume'), f'head_step_{device}.json', 30, 150,
             complete=lambda record: len(record['results']) >= len(HEAD_STEP_SIZES)),
        *(step for size in order for step in trainings[size]),
        Step('assignment', 'assignment', 'assignment.py',
             (*on, '--threads', str(os.cpu_count()), '--resume'), f'assignment_{device}.json', 40, 300,
             complete=lambda record: len(record['results']) >= 4),
        Step('prototypes', 'prototypes', 'prototypes.py', (*on, '--resume'), f'prototypes_{device}.json', 40, 200,
             complete=lambda record: len(record['results']) >= 4),
        Step('train_step', 'train_step', 'train_step.py', (*on, *_REAL_TRAIN_STEP), f'train_step_{device}.json', 45,
             120),
        Step('train_step_compiled', 'train_step', 'train_step.py', (*on, *_REAL_TRAIN_STEP, '--compile', 'inductor'),
             f'train_step_compiled_{device}.json', 120, 300),
        *(_training(run, on, 'tiny_imagenet', 'tiny_imagenet') for dim in (50, 100, 200)
          for run in peers('distiller_100', dim)),
    ]


_REAL_TRAIN_STEP = ('--models', 'resnet50', '--sizes', '1000,512', '--batch-size', '256', '--amp', 'bfloat16',
                    '--channels-last', '--rounds', '8', '--repeats', '5', '--warm-up', '2')


# Seconds for a toy step: mostly the import of PyTorch and timm, on a machine that has other work.
_TOY_LIMIT = 240


def _toy_steps(device: str, seconds: float, parallel: int, epoch: float) -> list[Step]:
    """Return each kind of step at a size that takes a moment, on scikit-learn's digits, side by side.

    Of the trainings it has those whose arguments differ in kind; `_steps` reads the arguments of all.
    """
    on = ('--device', device)
    short = peers('distiller_100', 50)
    toy = ('--model', 'cifar_resnet8', '--epochs', '1', '--dim', '4')
    steps = [
        Step('tests', 'tests', 'gpu_tests.py', (*on, '--select', 'float32'), 'gpu_tests.json', 1, _TOY_LIMIT,
             complete=_tests_passed),
        Step('head_step', 'head_step', 'head_step.py',
             (*on, '--batch-size', '8', '--sizes', '40,8', '--rounds', '1', '--repeats', '1', '--resume'),
             'head_step.json', 1, _TOY_LIMIT),
        *(_training([*run, *toy], on, 'cifar', None) for run in (short[2], short[4], *short[5:7])),
        _training([*peers('paper', 50)[7], *toy], on, 'cifar', None),
        Step('assignment', 'assignment', 'assignment.py', (*on, '--sizes', '60'), 'assignment.json', 1, _TOY_LIMIT),
        Step('prototypes', 'prototypes', 'prototypes.py', (*on, '--sizes', '20,4', '--effort', '0.001'),
             'prototypes.json', 1, _TOY_LIMIT),
        *(Step(name, 'train_step', 'train_step.py',
               (*on, '--models', 'test_resnet', '--sizes', '10,4', '--batch-size', '2', '--image-size', '32', '--amp',
                'bfloat16', '--channels-last', '--rounds', '1', *more), f'{name}.json', 1, _TOY_LIMIT)
          for name, more in (('train_step', ()), ('train_step_compiled', ('--compile', 'eager')))),
        _training([*short[0], *toy], on, 'tiny_imagenet', None),
    ]
    return [replace(step, alone=False) for step in steps]


def _tests_passed(record: dict[str, Any]) -> bool:
    found = record['results']
    return found['complete'] and not found['failed'] and found['passed'] > 0


def _training(run: list[str], on: tuple[str, ...], kind: str, needs: str | None) -> Step:
    """Return the step of a training, from the arguments of accuracy.py."""
    recipe = recipe_of(make_parser('').parse_args(run))
    folder = 'accuracy' if kind == 'cifar' else kind
    return Step(f'{folder}/{recipe.name()}', kind, 'accuracy.py', (*run, *on), f'{recipe.name()}.json', 30, 3600,
                folder=folder, needs=needs, training=True, alone=False)
