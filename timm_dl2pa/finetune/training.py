"""The training of a fine-tuning, epoch by epoch, its evaluation, and the best of the epochs."""
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..head import heads_of
from ..scheduling import AssignmentScheduler
from .backbone import keep_statistics

__all__ = ['Best', 'Epoch', 'Evaluation', 'Plan', 'evaluate', 'fine_tune', 'make_loader', 'set_mode']

_WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        epochs: The number of epochs.
        lr: AdamW's learning rate at the start. It falls to 0 by a cosine.
        freeze: Whether the head alone is trained, on a backbone in evaluation mode.
        keep_statistics: Whether the backbone's batch norms keep their running statistics.
    """
    epochs: int
    lr: float
    freeze: bool = False
    keep_statistics: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the validation images.

    Attributes:
        top1: The accuracy in percent.
        loss: The mean cross-entropy.
        labels: (N,) int64, the classes.
        predictions: (N,) int64, those of the model.
        means: (C, d) float32, the mean direction of the main head's embeddings of each class; zeros without images.
    """
    top1: float
    loss: float
    labels: torch.Tensor
    predictions: torch.Tensor
    means: torch.Tensor


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over.

    Attributes:
        number: From 1; 0 before the training.
        train_loss: The mean loss of its batches; None before the training.
        evaluation: That of the model after it.
        seconds: What training and evaluation took.
    """
    number: int
    train_loss: float | None
    evaluation: Evaluation
    seconds: float

    def __str__(self) -> str:
        trained = 'before training' if self.train_loss is None else f'training loss {self.train_loss:.4f}'
        return (f'epoch {self.number:2}: {trained}, validation loss {self.evaluation.loss:.4f}, '
                f'top-1 {self.evaluation.top1:.2f} %, {self.seconds:.1f} s')

    def record(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        loss = None if self.train_loss is None else round(self.train_loss, 4)
        return {'epoch': self.number, 'train_loss': loss, 'val_loss': round(self.evaluation.loss, 4),
                'val_top1': round(self.evaluation.top1, 2), 'seconds': round(self.seconds, 2)}


class Best:
    """The best epoch so far, with its weights: by the accuracy, then by the loss.

    Attributes:
        epoch: The best one; None before the first.
        stale: The number of epochs since the accuracy rose.
    """

    def __init__(self) -> None:
        self.epoch: Epoch | None = None
        self.stale = 0
        self._state: dict[str, torch.Tensor] = {}

    def offer(self, epoch: Epoch, model: nn.Module) -> bool:
        """Take an epoch and the model's weights, if it is better. Returns whether it is."""
        before, now = self.epoch and self.epoch.evaluation, epoch.evaluation
        self.stale = 0 if before is None or now.top1 > before.top1 else self.stale + 1
        if before is not None and (now.top1, -now.loss) <= (before.top1, -before.loss):
            return False
        self.epoch = epoch
        self._state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return True

    def restore(self, model: nn.Module) -> None:
        """Give a model the best weights."""
        model.load_state_dict(self._state)


def make_loader(images: Dataset[Any], batch_size: int, workers: int, device: torch.device, seed: int | None = None
                ) -> DataLoader[Any]:
    """Make a loader.

    Args:
        images: The images.
        batch_size: B.
        workers: The number of processes that prepare images.
        device: Where the batches go.
        seed: Seed of the order and of the augmentation, for training. A last batch of less than half the size, whose
            statistics mislead a batch norm, is left out then. None: in order, all of them.
    """
    train = seed is not None
    return DataLoader(
        images, batch_size, shuffle=train, num_workers=workers, pin_memory=device.type == 'cuda',
        drop_last=train and len(images) > batch_size and 0 < len(images) % batch_size < max(2, batch_size / 2),
        generator=torch.Generator().manual_seed(seed) if train else None, persistent_workers=train and workers > 0)


def fine_tune(
        model: nn.Module,
        scheduler: AssignmentScheduler,
        criterion: nn.Module,
        train: DataLoader[Any],
        validation: DataLoader[Any],
        plan: Plan,
) -> Iterator[Epoch]:
    """Train a model in place.

    Args:
        model: A wrapped model on its device.
        scheduler: Its scheduler.
        criterion: The loss, of what the head returns in training mode and labels.
        train: The training images.
        validation: The validation images.
        plan: How it is trained.

    Yields:
        Each epoch when it is over, and first one with the number 0 before anything was trained. Between two of them the
        caller may do with the model what it likes, or stop.

    Raises:
        ValueError: The loss is not finite any more.
    """
    began = time.perf_counter()
    yield Epoch(0, None, evaluate(model, validation), time.perf_counter() - began)
    own = {parameter for head in heads_of(model) for parameter in head.parameters()}
    for parameter in model.parameters():
        if plan.freeze and parameter not in own:
            parameter.requires_grad = False
    optimizer = create_optimizer_v2(model, opt='adamw', lr=plan.lr, weight_decay=_WEIGHT_DECAY)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, plan.epochs * len(train)))
    device = heads_of(model)[0].prototypes.device
    for number in range(1, plan.epochs + 1):
        began = time.perf_counter()
        set_mode(model, plan)
        total = torch.zeros((), device=device)
        for images, labels in tqdm(train, f'epoch {number} of {plan.epochs}', unit='batch', leave=False, disable=None):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            scheduler.resolve_if_due()
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(labels)
            rates.step()
            total += loss.detach()
        scheduler.epoch_end()
        train_loss = total.item() / len(train)
        if not math.isfinite(train_loss):
            raise ValueError(f'the loss of epoch {number} is {train_loss}: give a lower --lr than {plan.lr:g}.')
        yield Epoch(number, train_loss, evaluate(model, validation), time.perf_counter() - began)


def set_mode(model: nn.Module, plan: Plan) -> None:
    """Put a model in the mode in which it is trained."""
    model.train(not plan.freeze)
    for head in heads_of(model):
        head.train()
    if plan.keep_statistics and not plan.freeze:
        keep_statistics(model)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any]) -> Evaluation:
    """Evaluate a wrapped model, and leave it in evaluation mode."""
    model.eval()
    head = heads_of(model)[0]
    device, embeddings = head.prototypes.device, []
    sums = torch.zeros(head.num_classes, head.dim, device=device)
    hook = head.register_forward_pre_hook(lambda module, inputs: embeddings.append(module.embed(inputs[0]).flatten(1)))
    losses, all_labels, predictions = 0.0, [], []
    try:
        for images, labels in tqdm(loader, 'validation', unit='batch', leave=False, disable=None):
            labels = labels.to(device)
            logits = model(images.to(device))
            losses += nn.functional.cross_entropy(logits.float(), labels, reduction='sum').item()
            sums.index_add_(0, labels, embeddings.pop())
            all_labels.append(labels.cpu())
            predictions.append(logits.argmax(1).cpu())
    finally:
        hook.remove()
    labels, found = torch.cat(all_labels), torch.cat(predictions)
    return Evaluation(top1=100 * (labels == found).float().mean().item(), loss=losses / len(labels), labels=labels,
                      predictions=found, means=nn.functional.normalize(sums, dim=1).cpu())
