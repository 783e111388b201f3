"""Distributed runs: the rank of this process, sums over all processes, and results of rank 0 for all processes."""
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ['add_over_ranks', 'check_on_every_rank', 'copy_from_rank_0', 'gather_over_ranks', 'is_distributed',
           'largest_over_ranks', 'rank', 'solve_on_rank_0']

T = TypeVar('T')
# torch 2.14 renamed it, and warns of the old name.
_all_gather = getattr(dist, 'all_gather_single', None) or getattr(dist, 'all_gather_into_tensor', None)


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


def copy_from_rank_0(*tensors: torch.Tensor) -> None:
    """Replace each tensor in place by that of rank 0. Outside a distributed run nothing changes.

    Args:
        tensors: Tensors of the same shapes and dtypes in every process.
    """
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, those of rank 0 first. Outside a distributed run they are the tensor's.

    Args:
        tensor: (m, ...), of the same shape and dtype in every process.
    """
    if not is_distributed():
        return tensor
    gathered = tensor.new_empty((dist.get_world_size() * len(tensor), *tensor.shape[1:]))
    _all_gather(gathered, tensor.contiguous())
    return gathered


def largest_over_ranks(number: int, device: torch.device) -> int:
    """Return the largest of the whole numbers of all processes. Waits for the device."""
    largest = torch.tensor(number, device=device)
    if is_distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def check_on_every_rank(check: Callable[[], None], device: torch.device) -> None:
    """Call a check in every process, and raise a ValueError in all of them if it does so in one.

    Otherwise those that passed it would wait for the others at the next sum.

    Args:
        check: Called without arguments.
        device: The device of the training.

    Raises:
        ValueError: The check's own, or one that says that another process refused.
    """
    error = None
    try:
        check()
    except ValueError as caught:
        error = caught
    if is_distributed():
        refused = torch.tensor(int(error is not None), device=device)
        add_over_ranks(refused)
        if error is None and int(refused):
            error = ValueError(f'{int(refused)} other processes refused their batch: their errors say why.')
    if error is not None:
        raise error


def solve_on_rank_0(function: Callable[[], T], device: torch.device | None = None) -> T:
    """Call a function on rank 0 only, and return its result, or raise its error, in every process.

    Rank 0 raises an error only after it has told the other processes, which would otherwise wait forever.

    Args:
        function: Called without arguments on rank 0. Its result must be picklable.
        device: The device of the training, from which NCCL sends. Default: the current one.

    Returns:
        The result of the function.

    Raises:
        Exception: The error of the function, in every process. Where it cannot be pickled, and where rank 0 was stopped
            (KeyboardInterrupt, SystemExit), the other processes raise a RuntimeError that names it.
    """
    if not is_distributed():
        return function()
    message, result, error = b'', None, None
    if rank() == 0:
        try:
            result = function()
            message = pickle.dumps((result, None))
        except BaseException as caught:
            error, message = caught, pickle.dumps((None, _as_told(caught)))
    received, told = pickle.loads(_broadcast(message, device))
    if error is not None:
        raise error
    if told is not None:
        raise told
    return result if rank() == 0 else received


def _broadcast(message: bytes, device: torch.device | None) -> bytes:
    """Return the message of rank 0 in every process."""
    messages: list[Any] = [message]
    dist.broadcast_object_list(messages, src=0, device=device if device is not None and device.type == 'cuda' else None)
    return messages[0]


def _as_told(error: BaseException) -> Exception:
    """Return the exception that the other processes raise for one of rank 0."""
    if isinstance(error, Exception):
        try:
            # Many classes of exceptions are pickled without complaint, and cannot be made again of what was pickled.
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            pass
    return RuntimeError(f'rank 0 was ended by {type(error).__name__}: {error}')
