"""A tiny model and tiny data for the training loops of other projects, and what two trainings are compared by."""
import os
from typing import Any

import timm
import torch

from timm_dl2pa import AssignmentScheduler, wrap_dl2pa

CLASSES, DIM, SIZE = 7, 4, 32


class Killed(Exception):
    """Ends a training, as a signal would."""


def tiny_model(**kwargs) -> torch.nn.Module:
    """A wrapped model whose weights depend on nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return wrap_dl2pa(timm.create_model('test_resnet', num_classes=CLASSES), DIM, **kwargs)


def tiny_data(count: int = 24) -> list[tuple[torch.Tensor, int]]:
    """Images (3, SIZE, SIZE) of noise around one image for each class, with labels."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator).tolist()
    return [(classes[label] + torch.randn(3, SIZE, SIZE, generator=generator), label) for label in labels]


def outcome(model: torch.nn.Module, scheduler: AssignmentScheduler) -> dict[str, Any]:
    """Return all that a training leaves, but the seconds that re-solves took."""
    state = scheduler.state_dict()
    for entry in state['resolver']['history']:
        del entry['seconds']
    return {'model': {name: value.clone() for name, value in model.state_dict().items()}, 'scheduler': state}


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def as_launched(rank: int, count: int = 2) -> None:
    """Set what a launcher such as torchrun tells a process. The processes have formed their group already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      GROUP_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='1', TORCHELASTIC_RUN_ID='test')
