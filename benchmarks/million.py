"""The jobs of a head at very many classes, end to end: seconds and peak memory of each, or the refusal.

    python benchmarks/million.py                     # 1,000,000 classes, d = 128 and 256; 10 GB

Each job is a process of its own. Its memory is the peak beyond Python with the package imported, so the head counts.

wrap         `wrap_dl2pa` on a small timm model: prototypes and head are made
step         20 steps of a training on 128 images' features by `SampledCrossEntropyLoss`, in the warm-up; of one
prime        `prime`
rotation     `align_prototypes`, which ends the warm-up of the recipe `even`
re-solve     `solve_assignment` within 60 seconds, where a tenth of the classes exchanged places; the gap that is left
nearest      `head.nearest` of 1,000 embeddings, the five nearest classes
save, load   `save_model`, `load_model`: the folder that `push_model_to_hub` uploads
"""
import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn as nn
from results_file import Runs, add_output_argument

from timm_dl2pa import (
    AssignmentScheduler,
    DL2PAHead,
    SampledCrossEntropyLoss,
    align_prototypes,
    load_model,
    prime,
    save_model,
    solve_assignment,
    wrap_dl2pa,
)

NAME = 'million'
_BUDGET = 60


@dataclass(frozen=True)
class Setting:
    """All that decides a run."""
    job: str
    classes: int
    dim: int


def _model(setting: Setting, **options: Any) -> nn.Module:
    return wrap_dl2pa(timm.create_model('test_resnet', num_classes=setting.classes), dim=setting.dim, **options)


def _means(head: DL2PAHead, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = nn.functional.normalize(torch.randn(head.prototypes.shape, generator=generator), dim=1)
    order = torch.arange(head.num_classes)
    moved = torch.randperm(head.num_classes, generator=generator)[:round(share * head.num_classes)]
    order[moved] = order[moved.roll(1)]
    return head.prototypes[order] + noise


def wrap(setting: Setting, folder: Path) -> tuple[float, str]:
    began = time.perf_counter()
    _model(setting)
    return time.perf_counter() - began, ''


def step(setting: Setting, folder: Path) -> tuple[float, str]:
    head = _model(setting, train_output='embeddings', learn_scale=True).get_classifier().train()
    criterion, scheduler = SampledCrossEntropyLoss(head), AssignmentScheduler(head, interval=10 ** 6)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for number in range(22):
        if number == 2:
            began = time.perf_counter()
        labels = torch.randint(setting.classes, (128,))
        criterion(head(torch.randn(128, head.in_features)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(labels)
    return (time.perf_counter() - began) / 20, ''


def job_prime(setting: Setting, folder: Path) -> tuple[float, str]:
    model = _model(setting)
    labels = torch.arange(setting.classes)
    loader = [(torch.randn(64, 3, 32, 32), labels[:64])]
    began = time.perf_counter()
    prime(model, loader, progress=False)
    return time.perf_counter() - began, ''


def rotation(setting: Setting, folder: Path) -> tuple[float, str]:
    head = _model(setting).get_classifier()
    began = time.perf_counter()
    align_prototypes(_means(head, 0.1), head.prototypes)
    return time.perf_counter() - began, ''


def resolve(setting: Setting, folder: Path) -> tuple[float, str]:
    head = _model(setting).get_classifier()
    means = _means(head, 0.1)
    began = time.perf_counter()
    result = solve_assignment(class_means=means, prototypes=head.prototypes, start=head.assignment,
                              time_budget=_BUDGET)
    return time.perf_counter() - began, f'gap {100 * result.gap:.2g} %, {result.moved:,} moved'


def nearest(setting: Setting, folder: Path) -> tuple[float, str]:
    head = _model(setting).get_classifier().eval()
    embeddings = nn.functional.normalize(torch.randn(1000, setting.dim), dim=1)
    began = time.perf_counter()
    head.nearest(embeddings, k=5)
    return time.perf_counter() - began, ''


def save(setting: Setting, folder: Path) -> tuple[float, str]:
    model = _model(setting)
    began = time.perf_counter()
    save_model(model, folder / 'model')
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / 'model').iterdir())
    return seconds, f'{size / 1e6:.0f} MB'


def load(setting: Setting, folder: Path) -> tuple[float, str]:
    began = time.perf_counter()
    load_model(folder / 'model')
    return time.perf_counter() - began, ''


JOBS = {'wrap': wrap, 'step': step, 'prime': job_prime, 'rotation': rotation, 're-solve': resolve, 'nearest': nearest,
        'save': save, 'load': load}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(setting: Setting, folder: Path, answers: Any) -> None:
    """Do a job in this process, and put what was measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timm.create_model('test_resnet')
    before = _peak()
    try:
        seconds, said = JOBS[setting.job](setting, folder)
        answers.put({'seconds': float(f'{seconds:.4g}'), 'peak_mb': _peak() - before, 'said': said})
    except ValueError as error:
        answers.put({'seconds': None, 'peak_mb': None, 'said': f'refused: {error}'})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--classes', type=int, default=1_000_000)
    parser.add_argument('--dims', type=int, nargs='+', default=[128, 256])
    parser.add_argument('--jobs', nargs='+', choices=JOBS, default=list(JOBS))
    add_output_argument(parser)
    args = parser.parse_args()
    runs, context = Runs(NAME, Setting, args.output), multiprocessing.get_context('spawn')
    for dim in args.dims:
        with TemporaryDirectory() as folder:
            for job in args.jobs:
                setting, answers = Setting(job, args.classes, dim), context.Queue()
                if setting in runs and job != 'save':  # which `load` needs
                    continue
                process = context.Process(target=run, args=(setting, Path(folder), answers))
                process.start()
                found = answers.get()
                process.join()
                runs.add(setting, found)
                print(setting, found, flush=True)


if __name__ == '__main__':
    main()
