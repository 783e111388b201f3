"""How accurate is the head? The same backbone and budget, with each method; one JSON file a run.

    python benchmarks/accuracy.py --method dl2pa --dim 50 --seed 3 --arrays FOLDER        # one run
    python benchmarks/accuracy.py --queue short --arrays FOLDER                           # all of a list, resumable
    python benchmarks/accuracy.py --method dl2pa --dim 8 --epochs 3                       # a smoke run on digits
    python benchmarks/readme_tables.py                                                    # the tables

Data: `--data-dir` (ImageFolder: train/, validation/), `--arrays` (a folder of npz files), or scikit-learn's digits.
`--validation` trains on nine tenths of the training images and tests on the last tenth: choose there, never on test
images. A run whose file is complete is not run again; one that was cut goes on from its last epoch.

Methods, each in `METHODS`:

softmax         nn.Linear(features, d), nn.Linear(d, C); `--dim 0`: nn.Linear(features, C)
cosine_softmax  as softmax, with both sides normalised and the head's scale
static          fixed prototypes, random assignment (Hyperspherical Prototype Networks)
etf             static, where d >= C - 1 makes the prototypes a regular simplex
paper           re-solved once an epoch by the authors' moving average: it starts from random vectors, as does the first
                assignment; of several samples of a class in a batch one counts; momentum 0.9 is about 0.95, since 0.9 q
                is added to q before normalising. Their saved checkpoints (re-solved after validation), their unbuffered
                prototypes and their unsynchronised processes do not change a run on one device, and are left out.
dl2pa           this library's defaults, as in train.py
"""
import argparse
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import cifar_resnet  # noqa: F401  registers the models
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from image_arrays import Images, augment, hold_out, keep_classes, load_images, long_tail, superclasses
from results_file import RESULTS, environment
from tqdm import tqdm

from timm_dl2pa import (
    AssignmentScheduler,
    BalancedSoftmaxLoss,
    DotRegressionLoss,
    SquaredCosineLoss,
    default_scale,
    prime,
    wrap_dl2pa,
)
from timm_dl2pa.assignment.solve import solve_assignment
from timm_dl2pa.timm_scripts import PluginOptions

METHODS = ('softmax', 'cosine_softmax', 'static', 'etf', 'paper', 'dl2pa')
LOSSES = ('cross_entropy', 'balanced_softmax', 'squared_cosine', 'dot_regression')
# (epoch share, factor): the learning rate is multiplied by the factor of the last share that is over.
SCHEDULES = {
    'steps': ((0.5, 0.1), (0.8, 0.01)),  # the short recipe
    'paper': ((0.4, 0.1), (0.8, 0.01)),  # 250 epochs: at 100 and 200
    'paper_lt': ((0.8, 0.1), (0.9, 0.001)),  # 200 epochs: x 0.1 at 160, x 0.01 of that at 180
}
SIZES = {
    'short': dict(model='cifar_resnet14', epochs=8, lr=0.1, schedule='steps', warmup=0.05),
    'paper': dict(model='cifar_resnet32', epochs=250, lr=0.01, schedule='paper', warmup=0.0, loss='squared_cosine',
                  loss_weight=128.0),
    'paper_lt': dict(model='cifar_resnet32', epochs=200, lr=0.1, schedule='paper_lt', warmup=0.025, weight_decay=2e-4,
                     loss='dot_regression', neck='linear_bn', mixup=1.0),
    'modern': dict(model='cifar_resnet32', epochs=250, lr=0.1, schedule='cosine', warmup=0.02, weight_decay=5e-4),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides a run, but for the data's place and the machine."""
    method: str = 'dl2pa'
    dim: int = 50
    loss: str = 'cross_entropy'
    model: str = 'cifar_resnet14'
    shortcut: str = 'conv3x3'
    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    schedule: str = 'steps'
    warmup: float = 0.05
    neck: str | None = None
    scale: float | None = None
    loss_weight: float | None = None
    imbalance: float | None = None
    mixup: float = 0.0
    classes: str = 'all'
    start_from: str | None = None
    validation: bool = False
    image_size: int | None = None
    precision: str = 'auto'
    seed: int = 3
    dl2pa: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (('method', METHODS), ('loss', LOSSES), ('schedule', (*SCHEDULES, 'cosine')),
                            ('classes', ('all', 'first_half', 'second_half')),
                            ('precision', ('auto', 'float32', 'bfloat16'))):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, not {getattr(self, name)!r}.')
        if self.start_from not in (None, 'first_half') or self.start_from == self.classes:
            raise ValueError(f"start_from must be 'first_half' of other classes, not {self.start_from!r}.")
        if self.loss not in ('cross_entropy', 'balanced_softmax') and self.method.endswith('softmax'):
            raise ValueError(f'{self.method} takes cross_entropy or balanced_softmax, not {self.loss}.')

    def name(self) -> str:
        """Return the stem of the run's file: what differs from the defaults."""
        parts = [self.method, f'd{self.dim}']
        default = asdict(Recipe())
        for key, value in asdict(self).items():
            if key not in ('method', 'dim', 'seed') and value != default[key]:
                text = '-'.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else value
                parts.append(f'{key}={text}')
        return '_'.join([*parts, f's{self.seed}'])


class CosineClassifier(nn.Module):
    """Learned class vectors; logits are scaled cosines."""

    def __init__(self, dim: int, num_classes: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, dim) / math.sqrt(dim))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.normalize(x.float(), dim=1) @ F.normalize(self.weight.float(), dim=1).t()


class PaperRule:
    """The authors' moving average and their re-solve at the end of each epoch."""

    def __init__(self, head: nn.Module, generator: torch.Generator):
        self.head = head
        draw = torch.randn(head.num_classes, head.dim, generator=generator)
        self.table = F.normalize(draw, dim=1).to(head.prototypes.device)
        self.moved: list[int] = []
        self.resolve()
        head.observer = self._observe

    def _observe(self, embeddings: torch.Tensor) -> None:
        self.embeddings = embeddings

    def step(self, targets: torch.Tensor) -> None:
        """q <- q + (0.9 q + 0.1 z), normalised; where a class occurs twice the last sample counts."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        self.table[labels] += 0.9 * self.table[labels] + 0.1 * self.embeddings
        self.table = F.normalize(self.table, dim=1)

    def resolve(self) -> None:
        result = solve_assignment(
            class_means=self.table, prototypes=self.head.prototypes, start=self.head.assignment)
        self.head.assign(result.assignment)
        self.moved.append(result.moved)


def make_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the backbone with the method's classifier, on the CPU. Draws from the global generator."""
    kwargs = {'shortcut': recipe.shortcut} if recipe.model.startswith('cifar_resnet') else {}
    model = timm.create_model(recipe.model, num_classes=num_classes, **kwargs)
    scale = recipe.scale or default_scale(num_classes)
    neck_kind = recipe.neck or 'linear'
    if recipe.method.endswith('softmax'):
        if recipe.dim == 0:
            return model
        features = model.num_features
        neck = [nn.Linear(features, recipe.dim)]
        if neck_kind == 'linear_bn':
            neck = [nn.Linear(features, recipe.dim, bias=False), nn.BatchNorm1d(recipe.dim)]
        model.fc = nn.Sequential(*neck, nn.Linear(recipe.dim, num_classes) if recipe.method == 'softmax'
                                 else CosineClassifier(recipe.dim, num_classes, scale))
        return model
    if recipe.method == 'etf' and recipe.dim < num_classes - 1:
        raise ValueError(f'etf needs dim >= {num_classes - 1} for {num_classes} classes, not {recipe.dim}.')
    if recipe.method == 'dl2pa':
        loss = 'criterion' if recipe.loss == 'cross_entropy' else recipe.loss
        given = {name: getattr(recipe, name) for name in ('neck', 'scale') if getattr(recipe, name) is not None}
        wrap_dl2pa(model, **PluginOptions(dim=recipe.dim, seed=recipe.seed, loss=loss, **given).head_arguments())
    else:
        wrap_dl2pa(model, recipe.dim, neck=neck_kind, scale=scale, seed=recipe.seed)
    head = model.get_classifier()
    head.assign(torch.randperm(num_classes, generator=torch.Generator().manual_seed(recipe.seed)))
    return model


def precision(recipe: Recipe, device: torch.device) -> str:
    """Return the recipe's precision; 'auto' is bfloat16 where the device computes in it, and does not emulate it."""
    if recipe.precision != 'auto':
        return recipe.precision
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported() else 'float32'
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    return 'bfloat16' if capabilities.get('avx512_bf16') or capabilities.get('amx_bf16') else 'float32'


def _autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(recipe, device) == 'bfloat16')


def learning_rate(recipe: Recipe, share: float) -> float:
    """Return the learning rate when this share of the training is over."""
    if share < recipe.warmup:
        return recipe.lr * share / recipe.warmup
    if recipe.schedule == 'cosine':
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (share - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.lr * next((factor for over, factor in reversed(SCHEDULES[recipe.schedule]) if share >= over), 1.0)


class Run:
    """One training: its model, optimiser and assignment, which go on from a checkpoint after each epoch."""

    def __init__(self, recipe: Recipe, images: Images, device: torch.device):
        self.recipe, self.images, self.device = recipe, images.to(device), device
        mean, std = images.statistics()
        self.mean, self.std = mean.to(device), std.to(device)
        torch.manual_seed(recipe.seed)
        self.model = make_model(recipe, images.num_classes).to(device, memory_format=torch.channels_last)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
        self.steps_an_epoch = max(1, len(images.x_train) // recipe.batch_size)
        self.head = None if recipe.method.endswith('softmax') else self.model.get_classifier()
        weight = {} if recipe.loss_weight is None else {'weight': recipe.loss_weight}
        kinds = {'squared_cosine': SquaredCosineLoss, 'dot_regression': DotRegressionLoss}
        self.criterion = kinds[recipe.loss](self.head, **weight) if recipe.loss in kinds else nn.CrossEntropyLoss()
        if recipe.loss == 'balanced_softmax':
            counts = torch.bincount(images.y_train, minlength=images.num_classes)
            self.criterion = BalancedSoftmaxLoss(images.num_classes, counts.clamp(min=1)).to(device)
        self.rule = self.scheduler = None
        if recipe.method == 'paper':
            self.rule = PaperRule(self.head, torch.Generator().manual_seed(recipe.seed))
        elif recipe.method == 'dl2pa':
            self.scheduler = AssignmentScheduler(self.model, **{
                name: math.inf if value == 'inf' else value for name, value in recipe.dl2pa.items()})
            if 'warmup' not in recipe.dl2pa and self.scheduler.evenness < math.inf:
                # As with the plugin: prototypes are placed during the first half.
                self.scheduler.warmup = max(1, recipe.epochs // 2)
        self.epoch = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.before_training: dict[str, float] | None = None

    def start_from(self, backbone: dict[str, torch.Tensor]) -> None:
        """Take over a trained backbone, and measure it before any training: by the nearest class mean in its own
        features (Euclidean), and as the head classifies, primed if the method primes."""
        missing, unexpected = self.model.load_state_dict(backbone, strict=False)
        if unexpected or any(not name.startswith('fc.') for name in missing):
            raise ValueError(f'the backbone does not fit: {missing + unexpected}.')
        images, (train, test) = self.images, (self.features(x) for x in (self.images.x_train, self.images.x_test))
        means = torch.zeros(images.num_classes, train.shape[1], device=self.device)
        means.index_add_(0, images.y_train, train)
        means /= torch.bincount(images.y_train, minlength=images.num_classes).unsqueeze(1)
        if self.scheduler is not None:
            loader = ((self.normalised(x), y) for x, y in zip(images.x_train.split(500), images.y_train.split(500)))
            prime(self.model, loader, self.scheduler)
        logits, _ = self.outputs(images.x_test)
        self.before_training = {
            'nearest_class_mean': round(metrics.top_k(-torch.cdist(test, means), images.y_test, 1), 3),
            'top1': round(metrics.top_k(logits, images.y_test, 1), 3)}

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the backbone's features (N, F), float32, of uint8 images."""
        self.model.eval()
        found = []
        for part in x.split(1000):
            part = self.normalised(part).contiguous(memory_format=torch.channels_last)
            with _autocast(self.recipe, self.device):
                found.append(self.model.forward_head(self.model.forward_features(part), pre_logits=True).float())
        return torch.cat(found)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield an epoch's augmented images and labels, soft ones under mixup."""
        recipe, images = self.recipe, self.images
        order = torch.randperm(len(images.x_train), generator=self.generator, device=self.device)
        padding, digits = images.x_train.shape[2] // 8, len(images.classes) == 10 and images.x_train.shape[2] == 8
        for index in order[:self.steps_an_epoch * recipe.batch_size].split(recipe.batch_size):
            x, y = self.normalised(images.x_train[index]), images.y_train[index]
            x = augment(x, padding, not digits, self.generator)
            if recipe.mixup:
                share = torch._sample_dirichlet(
                    torch.full((1, 2), recipe.mixup, device=self.device), self.generator)[0, 0]
                x = share * x + (1 - share) * x.flip(0)
                hot = F.one_hot(y, images.num_classes).float()
                yield x, (share * hot + (1 - share) * hot.flip(0), y)
            else:
                yield x, (y, y)

    def train_epoch(self) -> None:
        began = time.perf_counter()
        self.model.train()
        loss_sum = 0.0
        for step, (x, (targets, labels)) in enumerate(self.batches()):
            rate = learning_rate(self.recipe, (self.epoch + step / self.steps_an_epoch) / self.recipe.epochs)
            for group in self.optimizer.param_groups:
                group['lr'] = rate
            if self.scheduler is not None:
                self.scheduler.resolve_if_due()
            with _autocast(self.recipe, self.device):
                output = self.model(x)
            loss = self.criterion(output.float(), targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if self.rule is not None:
                self.rule.step(labels)
            if self.scheduler is not None:
                self.scheduler.step(targets)
            loss_sum += loss.detach()
        if self.rule is not None and self.epoch + 1 < self.recipe.epochs:
            self.rule.resolve()
        if self.scheduler is not None:
            self.scheduler.epoch_end()
        self.epoch += 1
        mean_loss = float(loss_sum) / self.steps_an_epoch
        self.seconds += time.perf_counter() - began
        logits, _ = self.outputs(self.images.x_test)
        self.curve.append({'loss': round(mean_loss, 4),
                           'top1': round(metrics.top_k(logits, self.images.y_test, 1), 2)})

    @torch.no_grad()
    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N, C) and embeddings (N, d), float32, of uint8 images."""
        self.model.eval()
        logits, embeddings = [], []
        classifier = self.model.get_classifier()
        for part in x.split(1000):
            part = self.normalised(part).contiguous(memory_format=torch.channels_last)
            with _autocast(self.recipe, self.device):
                features = self.model.forward_head(self.model.forward_features(part), pre_logits=True)
                logits.append(classifier(features).float())
                if self.head is not None:
                    embeddings.append(self.head.embed(features))
                elif isinstance(classifier, nn.Sequential):
                    embeddings.append(classifier[:-1](features).float())
                else:
                    embeddings.append(features.float())
        return torch.cat(logits), torch.cat(embeddings)

    def class_vectors(self) -> torch.Tensor:
        if self.head is not None:
            return self.head.class_prototypes
        classifier = self.model.get_classifier()
        return (classifier[-1] if isinstance(classifier, nn.Sequential) else classifier).weight.detach()

    def results(self, held_out: Images | None) -> dict[str, Any]:
        images = self.images
        logits, embeddings = self.outputs(images.x_test)
        found: dict[str, Any] = {
            'top1': metrics.top_k(logits, images.y_test, 1),
            'top5': metrics.top_k(logits, images.y_test, 5),
            'calibration_error': metrics.calibration_error(logits, images.y_test),
            'angular_separation': metrics.angular_separation(self.class_vectors()),
            'recall_at_1': metrics.recall_at_1(embeddings, images.y_test),
        }
        groups = superclasses(images.classes)
        if groups is not None:
            found['superclass_agreement'] = metrics.superclass_agreement(self.class_vectors().cpu(), groups)
        if self.recipe.imbalance:
            counts = torch.bincount(images.y_train, minlength=images.num_classes)
            for name, classes in metrics.tail_groups(counts).items():
                rows = classes[images.y_test]
                if rows.any():
                    found[f'top1_{name}'] = metrics.top_k(logits[rows], images.y_test[rows], 1)
        if held_out is not None:
            _, embeddings = self.outputs(held_out.x_test.to(self.device))
            found['recall_at_1_new_classes'] = metrics.recall_at_1(embeddings, held_out.y_test.to(self.device))
        return found

    def moved(self) -> list[int]:
        if self.rule is not None:
            return self.rule.moved
        return [update.moved for update in self.scheduler.history] if self.scheduler is not None else []

    def save(self, path: Path) -> None:
        part = path.with_suffix('.part')
        torch.save({
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'generator': self.generator.get_state(), 'epoch': self.epoch, 'seconds': self.seconds, 'curve': self.curve,
            'before_training': self.before_training,
            'scheduler': self.scheduler and self.scheduler.state_dict(),
            'rule': self.rule and (self.rule.table, self.rule.moved)}, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.generator.set_state(state['generator'].cpu())
        self.epoch, self.seconds, self.curve = state['epoch'], state['seconds'], state['curve']
        self.before_training = state['before_training']
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state['scheduler'])
        if self.rule is not None:
            self.rule.table, self.rule.moved = state['rule']


def execute(recipe: Recipe, images: Images, device: torch.device, folder: Path, command: str) -> dict[str, Any]:
    """Run a recipe, or go on with it, and return its record; at once if its file is there."""
    path = folder / f'{recipe.name()}.json'
    if path.exists():
        return json.loads(path.read_text())
    checkpoint = path.with_suffix('.ckpt')
    backbone = None
    if recipe.start_from:
        source = replace(Recipe(), method='softmax', dim=0, model=recipe.model, shortcut=recipe.shortcut,
                         image_size=recipe.image_size, classes=recipe.start_from, validation=recipe.validation,
                         seed=recipe.seed)
        backbone = folder / f'{source.name()}.pt'
        if not backbone.exists():
            raise FileNotFoundError(f'{backbone} holds the backbone to start from: run --method softmax --dim 0 '
                                    f'--classes {recipe.start_from} --seed {recipe.seed} first.')
    if recipe.validation:
        images = hold_out(images)
    held_out = None
    if recipe.classes != 'all':
        half = images.num_classes // 2
        halves = [keep_classes(images, list(numbers)) for numbers in (range(half), range(half, images.num_classes))]
        images, held_out = halves if recipe.classes == 'first_half' else halves[::-1]
    if recipe.imbalance:
        images = long_tail(images, recipe.imbalance)
    run = Run(recipe, images, device)
    if checkpoint.exists():
        run.load(checkpoint)
    elif backbone is not None:
        run.start_from(torch.load(backbone, map_location=device, weights_only=True))
    bar = tqdm(range(run.epoch, recipe.epochs), recipe.name(), initial=run.epoch, total=recipe.epochs, unit='epoch')
    for _ in bar:
        run.train_epoch()
        run.save(checkpoint)
        bar.set_postfix(run.curve[-1])
    record = {
        'command': command,
        'recipe': asdict(recipe),
        'precision': precision(recipe, device),
        'environment': environment(),
        'results': {name: value if isinstance(value, dict) else round(value, 3)
                    for name, value in run.results(held_out).items()},
        'before_training': run.before_training,
        'training_seconds': round(run.seconds, 1),
        'peak_gpu_mb': round(torch.cuda.max_memory_allocated() / 2 ** 20) if device.type == 'cuda' else None,
        'peak_memory_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10),
        'moved': run.moved(),
        'curve': run.curve,
    }
    part = path.with_suffix('.json.part')
    part.write_text(json.dumps(record, indent=1) + '\n')
    if recipe.classes == 'first_half' and recipe.method == 'softmax' and recipe.dim == 0:
        # What runs with --start-from begin with. Not kept in the repository: this run makes it anew.
        torch.save({name: value for name, value in run.model.state_dict().items() if not name.startswith('fc.')},
                   folder / f'{recipe.name()}.pt')
    os.replace(part, path)
    checkpoint.unlink(missing_ok=True)
    return record


def queue(name: str) -> list[list[str]]:
    """Return the arguments of each run of a list, the most telling first."""
    runs = []
    if name == 'short':
        # The paper's loss at the learning rate that it is made for: its sum over the batch.
        paper = ['--loss', 'squared_cosine', '--lr', '0.01', '--loss-weight', '128']
        methods = (['softmax'], ['dl2pa'], ['paper', *paper], ['static', *paper])

        def add(method: list[str], *arguments: Any) -> None:
            runs.append(['--size', 'short', '--method', *method, *map(str, arguments)])

        for seed in (3, 4, 5):
            for dim in (50, 10):
                for method in methods:
                    add(method, '--dim', dim, '--seed', seed)
            if seed == 3:
                # This library's head, its set kept even, its assignment left to chance, and by the paper's rule.
                for dim in (50, 10):
                    add(['dl2pa', '--dl2pa', 'evenness=inf'], '--dim', dim, '--seed', seed)
                    add(['dl2pa', '--dl2pa', 'stop=0'], '--dim', dim, '--seed', seed)
                    add(['dl2pa', '--dl2pa', 'warmup=0'], '--dim', dim, '--seed', seed)
                for method in methods:
                    add(method, '--dim', 100, '--seed', seed)
                add(['dl2pa', '--dl2pa', 'evenness=inf'], '--dim', 100, '--seed', seed)
                add(['softmax'], '--dim', 0, '--seed', seed)
            else:
                for method in methods[:2]:
                    add(method, '--dim', 100, '--seed', seed)
            # A backbone of half the classes, whose embeddings are tried on the others; then fine-tuned on those.
            add(['softmax'], '--dim', 0, '--classes', 'first_half', '--seed', seed)
            for method, dim in ((['softmax'], 50), (['softmax'], 0), (['dl2pa'], 50)):
                add(method, '--dim', dim, '--classes', 'second_half', '--start-from', 'first_half', '--epochs', 2,
                    '--seed', seed)
            balanced = ['--loss', 'balanced_softmax']
            for method in (['softmax'], ['dl2pa'], ['dl2pa', *balanced], ['softmax', *balanced], ['static']):
                add(method, '--dim', 64, '--imbalance', 0.01, '--epochs', 30, '--seed', seed)
        neck = ['softmax', '--neck', 'linear_bn']
        for dim in (50, 10):  # the head's parts alone
            for method in (['static'], ['cosine_softmax'], neck):
                add(method, '--dim', dim, '--seed', 3)
        add(neck, '--dim', 50, '--classes', 'second_half', '--start-from', 'first_half', '--epochs', 2, '--seed', 5)
        add([*neck, *balanced], '--dim', 64, '--imbalance', 0.01, '--epochs', 30, '--seed', 3)
        for method in (['softmax'], ['dl2pa']):
            add(method, '--dim', 50, '--classes', 'first_half', '--seed', 3)
        for method in methods:  # a longer training of a larger network, for want of a GPU
            add(method, '--dim', 50, '--model', 'cifar_resnet20', '--epochs', 25, '--seed', 3)
    elif name == 'paper':
        for size, losses in (('modern', []), ('paper', [])):
            for dim in (50, 10, 25, 100):
                for method in ('softmax', 'static', 'paper', 'dl2pa'):
                    extra = ['--loss', 'cross_entropy', '--lr', '0.1'] if method == 'softmax' else losses
                    runs.append(['--size', size, '--method', method, '--dim', str(dim), *extra])
        for imbalance in ('0.01', '0.02', '0.005'):
            for method in ('softmax', 'static', 'paper', 'dl2pa'):
                extra = ['--loss', 'cross_entropy'] if method == 'softmax' else []
                runs.append(['--size', 'paper_lt', '--method', method, '--dim', '128', '--imbalance', imbalance,
                             *extra])
    else:
        raise ValueError(f'queue must be short or paper, not {name!r}.')
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir')
    parser.add_argument('--arrays')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=RESULTS / 'accuracy')
    parser.add_argument('--queue', choices=('short', 'paper'), help='run a list of runs, one after the other')
    parser.add_argument('--parallel', type=int, default=1, help='runs of a list side by side, on a large GPU')
    parser.add_argument('--size', choices=tuple(SIZES), help='a set of defaults')
    parser.add_argument('--dl2pa', nargs='*', default=[], metavar='NAME=VALUE', help='arguments of AssignmentScheduler')
    for name, value in asdict(Recipe()).items():
        flag = '--' + name.replace('_', '-')
        if name == 'validation':
            parser.add_argument(flag, action='store_true', default=None)
        elif name != 'dl2pa':
            kinds = {'scale': float, 'loss_weight': float, 'imbalance': float, 'image_size': int, 'neck': str,
                     'start_from': str}
            parser.add_argument(flag, type=kinds.get(name) or type(value))
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    given = {name: getattr(args, name) for name in asdict(Recipe()) if name != 'dl2pa'}
    given = {name: value for name, value in given.items() if value is not None}
    options = {}
    for pair in args.dl2pa:
        name, _, value = pair.partition('=')
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return Recipe(**{**SIZES.get(args.size, {}), **given, 'dl2pa': options})


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    place = [f'{flag}={value}' for flag, value in (('--data-dir', args.data_dir), ('--arrays', args.arrays)) if value]
    place += [f'--device={args.device}', f'--output={args.output}']
    if args.queue:
        # A process a run, so that a run's peak memory and random numbers are its own.
        with ThreadPoolExecutor(args.parallel) as pool:
            for _ in pool.map(lambda arguments: subprocess.run([sys.executable, __file__, *arguments, *place],
                                                               check=True), queue(args.queue)):
                pass
        return
    recipe = _recipe(args)
    images = load_images(data_dir=args.data_dir, arrays=args.arrays, size=recipe.image_size)
    args.output.mkdir(parents=True, exist_ok=True)
    hidden, words = ('--data-dir', '--arrays', '--output', '--device'), []
    for word, previous in zip(sys.argv[1:], sys.argv):
        if previous in hidden or word.partition('=')[0] in hidden:
            continue
        words.append(word)
    data = ' --data-dir DATA' if args.data_dir else ' --arrays DATA' if args.arrays else ''
    command = f'python benchmarks/accuracy.py {shlex.join(words)}{data} --device {args.device}'
    record = execute(recipe, images, torch.device(args.device), args.output, command)
    print(json.dumps(record['results']))


if __name__ == '__main__':
    main()
