"""The training of the demo: every batch is given to each model in turn, so that their times can be compared."""
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from ..head import heads_of
from ..losses import SquaredCosineLoss
from ..recipes import RECIPES
from ..scheduling import AssignmentScheduler
from .data import Data
from .heads import HEADS, RECIPES_OF

__all__ = ['Run', 'right_answers', 'train']

_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 0.05


@dataclass
class Run:
    """The results of one head: a row of the table.

    Attributes:
        head: A key of `HEADS`.
        top1: The test accuracy in percent.
        head_parameters: The number of parameters of the head. Prototypes are none.
        step_milliseconds: The median time of a training step.
        moved: The number of classes that moved at each re-solve.
        losses: The mean training loss of each epoch.
        top1_by_epoch: The test accuracy after each epoch.
    """
    head: str
    top1: float = 0.0
    head_parameters: int = 0
    step_milliseconds: float = 0.0
    moved: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    top1_by_epoch: list[float] = field(default_factory=list)


class _Trainee:
    """A model with its loss, optimiser and scheduler."""

    def __init__(self, kind: str, network: nn.Module, epochs: int, epoch_length: int):
        self.network, self.run, self.times = network, Run(kind), []
        classifiers = network.get_classifier()
        classifiers = [classifiers] if isinstance(classifiers, nn.Module) else list(classifiers)
        self.run.head_parameters = sum(p.numel() for module in classifiers for p in module.parameters())
        total = epochs * epoch_length
        self.scheduler = AssignmentScheduler(network, interval=epoch_length, total=total,
                                             stop=0 if kind == 'static' else None) if heads_of(network) else None
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if kind == 'paper':
            self.criterion = SquaredCosineLoss(heads_of(network)[0], **RECIPES[RECIPES_OF[kind]].loss_arguments)
        self.optimizer = create_optimizer_v2(network, opt='adamw', lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        self.rates = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, _LEARNING_RATE, total_steps=total,
                                                         pct_start=0.1, cycle_momentum=False)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on a batch; return the loss."""
        began = _now(images.device)
        loss = self.criterion(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update = self.scheduler.step(labels) if self.scheduler else None
        self.times.append(_now(images.device) - began)
        self.rates.step()
        if update and update.event == 'resolve':
            self.run.moved.append(update.moved)
        return loss.item()


def train(models: dict[str, nn.Module], data: Data, epochs: int, device: torch.device) -> dict[str, Run]:
    """Train models in place, side by side, and print the accuracies of each epoch.

    Args:
        models: A model for each of `HEADS`, on the device.
        data: The images.
        epochs: The number of epochs.
        device: Where the models are.

    Returns:
        The results, by the keys of `HEADS`.
    """
    trainees = {kind: _Trainee(kind, network, epochs, len(data.train)) for kind, network in models.items()}
    with tqdm(total=epochs * len(data.train), unit='batch', disable=None) as bar:
        for epoch in range(1, epochs + 1):
            losses: dict[str, list[float]] = {kind: [] for kind in trainees}
            for network in models.values():
                network.train()
            for images, labels in data.train:
                images, labels = images.to(device), labels.to(device)
                for kind, trainee in trainees.items():
                    losses[kind].append(trainee.step(images, labels))
                bar.update()
            for kind, trainee in trainees.items():
                right = right_answers(trainee.network, data.test, device)
                trainee.run.top1 = round(100 * right.mean().item(), 2)
                trainee.run.top1_by_epoch.append(trainee.run.top1)
                trainee.run.losses.append(round(float(np.mean(losses[kind])), 4))
            bar.write(f'epoch {epoch:2} of {epochs}, top-1: ' + ', '.join(_scores(trainees)))
    for trainee in trainees.values():
        trainee.run.step_milliseconds = round(1000 * median(trainee.times), 2)
    return {kind: trainee.run for kind, trainee in trainees.items()}


def _scores(trainees: dict[str, _Trainee]) -> Iterator[str]:
    for kind, trainee in trainees.items():
        yield f'{HEADS[kind]} {trainee.run.top1:.1f}'


@torch.no_grad()
def right_answers(network: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device
                  ) -> torch.Tensor:
    """Return which images are classified correctly, (N,) float32 of 0 and 1, on the CPU. Sets evaluation mode."""
    network.eval()
    return torch.cat([(network(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in batches])


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
