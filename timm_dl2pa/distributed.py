"""Distributed runs: the rank of this process, sums over all processes, and results of rank 0 for all processes."""
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
    """Replace each tensor in place by its sum over all processes. Outside a distributed run nothing changes.

    Args:
        tensors: Tensors of the same shapes and dtypes in every process.
    """
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_from_rank_0(value: T, device: torch.device | None = None) -> T:
    """Return the value of rank 0 in every process.

    Args:
        value: An object that can be pickled. Its value matters on rank 0 only.
        device: The device of the training, from which NCCL sends. Default: the current one.

    Returns:
        The value of rank 0. Outside a distributed run, `value` itself.
    """
    if not is_distributed():
        return value
    values: list[Any] = [value]
    sender = device if device is not None and device.type == 'cuda' else None
    dist.broadcast_object_list(values, src=0, device=sender)
    return values[0]


def solve_on_rank_0(function: Callable[[], T], device: torch.device | None = None) -> T:
    """Call a function on rank 0 only, and return its result, or raise its error, in every process.

    Rank 0 raises an error only after it has sent it to the other processes, which would otherwise wait forever.

    Args:
        function: Called without arguments on rank 0. Its result must be picklable.
        device: See `broadcast_from_rank_0`.

    Returns:
        The result of the function.

    Raises:
        Exception: The error of the function, in every process.
    """
    result: Any = None
    if rank() == 0:
        try:
            result = function()
        except Exception as error:
            result = error
    result = broadcast_from_rank_0(result, device)
    if isinstance(result, Exception):
        raise result
    return result
