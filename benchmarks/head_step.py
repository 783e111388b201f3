"""What a head costs a training step: forward, backward and optimiser step of the head alone.

Side by side in one process, in interleaved rounds, medians; float32, the paper's SGD (momentum 0.9, weight decay 1e-4),
rows of 2,048 features that need a gradient (a backbone is behind them):

- linear: nn.Linear and cross-entropy;
- partial_fc: a linear layer to d and Partial FC's sampled softmax, 10 % of the classes a step (`partial_fc.py`);
- authors: the step of the authors' code, written anew from its description: gathers the targets' prototypes, squared
  cosine loss, then updates the class means at the targets, normalises the whole (C, d) table, and computes the (B, C)
  cosines for the running accuracy and its argmax;
- logits: DL2PAHead and cross-entropy on its (B, C) logits;
- embeddings: DL2PAHead with train_output='embeddings', SquaredCosineLoss and AssignmentScheduler.step, re-solves
  aside, after the warm-up;
- sampled: DL2PAHead with train_output='embeddings', SampledCrossEntropyLoss and AssignmentScheduler.step, likewise;
- logits_placed, logits_even, embeddings_placed, embeddings_even, sampled_placed, sampled_even: the same three with
  AssignmentScheduler.step during the warm-up of a recipe; embeddings_paper: with the paper's moving average;
- neck: nn.Linear(2048, d) alone, with the sum of its output for a loss: what no head with this neck can go below.

A step costs the same whatever the prototypes: they are random unit rows here, which take no time to make. On a GPU the
rows have the peak of its memory beside what was in use before the method was made: weights, gradients, momentum and
what a step takes. They also have how many kernels a step launches, and the milliseconds that these take on the GPU:
where that is far less than the step's time, launching is what takes the time, and it goes on beside the work of a
backbone.

    python benchmarks/head_step.py
    python benchmarks/head_step.py --device cuda --batch-size 256 --sizes 1000,512 21841,128 100000,128 1000000,128
"""
import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from dl2pa_recipes import scheduler_arguments
from partial_fc import PartialFC
from results_file import add_output_argument, read_results, result_name, write_results
from tqdm import tqdm

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SampledCrossEntropyLoss, SquaredCosineLoss

FEATURES = 2048
SIZES = ((1000, 512), (21841, 128), (100000, 128))
METHODS = ('linear', 'partial_fc', 'authors', 'logits', 'logits_placed', 'logits_even', 'neck', 'embeddings',
           'embeddings_placed', 'embeddings_even', 'embeddings_paper', 'sampled', 'sampled_placed', 'sampled_even')
# A linear classifier of more classes than this needs more memory than most machines have.
_MOST_LINEAR = 200_000
# Batches until a warm-up ends: never.
_NEVER = 10 ** 9

Step = Callable[[torch.Tensor, torch.Tensor], None]


class AuthorsStep(nn.Module):
    """The authors' head as described: fixed prototypes as columns, class means as a table that is normalised whole."""

    def __init__(self, prototypes: torch.Tensor):
        super().__init__()
        num_classes, dim = prototypes.shape
        device = prototypes.device
        self.neck = nn.Linear(FEATURES, dim, device=device)
        self.columns = prototypes.t().contiguous()
        self.means = F.normalize(torch.randn(num_classes, dim, device=device))

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.embeddings = self.neck(x)
        cosines = F.cosine_similarity(self.embeddings, self.columns[:, labels].t(), dim=1)
        return (1 - cosines).square().sum()

    @torch.no_grad()
    def after(self, labels: torch.Tensor) -> None:
        z = F.normalize(self.embeddings)
        # Adds 0.9 q to q, and of several samples of a class the last one counts.
        self.means[labels] += 0.9 * self.means[labels] + 0.1 * z
        self.means = F.normalize(self.means)
        self.right = ((z @ self.columns).argmax(dim=1) == labels).sum()


def make_step(method: str, prototypes: torch.Tensor) -> Step:
    """Return a training step of a method, on the prototypes' device."""
    device, (num_classes, dim) = prototypes.device, prototypes.shape

    def step_of(module: nn.Module, loss: Callable, after: Callable[[torch.Tensor], Any] | None = None) -> Step:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        def step(x: torch.Tensor, labels: torch.Tensor) -> None:
            loss(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if after:
                after(labels)
        return step

    if method == 'linear':
        linear = nn.Linear(FEATURES, num_classes, device=device)
        return step_of(linear, lambda x, y: F.cross_entropy(linear(x), y))
    if method == 'neck':
        neck = nn.Linear(FEATURES, dim, device=device)
        return step_of(neck, lambda x, y: neck(x).sum())
    if method == 'partial_fc':
        neck, centres = nn.Linear(FEATURES, dim, device=device), PartialFC(num_classes, dim, device=device)
        return step_of(neck, lambda x, y: centres.loss(neck(x), y), lambda y: centres.step())
    if method == 'authors':
        authors = AuthorsStep(prototypes)
        return step_of(authors, authors.loss, authors.after)
    output, _, recipe = method.partition('_')
    train_output = 'logits' if output == 'logits' else 'embeddings'
    head = DL2PAHead(FEATURES, num_classes, dim, prototypes=prototypes, train_output=train_output, device=device,
                     learn_scale=output == 'sampled')
    if method == 'logits':
        return step_of(head, lambda x, y: F.cross_entropy(head(x), y))
    with warnings.catch_warnings():
        # At very many classes the end of an even warm-up would be refused; it does not come here.
        warnings.simplefilter('ignore', UserWarning)
        scheduler = AssignmentScheduler(head, interval=_NEVER, **scheduler_arguments(recipe or 'placed'),
                                       **({} if recipe else {'warmup': 'none'}))
    if output == 'logits':
        return step_of(head, lambda x, y: F.cross_entropy(head(x), y), scheduler.step)
    criterion = SampledCrossEntropyLoss(head) if output == 'sampled' else SquaredCosineLoss(head)
    return step_of(head, lambda x, y: criterion(head(x), y), scheduler.step)


class Measurement:
    """Times steps of `repeats` batches each, made beforehand, and reads a GPU's memory."""

    def __init__(self, num_classes: int, batch_size: int, repeats: int, device: torch.device):
        self.num_classes, self.batch_size, self.repeats, self.device = num_classes, batch_size, repeats, device

    def seconds(self, step: Step) -> float:
        """Return the seconds of a step, as a mean over the batches; the launches of one overlap the work before."""
        batches = self._batches()
        self._wait()
        began = time.perf_counter()
        for x, labels in batches:
            step(x, labels)
        self._wait()
        return (time.perf_counter() - began) / self.repeats

    def _batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(self.batch_size, FEATURES, device=self.device, requires_grad=True),
                 torch.randint(0, self.num_classes, (self.batch_size,), device=self.device))
                for _ in range(self.repeats)]

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def make(self, method: str, prototypes: torch.Tensor) -> tuple[Step, int | None]:
        """Return a method's step, warmed up, and the MiB that it takes of a GPU."""
        if self.device.type != 'cuda':
            step = make_step(method, prototypes)
            self.seconds(step)
            return step, None
        before = torch.cuda.memory_allocated()
        step = make_step(method, prototypes)
        self.seconds(step)
        x = torch.randn(self.batch_size, FEATURES, device=self.device, requires_grad=True)
        labels = torch.randint(0, self.num_classes, (self.batch_size,), device=self.device)
        torch.cuda.reset_peak_memory_stats()
        step(x, labels)
        return step, round((torch.cuda.max_memory_allocated() - before) / 2 ** 20)


    def busy(self, step: Step) -> tuple[int | None, float | None]:
        """Return how many kernels and copies a step launches on the GPU, and the milliseconds that they take there,
        from PyTorch's profiler; None twice where it sees none."""
        batches = self._batches()
        self._wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for x, labels in batches:
                step(x, labels)
            self._wait()
        spans = [event.time_range.elapsed_us() for event in profile.events()
                 if event.device_type == torch.autograd.DeviceType.CUDA]
        if not spans:
            return None, None
        return round(len(spans) / self.repeats), round(sum(spans) / 1000 / self.repeats, 4)


def measure(num_classes: int, dim: int, methods: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a size."""
    device = torch.device(args.device)
    prototypes = F.normalize(torch.randn(num_classes, dim, device=device))
    measurement = Measurement(num_classes, args.batch_size, args.repeats, device)
    result: dict[str, Any] = {'num_classes': num_classes, 'dim': dim}
    steps: dict[str, Step] = {}
    for method in methods:
        if method == 'linear' and num_classes > _MOST_LINEAR and device.type == 'cpu':
            result['linear_failed'] = 'not tried: 24 GB at a million classes'
            continue
        try:
            steps[method], memory = measurement.make(method, prototypes)
        except torch.cuda.OutOfMemoryError:
            result[f'{method}_failed'] = 'out of memory'
            torch.cuda.empty_cache()
            continue
        except ValueError as error:  # an even warm-up that would have to end with a rotation of too many classes
            result[f'{method}_failed'] = str(error)
            continue
        if memory is not None:
            result[f'{method}_mb'] = memory
    times: dict[str, list[float]] = {method: [] for method in steps}
    for _ in tqdm(range(args.rounds), f'({num_classes}, {dim})', unit='round', disable=None):
        for method, step in steps.items():
            times[method].append(measurement.seconds(step))
    result |= {f'{method}_ms': round(1000 * median(values), 3) for method, values in times.items()}
    if device.type == 'cuda':
        for method, step in steps.items():
            result[f'{method}_kernels'], result[f'{method}_busy_ms'] = measurement.busy(step)
    for method in ('linear', 'authors', 'neck', 'partial_fc'):
        if times.get(method) and times.get('embeddings'):
            result[f'faster_than_{method}'] = round(median(times[method]) / median(times['embeddings']), 2)
    return result


def size_of(text: str) -> tuple[int, int]:
    """Return the pair (C, d) of the text 'C,d'."""
    num_classes, dim = map(int, text.split(','))
    return num_classes, dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--sizes', type=size_of, nargs='+', default=SIZES, metavar='C,d')
    parser.add_argument('--methods', choices=METHODS, nargs='+', default=METHODS)
    parser.add_argument('--rounds', type=int, default=6, help='each times --repeats steps of each method')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--resume', action='store_true', help='keep the rows that are in the results already')
    add_output_argument(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    name = result_name('head_step', args.device)
    results = read_results(name, args.output) if args.resume else []
    for num_classes, dim in args.sizes:
        if (num_classes, dim) in [(row['num_classes'], row['dim']) for row in results]:
            continue
        results.append(measure(num_classes, dim, list(args.methods), args))
        print(results[-1], flush=True)
        path = write_results(name, vars(args), results, args.output)
        if args.device != 'cpu':
            torch.cuda.empty_cache()
    print(path if results else 'nothing to do')


if __name__ == '__main__':
    main()
