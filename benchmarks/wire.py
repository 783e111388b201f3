"""What a step of a training in several processes sends: this head beside a learned classifier.

    python benchmarks/wire.py                       # 100,000 and 1,000,000 classes, 2 processes; 1,000,000 takes 8 GB
    python benchmarks/wire.py --sizes 100000 --processes 2 4

The processes train under DistributedDataParallel with gloo, which sends over the loopback device. The bytes are what
the kernel counts there, divided by steps and processes: what each process sends. Nothing else may use that device
meanwhile: on Linux, `unshare -n sh -c 'ip link set lo up && python benchmarks/wire.py'` sees to that. Each process has
a batch of its own. Phases:

linear      nn.Linear(d, C), cross-entropy
warm-up     the recipe `placed` with the sampled cross-entropy, while prototypes move
after it    the same, when prototypes are fixed
"""
import argparse
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from results_file import Runs, add_output_argument
from torch.nn.parallel import DistributedDataParallel

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SampledCrossEntropyLoss

NAME = 'wire'
PHASES = ('linear', 'warm-up', 'after it')
_FEATURES = 128


@dataclass(frozen=True)
class Setting:
    """All that decides a run."""
    phase: str
    classes: int
    dim: int
    processes: int
    batch_size: int
    steps: int


def sent() -> int:
    """Return the bytes that the loopback device has sent since the machine started."""
    lines = Path('/proc/net/dev').read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith('lo:')).split(':')[1].split()[8])


def make(setting: Setting):
    """Return the model inside DistributedDataParallel, its loss and a function to call after each step."""
    if setting.phase == 'linear':
        model = DistributedDataParallel(nn.Sequential(nn.Linear(_FEATURES, setting.dim),
                                                      nn.Linear(setting.dim, setting.classes)))
        return model, nn.CrossEntropyLoss(), lambda labels: None
    head = DL2PAHead(_FEATURES, setting.classes, setting.dim, train_output='embeddings', learn_scale=True)
    scheduler = AssignmentScheduler(head, interval=10 ** 6, warmup='placed' if setting.phase == 'warm-up' else 'none')
    return DistributedDataParallel(head), SampledCrossEntropyLoss(head), scheduler.step


def work(rank: int, setting: Setting, folder: str) -> None:
    """Train in one process; rank 0 writes what was sent."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=setting.processes)
    torch.manual_seed(0)
    model, criterion, step = make(setting)
    generator = torch.Generator().manual_seed(rank)

    def train(steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(setting.batch_size, _FEATURES, generator=generator)
            labels = torch.randint(0, setting.classes, (setting.batch_size,), generator=generator)
            criterion(model(x), labels).backward()
            model.zero_grad()
            step(labels)

    train(1)  # its first step sends more
    dist.barrier()
    before, began = sent(), time.perf_counter()
    train(setting.steps)
    dist.barrier()
    bytes_a_step = (sent() - before) / setting.steps / setting.processes
    seconds = (time.perf_counter() - began) / setting.steps
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        torch.save({'bytes_a_step': round(bytes_a_step), 'seconds_a_step': round(seconds, 4), 'peak_mb': peak},
                   f'{folder}/found.pt')
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[100_000, 1_000_000])
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--processes', type=int, nargs='+', default=[2])
    parser.add_argument('--batch-size', type=int, default=128, help='of each process')
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--phases', nargs='+', choices=PHASES, default=PHASES)
    add_output_argument(parser)
    args = parser.parse_args()
    runs = Runs(NAME, Setting, args.output)
    for classes in args.sizes:
        for processes in args.processes:
            for phase in args.phases:
                setting = Setting(phase, classes, args.dim, processes, args.batch_size, args.steps)
                if setting in runs:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    mp.start_processes(work, (setting, folder), nprocs=processes, start_method='spawn')
                    found = torch.load(Path(folder) / 'found.pt')
                runs.add(setting, found)
                print(setting, found, flush=True)


if __name__ == '__main__':
    main()
