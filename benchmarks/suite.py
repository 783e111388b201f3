"""Does one default hold? Each recipe beside learned classifiers with the same parts, on several kinds of data.

    python benchmarks/suite.py --arrays CIFAR100 --grocery GROCERY --weights FILE      # all that is not there yet
    python benchmarks/suite.py --data digits letters --methods linear_bn cosine placed # what needs no files
    python benchmarks/suite.py --table                                                 # of what is there

The data sets are described in `suite_data.py`. d is a tenth, a half and all of the number of classes. Methods:

linear      nn.Linear on the features, without d
linear_bn   nn.Linear(features, d), batch norm, nn.Linear(d, C): the head's neck and a learned classifier
cosine      the same neck, cosines with learned class vectors, a learned scale from 4: all the head's parts, but learned
static      fixed prototypes, random assignment
matched     the same, re-solved after each epoch from the class means
paper       the published method: linear neck, squared cosine, re-solved each epoch by the paper's moving average
even, placed

A method ending in `_plain` has a linear neck without batch norm and a fixed scale; one ending in `_balanced` is trained
by balanced softmax, for the long tail. Trainings: `sgd` (momentum, steps at
a half and four fifths) and `adamw` (cosine). Each run adds its row at once, and is not run again.
"""
import argparse
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import torch
import torch.nn as nn
from accuracy_methods import CosineClassifier
from image_arrays import augment
from results_file import Runs, add_output_argument, read_results
from suite_data import DATA, Samples, load_samples

from timm_dl2pa import AssignmentScheduler, BalancedSoftmaxLoss, DL2PAHead, SquaredCosineLoss, default_scale
from timm_dl2pa.recipes import RECIPES

NAME = 'suite'
LEARNED = ('linear', 'linear_bn', 'cosine')
METHODS = (*LEARNED, 'static', 'matched', 'paper', 'even', 'placed')
_PLAIN, _BALANCED = '_plain', '_balanced'
# Learning rates, smaller for features, and weight decays.
TRAININGS = {'sgd': (0.1, 0.03, 1e-4), 'adamw': (3e-3, 1e-3, 0.05)}
SHARES = {'tenth': 0.1, 'half': 0.5, 'all': 1.0}
# Batches of a training.
STEPS = {'digits': 300, 'ideographs': 1200, 'long_tail': 1200, 'cifar100': 1200, 'cifar100_longer': 6000}
_STEPS = 840
_BATCH = 64


@dataclass(frozen=True)
class Setting:
    """All that decides a run. `dim` is None for the method without one."""
    data: str
    method: str
    dim: int | None
    training: str
    seed: int


def base_of(method: str) -> str:
    """Return a method's name without what it ends in."""
    return method.removesuffix(_PLAIN).removesuffix(_BALANCED)


class Backbone(nn.Module):
    """Four convolutions with batch norm; features are their mean over the image."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        widths = (32, 64, 64, 64) if side < 16 else (16, 32, 64, 96)
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            layers += [nn.Conv2d(channels, width, 3, 1 if index == 1 else 2, 1, bias=False), nn.BatchNorm2d(width),
                       nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(dim=(2, 3))


def make_classifier(setting: Setting, features: int, num_classes: int) -> nn.Module:
    """Return the classifier of a method. Draws from the global generator."""
    method, dim, plain = base_of(setting.method), setting.dim, setting.method.endswith(_PLAIN)
    if method == 'linear':
        return nn.Linear(features, num_classes)
    if method in LEARNED:
        neck = [nn.Linear(features, dim)] if plain else [nn.Linear(features, dim, bias=False), nn.BatchNorm1d(dim)]
        last = nn.Linear(dim, num_classes) if method == 'linear_bn' else CosineClassifier(
            dim, num_classes, default_scale(num_classes) if plain else 4.0, learn_scale=not plain)
        return nn.Sequential(*neck, last)
    arguments = {'neck': 'linear', 'learn_scale': False} if plain else {}
    recipe = method if method in RECIPES else 'even'
    return DL2PAHead(features, num_classes, dim, recipe=recipe, seed=setting.seed, **arguments)


def make_scheduler(setting: Setting, head: nn.Module, steps: int, epoch: int) -> AssignmentScheduler | None:
    if not isinstance(head, DL2PAHead):
        return None
    method = base_of(setting.method)
    more = {'static': {'stop': 0}, 'matched': {'warmup': 'none'}, 'even': {'warmup_length': epoch}}.get(method, {})
    return AssignmentScheduler(head, interval=epoch, total=steps, **more)


def learning_rate(training: str, share: float) -> float:
    """Return the factor on the learning rate when this share of the training is over; it rises for a twentieth."""
    if share < 0.05:
        return share / 0.05
    if training == 'adamw':
        return 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
    return 1.0 if share < 0.5 else 0.1 if share < 0.8 else 0.01


def run(setting: Setting, samples: Samples) -> dict[str, Any]:
    """Train, and return what was measured."""
    torch.manual_seed(setting.seed)
    x, y = samples.x, samples.y
    backbone: nn.Module = nn.Identity() if samples.are_features else Backbone(x.shape[1], x.shape[2])
    classifier = make_classifier(setting, x.shape[1] if samples.are_features else backbone.num_features,
                                 samples.num_classes)
    model = nn.Sequential(backbone, classifier)
    rate, rate_of_features, decay = TRAININGS[setting.training]
    rate = rate_of_features if samples.are_features else rate
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay) \
        if setting.training == 'sgd' else torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    steps, epoch = STEPS.get(setting.data, _STEPS), len(x) // _BATCH
    scheduler = make_scheduler(setting, classifier, steps, epoch)
    counts = torch.bincount(y, minlength=samples.num_classes)
    criterion: nn.Module = BalancedSoftmaxLoss(samples.num_classes, counts) if setting.method.endswith(_BALANCED) \
        else nn.CrossEntropyLoss()
    if setting.method.startswith('paper'):
        criterion = SquaredCosineLoss(classifier)
        rate /= 4  # The paper's sum over 128 images at 0.01 is a mean times 12.8 at 0.1; ours is a mean times 30.
    mean, deviation = (0.0, 1.0) if samples.are_features else (x.float().mean(), x.float().std())
    generator, began = torch.Generator().manual_seed(setting.seed), time.process_time()
    model.train()
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        index = order[step % epoch * _BATCH:(step % epoch + 1) * _BATCH]
        images = (x[index].float() - mean) / deviation
        if not samples.are_features:
            images = augment(images, max(1, x.shape[2] // 16), setting.data.startswith(('cifar', 'long_tail')),
                             generator)
        for group in optimizer.param_groups:
            group['lr'] = rate * learning_rate(setting.training, step / steps)
        if scheduler is not None:
            scheduler.resolve_if_due()
        loss = criterion(model(images), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(y[index])
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        features = torch.cat([backbone((part.float() - mean) / deviation) for part in samples.x_test.split(500)])
        logits = torch.cat([classifier(part) for part in features.split(500)])
        embeddings = classifier.embed(features) if scheduler is not None else \
            classifier[:-1](features) if isinstance(classifier, nn.Sequential) else features
    right = (logits.argmax(dim=1) == samples.y_test).float()
    found = {'top1': 100 * float(right.mean()), 'calibration_error': metrics.calibration_error(logits, samples.y_test),
             'recall_at_1': metrics.recall_at_1(embeddings, samples.y_test), 'train_loss': loss.item(),
             'top1_of_rare': 100 * float(right[counts[samples.y_test] < 20].mean()) if counts.min() < 20 < counts.max()
             else None}
    found = {name: value if value is None else round(value, 2) for name, value in found.items()}
    if scheduler is not None:
        found['moved'] = [update.moved for update in scheduler.history if update.event == 'resolve']
    return {**found, 'cpu_seconds': round(seconds, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of top-1, the mean over seeds: a line for each data set, d and training."""
    methods = list(dict.fromkeys(row['method'] for row in rows))
    found: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        keys = [(row['data'], row['dim'], row['training'])] if row['dim'] else \
            [key for key in {(each['data'], each['dim'], each['training']) for each in rows if each['dim']}
             if (key[0], key[2]) == (row['data'], row['training'])]
        for key in keys:
            found.setdefault(key, {}).setdefault(row['method'], []).append(row['top1'])
    lines = ['| data | d | training | ' + ' | '.join(methods) + ' |', '| --- | ---: | --- |' + ' ---: |' * len(methods)]
    for key in sorted(found, key=lambda key: (DATA.index(key[0]), key[1], key[2])):
        cells = [f'{statistics.mean(found[key][m]):.1f}' if m in found[key] else '-' for m in methods]
        lines.append('| ' + ' | '.join([*map(str, key), *cells]) + ' |')
    return '\n'.join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', choices=DATA, default=DATA)
    parser.add_argument('--methods', nargs='+', default=METHODS,
                        choices=(*METHODS, *(method + end for method in METHODS for end in (_PLAIN, _BALANCED))))
    parser.add_argument('--dims', nargs='+', choices=SHARES, default=list(SHARES), help='of the number of classes')
    parser.add_argument('--trainings', nargs='+', choices=TRAININGS, default=['sgd'])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--arrays', help="the folder with CIFAR-100's npz files")
    parser.add_argument('--grocery', help='the folder of GroceryStore, with train/ and val/')
    parser.add_argument('--weights', type=Path, help='of EfficientNet-Lite0')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--table', action='store_true', help='print the table of what is there')
    add_output_argument(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        print(table(read_results(NAME, args.output)))
        return
    runs = Runs(NAME, Setting, args.output)
    for data in args.data:
        samples = None
        for seed, share, training, method in itertools.product(args.seeds, args.dims, args.trainings, args.methods):
            if samples is None:
                samples = load_samples(data, arrays=args.arrays, grocery=args.grocery, weights=args.weights)
            dim = max(2, round(SHARES[share] * samples.num_classes))
            setting = Setting(data, method, None if base_of(method) == 'linear' else dim, training, seed)
            if setting in runs:
                continue
            found = run(setting, samples)
            runs.add(setting, found)
            print(f'{data} {method} d={setting.dim} {training} seed {seed}: {found}', flush=True)


if __name__ == '__main__':
    main()
