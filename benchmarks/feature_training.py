"""The training of a classifier on frozen features: AdamW, a cosine schedule, batches in a random order by the seed."""
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from suite import Setting, learning_rate, make_scheduler

from timm_dl2pa import DL2PAHead

__all__ = ['train_on_features']

_DECAY = 0.05


def train_on_features(
        model: nn.Module,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        method: str,
        seed: int,
        rate: float,
        steps: int,
        batch_size: int,
        own: Iterable[nn.Parameter] = (),
        own_rate: float = 0.0,
) -> None:
    """Train a model in place, and leave it in evaluation mode.

    Args:
        model: Takes features (B, F). A DL2PA head gets its scheduler, as `suite.make_scheduler` makes it.
        criterion: Of the model's output and labels (B,).
        x: (N, F) float32.
        y: (N,) int64.
        method: The name of the method.
        seed: Of the order of the batches.
        rate: AdamW's learning rate.
        steps: The number of batches.
        batch_size: B.
        own: Parameters of the criterion.
        own_rate: Their learning rate.
    """
    groups = [{'params': list(model.parameters()), 'lr': rate}]
    if own := list(own):
        groups.append({'params': own, 'lr': own_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=_DECAY)
    rates, epoch = [group['lr'] for group in groups], len(x) // batch_size
    scheduler = make_scheduler(Setting('features', method, None, 'adamw', seed), model, steps, epoch) \
        if isinstance(model, DL2PAHead) else None
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        index = order[step % epoch * batch_size:(step % epoch + 1) * batch_size]
        for group, full in zip(optimizer.param_groups, rates):
            group['lr'] = full * learning_rate('adamw', step / steps)
        if scheduler is not None:
            scheduler.resolve_if_due()
        loss = criterion(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(y[index])
    model.eval()
