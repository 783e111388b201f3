"""One training at very many classes: what decides it, its data and backbone, and what is measured."""
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import torch
import torch.nn as nn
import torch.nn.functional as F
from glyphs import CACHE, CHARACTERS, HELD_OUT, load_glyphs, warp
from image_arrays import Images, augment, keep_classes, load_images
from many_classes_methods import METHODS, PLACED, embed, make_classifier, make_loss, make_scheduler
from timm.optim import create_optimizer_v2

from timm_dl2pa import prime

__all__ = ['FEATURES', 'Setting', 'run']

# Of the backbone.
FEATURES = 256
# The fonts on which settings are chosen: a Gothic and a regular script that draw nothing of the training then, and a
# Japanese Gothic.
_VALIDATION = ('wqy-microhei', 'cwkai', 'ipag')
# Share of the steps in which the learning rate rises.
_RISE = 0.1
_WEIGHT_DECAY = 0.05
# Rows of logits that are made at a time.
_BLOCK = 512


@dataclass(frozen=True)
class Setting:
    """All that decides a run, but for the data's place and the machine.

    Attributes:
        data: One of `glyphs.CHARACTERS`, or the name of a folder of images.
        number: Number of classes, drawn by the seed; None: all.
        method: One of `METHODS`.
        dim: d; None where the method has none.
        epochs: Passes over the training images.
        lr: AdamW's largest learning rate.
        batch_size: The last batch of an epoch is left out if it is smaller.
        num_sampled: Draws of sampled softmax; None for the other methods.
        validation: Whether other training fonts stand in for the test's, which draw nothing: for choosing.
        seed: Of weights and batches.

    Raises:
        ValueError: There is no such method.
    """
    data: str
    number: int | None
    method: str
    dim: int | None
    epochs: int
    lr: float
    batch_size: int = 128
    num_sampled: int | None = 1024
    validation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f'method must be one of {", ".join(METHODS)}, not {self.method!r}.')

    def normal(self) -> 'Setting':
        """Return the setting without what does not count for its method, so that equal runs are equal settings."""
        return replace(self, dim=None if self.method == 'linear' else self.dim,
                       num_sampled=self.num_sampled if self.method == 'sampled' else None)

    def __str__(self) -> str:
        words = (self.data, self.number, self.method, self.dim and f'd{self.dim}', f'{self.epochs} epochs',
                 f'lr {self.lr:g}', self.num_sampled and f'{self.num_sampled} sampled',
                 self.validation and 'validation', f'seed {self.seed}')
        return ' '.join(str(word) for word in words if word)


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    return (nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True))


def make_backbone(channels: int, size: int) -> nn.Module:
    """Return a convolutional network of images (B, channels, size, size) to features (B, 256)."""
    end = -(-size // 8)
    return nn.Sequential(*_convolution(channels, 32, 5, 2), *_convolution(32, 64, 3, 2), *_convolution(64, 128, 3, 2),
                         nn.Flatten(), nn.Linear(128 * end * end, FEATURES, bias=False), nn.BatchNorm1d(FEATURES),
                         nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Data:
    """Images, those of classes that are left out of training, and how images are varied in training."""
    images: Images
    x_unseen: torch.Tensor
    y_unseen: torch.Tensor
    vary: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    vary_tests: bool
    about: dict[str, Any]


def load_data(setting: Setting, folder: Path | None, fonts: Path | None, cache: Path = CACHE) -> Data:
    """Draw or read a setting's data.

    Args:
        setting: Its `data` and `number`, which are the same whatever its seed, say which.
        folder: The ImageFolder where it is none of `CHARACTERS`: a tenth of the classes, at most 500, are left out.
        fonts: See `load_glyphs`.
        cache: See `load_glyphs`.
    """
    if setting.data in CHARACTERS:
        chosen = {'held_out': _VALIDATION, 'without': HELD_OUT} if setting.validation else {}
        glyphs = load_glyphs(setting.data, setting.number, folder=fonts, cache=cache, **chosen)
        return Data(glyphs, glyphs.x_unseen, glyphs.y_unseen, warp, True, glyphs.report)
    images = load_images(data_dir=str(folder))
    order = torch.randperm(images.num_classes, generator=torch.Generator().manual_seed(0)).tolist()
    unseen = min(500, images.num_classes // 10)
    others = keep_classes(images, sorted(order[:unseen]))
    images = keep_classes(images, sorted(order[unseen:][:setting.number]))
    padding = images.x_train.shape[-1] // 8
    return Data(images, others.x_test, others.y_test, lambda x, g: augment(x.float(), padding, False, g), False, {})


def run(setting: Setting, folder: Path | None = None, fonts: Path | None = None, cache: Path = CACHE) -> dict[str, Any]:
    """Train, and return what was measured. To measure memory, call it once in a process.

    Args:
        setting: A normal one.
        folder: See `load_data`.
        fonts: See `load_data`.
        cache: See `load_data`.
    """
    return _Training(setting, load_data(setting, folder, fonts, cache)).run()


class _Training:
    """A training whose classifier has an optimiser of its own, so that its part of a step can be timed."""

    def __init__(self, setting: Setting, data: Data):
        self.setting, self.data, images = setting, data, data.images
        self.mean, self.std = images.statistics()
        torch.manual_seed(setting.seed)
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.backbone = make_backbone(images.x_train.shape[1], images.x_train.shape[-1])
        self.backbone.to(memory_format=torch.channels_last)
        self.steps = setting.epochs * (len(images.x_train) // setting.batch_size)
        if not self.steps:
            raise ValueError(f'{len(images.x_train)} training images are less than a batch of {setting.batch_size}: '
                             f'give a smaller --batch-size.')
        self.optimizers = [create_optimizer_v2(self.backbone, 'adamw', setting.lr, _WEIGHT_DECAY)]
        self.head_seconds = 0.0

    def run(self) -> dict[str, Any]:
        setting, images = self.setting, self.data.images
        x, _ = next(self.batches())
        self.backbone(x).sum().backward()  # what the backbone takes is in use before the classifier is made
        self.optimizers[0].zero_grad()
        before, began = _peak_memory(), time.process_time()
        self.classifier = make_classifier(setting.method, FEATURES, images.num_classes, setting.dim,
                                          setting.num_sampled, setting.seed)
        made = time.process_time() - began
        self.loss = make_loss(setting.method, self.classifier)
        self.scheduler = make_scheduler(setting.method, self.classifier, self.steps)
        self.optimizers += self.classifier_optimizers()
        began, step, losses = time.process_time(), 0, []
        for _ in range(setting.epochs):
            total = 0.0
            for x, labels in self.batches():
                total += self.step(x, labels, step / self.steps)
                step += 1
            losses.append(round(total * setting.epochs / self.steps, 4))
            if self.scheduler is not None:
                self.scheduler.epoch_end()
        seconds, peak = time.process_time() - began, _peak_memory()
        found = {'classes': images.num_classes, 'training_images': len(images.x_train),
                 'test_images': len(images.x_test), 'unseen_images': len(self.data.x_unseen), 'steps': self.steps,
                 **self.measures(), 'cpu_seconds': seconds, 'head_cpu_seconds': self.head_seconds,
                 'head_ms_a_step': 1000 * self.head_seconds / self.steps, 'making_cpu_seconds': made,
                 'memory_before_mb': before, 'peak_memory_mb': peak, 'losses': losses}
        if self.scheduler is not None:
            found['moved'] = [update.moved for update in self.scheduler.history]
        found['top1_by_class_means'] = self.top1_by_class_means()
        if setting.method in PLACED:
            began = time.process_time()
            model = nn.Sequential(self.backbone, self.classifier).eval()
            prime(model, zip(self.plain(images.x_train), images.y_train.split(_BLOCK)), progress=False)
            found['prime_cpu_seconds'] = time.process_time() - began
            found['top1_primed'] = self.measures()['top1']
        return {name: float(f'{value:.5g}') if isinstance(value, float) else value for name, value in found.items()}

    def classifier_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW for the classifier; for class vectors with sparse gradients, Adam that moves those alone."""
        lr, sparse = self.setting.lr, []
        if self.setting.method == 'sampled':
            sparse = [self.classifier[-1].vectors.weight]
            sparse[0].requires_grad_(False)  # timm's filter for the weight decay leaves it out
        dense = create_optimizer_v2(self.classifier, 'adamw', lr, _WEIGHT_DECAY)
        for weight in sparse:
            weight.requires_grad_(True)
        return [dense, *(torch.optim.SparseAdam([weight], lr) for weight in sparse)]

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield an epoch's batches: varied images, normalised, and labels."""
        images = self.data.images
        order = torch.randperm(len(images.x_train), generator=self.generator)
        for index in order.split(self.setting.batch_size):
            if len(index) == self.setting.batch_size:
                yield self.normalised(self.data.vary(images.x_train[index], self.generator)), images.y_train[index]

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def step(self, x: torch.Tensor, labels: torch.Tensor, share: float) -> float:
        """Take a step when this share of the training is over, and return its loss."""
        rate = share / _RISE if share < _RISE else 0.5 * (1 + math.cos(math.pi * (share - _RISE) / (1 - _RISE)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = self.setting.lr * rate
        features = self.backbone(x)
        began = time.process_time()
        if self.scheduler is not None:
            self.scheduler.resolve_if_due()
        leaf = features.detach().requires_grad_()
        loss = self.loss(leaf, labels)
        loss.backward()
        for optimizer in self.optimizers[1:]:
            optimizer.step()
            optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step(labels)
        self.head_seconds += time.process_time() - began
        features.backward(leaf.grad)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return loss.item()

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Return what is measured on the test images, in blocks: no matrix of all images and all classes."""
        self.backbone.eval()
        self.classifier.eval()
        labels, right, right_of_5 = self.data.images.y_test, 0, 0
        for features, own in zip(self.features(self.data.images.x_test), labels.split(_BLOCK)):
            logits = self.classifier(features)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == own.unsqueeze(1)
            right += int(hits[:, 0].sum())
            right_of_5 += int(hits.any(dim=1).sum())
        found = {'top1': 100 * right / len(labels), 'top5': 100 * right_of_5 / len(labels)}
        if len(self.data.x_unseen):
            unseen = torch.cat([embed(self.classifier, part) for part in self.features(self.data.x_unseen)])
            found['recall_at_1'] = metrics.recall_at_1(unseen, self.data.y_unseen)
        return found

    @torch.no_grad()
    def top1_by_class_means(self) -> float:
        """Return the accuracy by the nearest class mean, a direction, of the trained embeddings of training images."""
        images = self.data.images
        self.backbone.eval()
        self.classifier.eval()
        embeddings = torch.cat([F.normalize(embed(self.classifier, part), dim=1)
                                for part in self.features(images.x_train)])
        sums = embeddings.new_zeros(images.num_classes, embeddings.shape[1]).index_add_(0, images.y_train, embeddings)
        means, right = F.normalize(sums, dim=1), 0
        for features, labels in zip(self.features(images.x_test), images.y_test.split(_BLOCK)):
            right += int(((embed(self.classifier, features) @ means.t()).argmax(dim=1) == labels).sum())
        return 100 * right / len(images.x_test)

    def features(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the features of blocks of images."""
        return (self.backbone(part) for part in self.plain(x))

    def plain(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield blocks of images, normalised, varied once and for all where the data are."""
        generator = torch.Generator().manual_seed(0)
        for part in x.split(_BLOCK):
            yield self.normalised(self.data.vary(part, generator) if self.data.vary_tests else part.float())


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, in MiB."""
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
