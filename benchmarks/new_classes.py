"""New classes later: accuracy over all classes so far, after each of eight sessions of five classes with five images.

    python benchmarks/new_classes.py --arrays CIFAR100 --weights FILE       # all that is not there yet

The protocol of NC-FSCIL (Yang et al., ICLR 2023) on CIFAR-100: the classes 0-59 are trained, then 60-64 are added,
65-69 and so on. The backbone is EfficientNet-Lite0, pretrained on ImageNet, and stays frozen: its features, at 96
pixels, of 100 images of each base class train the neck. **The paper trains a ResNet-12 on the base classes alone: its
figures are no comparison.** The seed draws the five images and the head's weights. Tested on all 10,000 test images.

nearest_mean        the nearest class mean of the features; nothing is trained
nearest_cosine      the same, by the cosine from the mean of the base classes
neck_mean           the nearest class mean, by the cosine, of the embeddings of the `placed` head
simplex             a fixed simplex, the labels of base classes and new ones at random, tuned in each session; d = 128
even_*, placed_*    the recipe's head with 100 prototypes, and add_classes with place='mean' or 'free' in each session
*_tuned             after that, the neck is tuned

Tuning is 20 steps of AdamW at 1e-3 on the session's images and, of each earlier class, the mean of its features, as the
paper's memory. Batch norm stays in evaluation mode.
"""
import argparse
import itertools
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from finetune_data import CACHE, Features, Pixels, features_of, load_backbone, load_data
from results_file import Runs, add_output_argument

from timm_dl2pa import AssignmentScheduler, DL2PAHead, add_classes
from timm_dl2pa.head import free_prototypes

NAME = 'new_classes'
WITHOUT_HEAD = ('nearest_mean', 'nearest_cosine')
_TUNED = '_tuned'
METHODS = (*WITHOUT_HEAD, 'neck_mean', 'simplex',
           *(f'{recipe}_{place}{tuned}' for recipe in ('even', 'placed') for place in ('mean', 'free')
             for tuned in ('', _TUNED)))
BASE, WAYS, SHOTS = 60, 5, 5
_BATCH, _RATE, _DECAY = 64, 1e-3, 0.05
_STEPS, _TUNED_BATCH, _TUNED_RATE = 20, 128, 1e-3


@dataclass(frozen=True)
class Setting:
    """All that decides a run. `dim` is None for the methods without a head."""
    method: str
    dim: int | None
    seed: int


class Sessions:
    """Features of the base classes, of each session's images, and of the test images of the classes so far.

    Args:
        features: Of all classes.
        seed: Of the draw.
    """

    def __init__(self, features: Features, seed: int):
        x, y = features.passes[0], features.y_train
        self.test, self.y_test = features.test, features.y_test
        self.num_classes = int(y.max()) + 1
        base = y < BASE
        self.x, self.y = x[base], y[base]
        generator = np.random.default_rng(seed)
        rows = [generator.permutation(np.flatnonzero(y.numpy() == label))[:SHOTS]
                for label in range(BASE, self.num_classes)]
        self.shots = x[torch.from_numpy(np.stack(rows))]  # (new classes, shots, F)
        self.base_means = torch.stack([x[y == label].mean(dim=0) for label in range(BASE)])

    def number(self) -> int:
        return len(self.shots) // WAYS

    def of(self, session: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (25, F) and labels (25,) from 0 of a session, from 0."""
        shots = self.shots[session * WAYS:(session + 1) * WAYS]
        return shots.flatten(0, 1), torch.arange(len(shots)).repeat_interleave(shots.shape[1])

    def means(self, sessions: int) -> torch.Tensor:
        """Return the means of the features of all classes of the base and of so many sessions."""
        return torch.cat([self.base_means, self.shots[:sessions * WAYS].mean(dim=1)])

    def accuracy(self, scores: torch.Tensor) -> float:
        """Return the top-1 of scores (M, C) of the test images, among those of the C classes."""
        asked = self.y_test < scores.shape[1]
        return 100 * float((scores.argmax(dim=1) == self.y_test)[asked].float().mean())


@cache
def _trained(recipe: str, dim: int, seed: int, sessions: Sessions) -> DL2PAHead:
    """Return a head for the base classes. The recipe 'simplex' is 'even' without a warm-up and re-solves."""
    torch.manual_seed(seed)
    x, y = sessions.x, sessions.y
    fixed = recipe == 'simplex'
    head = DL2PAHead(x.shape[1], BASE, dim, num_prototypes=sessions.num_classes, seed=seed,
                     recipe='even' if fixed else recipe)
    if fixed:
        head.assign(torch.randperm(sessions.num_classes)[:BASE])
    fit(head, x, y, stop=0 if fixed else None)
    return head


def fit(classifier: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int = 15, **options: Any) -> None:
    """Train a classifier of features (N, F) with labels (N,); one with a head by a scheduler with these options."""
    epoch = len(x) // _BATCH
    has_head = isinstance(classifier, DL2PAHead)
    scheduler = AssignmentScheduler(classifier, interval=epoch, total=epochs * epoch, **options) if has_head else None
    optimizer = torch.optim.AdamW(classifier.parameters(), _RATE, weight_decay=_DECAY)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * epoch)
    classifier.train()
    for rows in (rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(_BATCH)[:epoch]):
        F.cross_entropy(classifier(x[rows]), y[rows]).backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step(y[rows])
    if scheduler is not None:
        scheduler.skip_warmup()
    classifier.eval()


def tune(head: DL2PAHead, memory: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Train a neck on new features, and as many of each earlier class, which are its mean.

    Args:
        head: In evaluation mode, in which it stays.
        memory: (C - n, F), the means of the earlier classes.
        x: (N, F), of the n new classes.
        labels: (N,), from 0.
    """
    old = torch.arange(len(memory)).repeat(SHOTS)
    x, y = torch.cat([memory[old], x]), torch.cat([old, len(memory) + labels])
    optimizer = torch.optim.AdamW(head.neck.parameters(), _TUNED_RATE, weight_decay=0.0)
    for _ in range(_STEPS):
        rows = torch.randperm(len(x))[:_TUNED_BATCH]
        F.cross_entropy(head(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(setting: Setting, sessions: Sessions) -> dict[str, Any]:
    """Add all sessions, and return the accuracy before the first and after each."""
    began, number, test = time.process_time(), sessions.number(), sessions.test
    if setting.method in WITHOUT_HEAD:
        centre = sessions.base_means.mean(dim=0) if setting.method == 'nearest_cosine' else 0.0

        def scores(means: torch.Tensor) -> torch.Tensor:
            if setting.method == 'nearest_mean':
                return -torch.cdist(test, means)
            return F.normalize(test - centre, dim=1) @ F.normalize(means - centre, dim=1).t()

        found = [sessions.accuracy(scores(sessions.means(session))) for session in range(number + 1)]
        return {'top1': _rounded(found), 'cpu_seconds': round(time.process_time() - began, 1)}
    recipe, _, place = setting.method.removesuffix(_TUNED).partition('_')
    head = _trained('placed' if recipe == 'neck' else recipe, setting.dim, setting.seed, sessions)
    began = time.process_time()
    torch.manual_seed(setting.seed)
    if recipe == 'neck':
        with torch.no_grad():
            embedded = head.embed(test)
            base = head.embed(sessions.x)
            means = torch.stack([base[sessions.y == label].mean(dim=0) for label in range(BASE)])
            new = head.embed(sessions.shots.flatten(0, 1)).unflatten(0, sessions.shots.shape[:2]).mean(dim=1)
            found = [sessions.accuracy(embedded @ F.normalize(torch.cat([means, new[:session * WAYS]]), dim=1).t())
                     for session in range(number + 1)]
        return {'top1': _rounded(found), 'cpu_seconds': round(time.process_time() - began, 1)}
    head = _copy(head)
    found = [_top1(head, sessions)]
    for session in range(number):
        x, labels = sessions.of(session)
        add_classes(head, (x, labels), WAYS, place=place or 'free')
        if recipe == 'simplex':  # not by their means
            spare = torch.cat([head.assignment[-WAYS:], free_prototypes(head)]).sort().values
            head.assign(torch.cat([head.assignment[:-WAYS], spare[torch.randperm(len(spare))[:WAYS]]]))
        if recipe == 'simplex' or setting.method.endswith(_TUNED):
            tune(head, sessions.means(session), x, labels)
        found.append(_top1(head, sessions))
    is_base = sessions.y_test < BASE
    with torch.no_grad():
        right = (head(test).argmax(dim=1) == sessions.y_test).float()
    return {'top1': _rounded(found), 'top1_of_base': round(100 * float(right[is_base].mean()), 2),
            'top1_of_new': round(100 * float(right[~is_base].mean()), 2),
            'cpu_seconds': round(time.process_time() - began, 1)}



def _copy(head: DL2PAHead) -> DL2PAHead:
    copied = DL2PAHead.from_config(head.config, head.prototypes)
    copied.load_state_dict(head.state_dict())
    return copied.eval()


@torch.no_grad()
def _top1(head: DL2PAHead, sessions: Sessions) -> float:
    return sessions.accuracy(head(sessions.test))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arrays', help="the folder with CIFAR-100's npz files")
    parser.add_argument('--weights', type=Path, help='of EfficientNet-Lite0')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--dims', nargs='+', type=int, default=[32, 128])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--cache', type=Path, default=CACHE, help='folder of features')
    add_output_argument(parser)
    return parser


def load_features(arrays: str, weights: Path, folder: Path, model: str = 'tf_efficientnet_lite0', size: int = 96
                  ) -> Features:
    """Return a pretrained backbone's features of 100 training images a class of CIFAR-100, and of all test images."""
    images = load_data('cifar100:100', arrays=arrays, size=size, seed=0, test_images=100)
    backbone = load_backbone(model, weights, images.num_classes)
    return features_of(backbone, images, Pixels(backbone, size), cache=folder)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    runs = Runs(NAME, Setting, args.output)
    features = load_features(args.arrays, args.weights, args.cache)
    for seed in args.seeds:
        sessions = Sessions(features, seed)
        for dim, method in itertools.product(args.dims, args.methods):
            setting = Setting(method, None if method in WITHOUT_HEAD else dim, seed)
            if setting in runs or (method == 'simplex' and dim < sessions.num_classes - 1):
                continue
            found = run(setting, sessions)
            runs.add(setting, found)
            print(f'{setting}: {found}', flush=True)


if __name__ == '__main__':
    main()
