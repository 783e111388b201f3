"""A distributed run: which process this is, sums over the processes, and one process's answer for all of them."""
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ['add_over_ranks', 'broadcast_from_rank_0', 'is_distributed', 'rank', 'solve_on_rank_0']

T = TypeVar('T')


def is_distributed() -> bool:
    """Return whether `torch.distributed` is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank; 0 outside a distributed run."""
    return dist.get_rank() if is_distributed() else 0


def add_over_ranks(*tensors: torch.Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes. Outside a distributed run it does nothing."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_from_rank_0(value: T, device: torch.device | None = None) -> T:
    """Return rank 0's value, which is pickled, on every process.

    Args:
        value: Anything that can be pickled; the other processes' values are not looked at.
        device: Of the training. NCCL sends from there, not from whichever device is the current one.
    """
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=device if device is not None and device.type == 'cuda' else None)
    return box[0]


def solve_on_rank_0(function: Callable[[], T], device: torch.device | None = None) -> T:
    """Return on every process what the function returns on rank 0, or raise its error there.

    The other processes do not call the function. An error is raised only after they have received it: without it they
    would wait forever.
    """
    answer: Any = None
    if rank() == 0:
        try:
            answer = function()
        except Exception as error:
            answer = error
    answer = broadcast_from_rank_0(answer, device)
    if isinstance(answer, Exception):
        raise answer
    return answer
