"""One training: its model, optimiser and assignment, and what is measured of them."""
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import torch
import torch.nn as nn
import torch.nn.functional as F
from accuracy_methods import PaperRule, make_criterion, make_model, make_scheduler
from accuracy_recipe import Recipe, learning_rate
from image_arrays import Images, augment, superclasses
from training_step import GraphedStep, PlainStep

from timm_dl2pa import prime

__all__ = ['Run', 'precision']

# Batches that are augmented together on a GPU, where launching the kernels is what takes the time.
_TOGETHER = 16


def precision(recipe: Recipe, device: torch.device) -> str:
    """Return the recipe's precision; 'auto' is bfloat16 where the device computes in it, and does not emulate it."""
    if recipe.precision != 'auto':
        return recipe.precision
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported() else 'float32'
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    return 'bfloat16' if capabilities.get('avx512_bf16') or capabilities.get('amx_bf16') else 'float32'


class Run:
    """One training: its model, optimiser and assignment, which go on from a checkpoint after each epoch.

    Args:
        recipe: What decides it.
        images: Training and test images.
        device: On a GPU the step is a CUDA graph.
    """

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
        self.criterion = make_criterion(recipe, self.head, self.images)
        self.rule = self.scheduler = None
        if recipe.method == 'paper':
            self.rule = PaperRule(self.head, torch.Generator().manual_seed(recipe.seed))
        elif recipe.method == 'dl2pa':
            self.scheduler = make_scheduler(recipe, self.model)
        self.step: PlainStep | GraphedStep = PlainStep(self.model, self.criterion, self.optimizer, self._autocast)
        self._stream: torch.cuda.Stream | None = None
        if device.type == 'cuda':
            torch.backends.cudnn.benchmark = True
            self.step = GraphedStep(self.step, self.head)
            self._stream = torch.cuda.Stream(device)
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

    def _autocast(self) -> AbstractContextManager:
        enabled = precision(self.recipe, self.device) == 'bfloat16'
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the backbone's features (N, F), float32, of uint8 images."""
        self.model.eval()
        found = []
        for part in x.split(1000):
            part = self.normalised(part).contiguous(memory_format=torch.channels_last)
            with self._autocast():
                found.append(self.model.forward_head(self.model.forward_features(part), pre_logits=True).float())
        return torch.cat(found)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std

    def batches(self) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """Yield an epoch's augmented images with their targets, soft ones under mixup, and their labels."""
        recipe, images = self.recipe, self.images
        order = torch.randperm(len(images.x_train), generator=self.generator, device=self.device)
        order = order[:self.steps_an_epoch * recipe.batch_size]
        padding, digits = images.x_train.shape[2] // 8, len(images.classes) == 10 and images.x_train.shape[2] == 8
        for index in order.split(recipe.batch_size * (_TOGETHER if self.device.type == 'cuda' else 1)):
            augmented = augment(self.normalised(images.x_train[index]), padding, not digits, self.generator)
            for x, y in zip(augmented.split(recipe.batch_size), images.y_train[index].split(recipe.batch_size)):
                if recipe.mixup:
                    share = torch._sample_dirichlet(
                        torch.full((1, 2), recipe.mixup, device=self.device), self.generator)[0, 0]
                    x = share * x + (1 - share) * x.flip(0)
                    hot = F.one_hot(y, images.num_classes).float()
                    yield x, (share * hot + (1 - share) * hot.flip(0), y)
                else:
                    yield x, (y, y)

    def train_epoch(self) -> None:
        """Train for an epoch, and add to the curve how the model stands then."""
        began = time.perf_counter()
        self.model.train()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            mean_loss = self._train_epoch()
        self.epoch += 1
        self.seconds += time.perf_counter() - began
        logits, _ = self.outputs(self.images.x_test)
        self.curve.append({'loss': round(mean_loss, 4),
                           'top1': round(metrics.top_k(logits, self.images.y_test, 1), 2)})

    def _train_epoch(self) -> float:
        """Return the mean loss; reading it waits for the device."""
        loss_sum = torch.zeros((), device=self.device)
        for step, (x, (targets, labels)) in enumerate(self.batches()):
            rate = learning_rate(self.recipe, (self.epoch + step / self.steps_an_epoch) / self.recipe.epochs)
            if self.scheduler is not None:
                self.scheduler.resolve_if_due()
            loss_sum += self.step(x, targets, rate)
            if self.rule is not None:
                self.rule.step(labels)
            if self.scheduler is not None:
                self.scheduler.step(targets)
        if self.rule is not None and self.epoch + 1 < self.recipe.epochs:
            self.rule.resolve()
        if self.scheduler is not None:
            self.scheduler.epoch_end()
        return float(loss_sum) / self.steps_an_epoch

    @torch.no_grad()
    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N, C) and embeddings (N, d), float32, of uint8 images."""
        self.model.eval()
        logits, embeddings = [], []
        classifier = self.model.get_classifier()
        for part in x.split(1000):
            part = self.normalised(part).contiguous(memory_format=torch.channels_last)
            with self._autocast():
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
        if self.scheduler is None:
            return []
        return [update.moved for update in self.scheduler.history if update.event != 'placed']

    def step_kind(self) -> str:
        """Return how the steps were taken: plain, as a CUDA graph, or plain because recording one failed."""
        if isinstance(self.step, PlainStep):
            return 'plain'
        return f'plain: {self.step.failure}' if self.step.failure else 'CUDA graph'

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
