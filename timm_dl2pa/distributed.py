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


def broadcast_from_rank_0(value: T) -> T:
    """Return rank 0's value, which is pickled, on every process."""
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def solve_on_rank_0(function: Callable[[], T]) -> T:
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
    answer = broadcast_from_rank_0(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer
