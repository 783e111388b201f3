"""The dtypes of a head's buffers, where another tool casts them past the module."""
import warnings

import torch
import torch.nn as nn

from ..prototypes import unit_rows
from .averages import digits_of

__all__ = ['restore_float32']


@torch.no_grad()
def restore_float32(head: nn.Module) -> None:
    """Bring back the dtypes of buffers that FSDP's mixed precision has cast, and warn that the prototypes are rounded.

    Prototypes and scale become float32; batch norm's statistics get the dtype of its parameters.

    Args:
        head: A DL2PAHead.
    """
    warnings.warn(f'the prototypes of a DL2PAHead were cast to {head.prototypes.dtype}, as by FSDP with '
                  f'MixedPrecision(buffer_dtype=...), and are rounded. They are float32 again. To keep them exact, '
                  f'leave buffer_dtype out.', stacklevel=3)
    head.prototypes.data = unit_rows(head.prototypes)
    head.averaged_assignment.data = digits_of(head.assignment)
    if not head.config.learn_scale:
        head.scale.data = torch.full_like(head.scale, head.config.scale, dtype=torch.float32)
    for layer in head.neck.modules():
        for buffer in layer.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.data = buffer.to(layer.weight.dtype)
