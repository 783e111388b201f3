"""What a head costs a training step: forward, backward and optimiser step of the head alone.

Side by side in one process, in interleaved rounds, medians; float32, the paper's SGD (momentum 0.9, weight decay 1e-4),
128 rows of 2,048 features that need a gradient (a backbone is behind them):

- linear: nn.Linear and cross-entropy;
- authors: the step of the authors' code, written anew from its description: gathers the targets' prototypes, squared
  cosine loss, then updates the class means at the targets, normalises the whole (C, d) table, and computes the (B, C)
  cosines for the running accuracy and its argmax;
- logits: DL2PAHead and cross-entropy on its (B, C) logits;
- embeddings: DL2PAHead with train_output='embeddings', SquaredCosineLoss and AssignmentScheduler.step, re-solves
  aside;
- neck: nn.Linear(2048, d) alone, with the sum of its output for a loss: what no head with this neck can go below.

    python benchmarks/head_step.py
"""
import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from results_file import write_results
from tqdm import tqdm

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SquaredCosineLoss, make_prototypes

FEATURES = 2048
SIZES = ((1000, 512), (21841, 128), (100000, 128))


class AuthorsStep(nn.Module):
    """The authors' head as described: fixed prototypes as columns, class means as a table that is normalised whole."""

    def __init__(self, prototypes: torch.Tensor):
        super().__init__()
        num_classes, dim = prototypes.shape
        self.neck = nn.Linear(FEATURES, dim)
        self.columns = prototypes.t().contiguous()
        self.means = F.normalize(torch.randn(num_classes, dim))

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


def steps(num_classes: int, dim: int, device: torch.device) -> dict[str, Callable[[torch.Tensor, torch.Tensor], None]]:
    """Return a training step of each method."""
    prototypes = make_prototypes(num_classes, dim)
    linear = nn.Linear(FEATURES, num_classes).to(device)
    neck = nn.Linear(FEATURES, dim).to(device)
    authors = AuthorsStep(prototypes)
    authors.neck.to(device)
    authors.columns, authors.means = authors.columns.to(device), authors.means.to(device)
    logits = DL2PAHead(FEATURES, num_classes, dim, prototypes=prototypes, device=device)
    embeddings = DL2PAHead(
        FEATURES, num_classes, dim, prototypes=prototypes, train_output='embeddings', device=device)
    criterion = SquaredCosineLoss(embeddings)
    scheduler = AssignmentScheduler(embeddings, stop=0)

    def step_of(module: nn.Module, loss, after=None):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        def step(x: torch.Tensor, labels: torch.Tensor) -> None:
            loss(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if after:
                after(labels)
        return step

    return {
        'linear': step_of(linear, lambda x, y: F.cross_entropy(linear(x), y)),
        'authors': step_of(authors, authors.loss, authors.after),
        'logits': step_of(logits, lambda x, y: F.cross_entropy(logits(x), y)),
        'neck': step_of(neck, lambda x, y: neck(x).sum()),
        'embeddings': step_of(embeddings, lambda x, y: criterion(embeddings(x), y), scheduler.step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=6, help='each times --repeats steps of each method')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    def now() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    results = []
    for num_classes, dim in SIZES:
        methods = steps(num_classes, dim, device)
        times: dict[str, list[float]] = {name: [] for name in methods}
        for number in tqdm(range(args.rounds + 1), f'({num_classes}, {dim})', unit='round'):
            for name, step in methods.items():
                for _ in range(args.repeats):
                    x = torch.randn(args.batch_size, FEATURES, device=device, requires_grad=True)
                    labels = torch.randint(0, num_classes, (args.batch_size,), device=device)
                    began = now()
                    step(x, labels)
                    if number:  # the first round warms up
                        times[name].append(now() - began)
        result = {'num_classes': num_classes, 'dim': dim}
        result |= {f'{name}_ms': round(1000 * median(values), 3) for name, values in times.items()}
        ours = median(times['embeddings'])
        for name in ('linear', 'authors', 'neck'):
            result[f'faster_than_{name}'] = round(median(times[name]) / ours, 2)
        results.append(result)
        print(result)
        del methods
    name = 'head_step' if device.type == 'cpu' else f'head_step_{device.type}'
    print(write_results(name, vars(args), results))


if __name__ == '__main__':
    main()
