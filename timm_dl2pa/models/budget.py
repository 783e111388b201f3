"""BuildBudget: bounds the work of making a model by arguments that somebody else wrote."""
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ['BuildBudget']

# timm's models make 33 calls of torch functions for each of their tensors at most (MaxViT), and most make 12.
_CALLS_PER_TENSOR = 100
_MORE_CALLS = 10_000
# Where there are no weights to count: more tensors than timm's largest models have.
_DEFAULT_TENSORS = 4_000
# The largest tensors beside the weights, lists of rates of stochastic depth, have some dozens of numbers.
_MAX_NUMBERS = 10 ** 6
_FACTORIES = (torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros)


class BuildBudget(TorchFunctionMode):
    """Context manager for making a model on the meta device, in this thread, that stops where it becomes too much.

    On that device tensors of any size take no memory. But a config of a hundred bytes can ask for a million layers,
    whose modules take hours and gigabytes.

    Args:
        num_tensors: The number of tensors that the model should have. Default: that of timm's largest models.

    Raises:
        ValueError: Within the context: the model would have far more tensors, or a tensor in memory is huge.

    Example:
        >>> with BuildBudget(100), torch.device('meta'):
        ...     model = timm.create_model('resnet18')
    """

    def __init__(self, num_tensors: int | None = None):
        super().__init__()
        self.num_tensors = _DEFAULT_TENSORS if num_tensors is None else num_tensors
        self.calls_left = _CALLS_PER_TENSOR * self.num_tensors + _MORE_CALLS

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Count a call, and make it."""
        kwargs = kwargs or {}
        self.calls_left -= 1
        if self.calls_left < 0:
            raise ValueError(f'far more is being made than the {self.num_tensors} tensors that there are')
        device = kwargs.get('device')
        if func in _FACTORIES and device is not None and torch.device(device).type != 'meta':
            numbers = func(*args, **{**kwargs, 'device': 'meta', 'pin_memory': False}).numel()
            if numbers > _MAX_NUMBERS:
                raise ValueError(f'a tensor of {numbers} numbers is being made beside the weights')
        return func(*args, **kwargs)
