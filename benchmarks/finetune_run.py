"""One fine-tuning: what decides it, the training, and what is measured."""
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import torch
import torch.nn as nn
from finetune_data import CACHE, Features, Pixels, features_of, load_backbone, pooled
from finetune_methods import (
    CLOSED_FORMS,
    METHODS,
    embed,
    is_primed,
    make_criterion,
    put_classifier,
    with_closed_form,
)
from image_arrays import Images
from timm.optim import create_optimizer_v2

from timm_dl2pa import AssignmentScheduler, DL2PAHead, prime

__all__ = ['BACKBONES', 'PRIME_IMAGES', 'Setting', 'run']

BACKBONES = ('frozen', 'trained', 'trained_but_batch_norm')
PRIME_IMAGES = ('plain', 'augmented')
WEIGHT_DECAYS = {'adamw': 0.05, 'sgd': 1e-4}
# Augmented passes of which a frozen backbone's features are kept.
_PASSES = 5


@dataclass(frozen=True)
class Setting:
    """All that decides a run, but for the data's place and the machine.

    Attributes:
        data: Its name.
        model: timm's name of the backbone.
        weights: The name of the file of its weights, or 'random'.
        size: The side, in pixels, of the images that the backbone gets.
        method: One of `METHODS`.
        backbone: 'frozen': in evaluation mode, its features computed once; 'trained'; or 'trained_but_batch_norm':
            trained with its batch norms in evaluation mode.
        dim: d, where the method has one.
        epochs: 0 where nothing is trained.
        optimizer: timm's name.
        lr: The learning rate at the start. It falls by a cosine, each step.
        augmented: Whether the training images are shifted and flipped.
        prime_images: Whether `prime` sees the images 'plain' or 'augmented', where they are augmented in training.
        batch_size: The last batch of an epoch is left out if it is smaller.
        test_images: Largest number of test images a class, where the data are CIFAR-100.
        seed: Of the draw of the images, the weights and the batches.

    Raises:
        ValueError: One of the words is unknown.
    """
    data: str
    model: str
    weights: str
    size: int
    method: str
    backbone: str = 'frozen'
    dim: int | None = 128
    epochs: int = 20
    optimizer: str | None = 'adamw'
    lr: float | None = 1e-3
    augmented: bool = False
    prime_images: str | None = None
    batch_size: int | None = 64
    test_images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (('method', METHODS), ('backbone', BACKBONES), ('optimizer', (None, *WEIGHT_DECAYS)),
                            ('prime_images', (None, *PRIME_IMAGES))):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(map(str, known))}, not {getattr(self, name)!r}.')

    def normal(self) -> 'Setting':
        """Return the setting without what does not count for its method, so that equal runs are equal settings."""
        if self.method in CLOSED_FORMS:
            dim = self.dim if self.method == 'logistic_lda' else None
            return replace(self, backbone='frozen', dim=dim, epochs=0, optimizer=None, lr=None, augmented=False,
                           prime_images=None, batch_size=None)
        images = (self.prime_images or 'plain') if is_primed(self.method) and self.augmented else None
        return replace(self, dim=None if self.method == 'linear' else self.dim, prime_images=images)

    def __str__(self) -> str:
        words = [self.data, self.method, self.dim and f'd{self.dim}']
        if self.epochs:
            words += [self.backbone, f'{self.epochs} epochs', f'{self.optimizer}:{self.lr:g}']
            words += [self.augmented and 'augmented', self.prime_images and f'primed on {self.prime_images} images']
        return ' '.join(str(word) for word in (*words, f'seed {self.seed}') if word)


def run(setting: Setting, images: Images, weights: Path | None, cache: Path = CACHE) -> dict[str, Any]:
    """Train, and return what was measured.

    Args:
        setting: A normal one.
        images: Its data.
        weights: The file of the backbone's weights.
        cache: Where features are kept.
    """
    torch.manual_seed(setting.seed)
    model = load_backbone(setting.model, weights, images.num_classes)
    pixels = Pixels(model, setting.size)
    features = plain = None
    if setting.backbone == 'frozen':
        plain = features_of(model, images, pixels, passes=0, cache=cache)
        features = features_of(model, images, pixels, passes=_PASSES, cache=cache) if setting.augmented else plain
    if setting.method in CLOSED_FORMS:
        began = time.process_time()
        return {**_rounded(with_closed_form(setting.method, setting.dim, features)), 'cpu_seconds': _since(began)}
    put_classifier(model, setting.method, setting.dim, setting.seed)
    return _Training(setting, images, model, pixels, features, plain).run()


class _Training:
    """A training: of the classifier alone, on features, or of the whole model, on images."""

    def __init__(self, setting: Setting, images: Images, model: nn.Module, pixels: Pixels, features: Features | None,
                 plain_features: Features | None):
        self.setting, self.images, self.model, self.pixels = setting, images, model, pixels
        self.features, self.plain_features = features, plain_features
        self.classifier = model.get_classifier()
        self.trained = model if features is None else self.classifier
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.optimizer = create_optimizer_v2(self.trained, setting.optimizer, setting.lr,
                                             WEIGHT_DECAYS[setting.optimizer], 0.9)
        self.criterion = make_criterion(self.classifier)
        self.steps = setting.epochs * (len(images.x_train) // setting.batch_size)
        if not self.steps:
            raise ValueError(f'{len(images.x_train)} training images are less than a batch of {setting.batch_size}: '
                             f'give a smaller --batch-size.')
        self.scheduler = None
        if isinstance(self.classifier, DL2PAHead):
            self.scheduler = AssignmentScheduler(self.trained, total=self.steps)

    def run(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if is_primed(self.setting.method):
            began = time.process_time()
            plain = self.setting.prime_images != 'augmented'
            prime(self.trained, self.batches(0, plain=plain), self.scheduler, progress=False)
            found['prime_cpu_seconds'] = _since(began)
        found['before'] = self.measures()
        began = time.process_time()
        losses, curve, step = [], [], 0
        for epoch in range(self.setting.epochs):
            for x, y in self.batches(epoch):
                if not step:
                    found['first_loss_evaluated'] = self.evaluated_loss(x, y)
                    self.mode(training=True)
                losses.append(self.step(x, y, step / self.steps))
                step += 1
            if self.scheduler is not None:
                self.scheduler.epoch_end()
            if self.features is not None and epoch + 1 < self.setting.epochs:
                paused = time.process_time()
                curve.append(self.measures()['top1'])
                began += time.process_time() - paused
                self.mode(training=True)
        seconds = _since(began)
        measured = self.measures()
        found |= {'first_loss': losses[0], 'last_loss': sum(losses[-10:]) / len(losses[-10:])}
        if self.features is not None:
            found['curve'] = [*curve, measured['top1']]
        return _rounded({**measured, **found}) | {'cpu_seconds': seconds}

    def mode(self, training: bool) -> None:
        self.trained.train(training)
        if training and self.setting.backbone == 'trained_but_batch_norm':
            own = set(self.classifier.modules())
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in own:
                    module.eval()

    def batches(self, epoch: int, plain: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield an epoch's batches: features or images that are normalised, with labels."""
        setting, labels = self.setting, self.images.y_train
        order = torch.randperm(len(labels), generator=self.generator)
        for index in order.split(setting.batch_size):
            if len(index) < setting.batch_size and not plain:
                break
            if self.features is not None:
                passes = (self.plain_features if plain else self.features).passes
                x = passes[epoch % len(passes)][index]
            else:
                augmented = setting.augmented and not plain
                x = self.pixels(self.images.x_train[index], self.generator if augmented else None)
            yield x, labels[index]

    def step(self, x: torch.Tensor, y: torch.Tensor, share: float) -> float:
        """Take a step when this share of the training is over, and return its loss."""
        for group in self.optimizer.param_groups:
            group['lr'] = self.setting.lr * 0.5 * (1 + math.cos(math.pi * share))
        if self.scheduler is not None:
            self.scheduler.resolve_if_due()
        loss = self.criterion(self.trained(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step(y)
        return loss.item()

    @torch.no_grad()
    def evaluated_loss(self, x: torch.Tensor, y: torch.Tensor) -> float:
        self.mode(training=False)
        return self.criterion(self.trained(x), y).item()

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Return what is measured on the test images."""
        self.mode(training=False)
        labels = self.images.y_test
        if self.features is not None:
            features = self.features.test
        else:
            features = torch.cat([pooled(self.model, self.pixels(part)) for part in self.images.x_test.split(64)])
        logits = self.classifier(features)
        return {'top1': metrics.top_k(logits, labels, 1),
                'recall_at_1': metrics.recall_at_1(embed(self.classifier, features), labels),
                'calibration_error': metrics.calibration_error(logits, labels)}


def _since(began: float) -> float:
    return round(time.process_time() - began, 2)


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return _rounded(value)
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f'{value:.5g}') if isinstance(value, float) else value
    return {name: short(value) for name, value in found.items()}
