"""Prototypes of very many classes stay out of DistributedDataParallel's broadcasts."""
import warnings

import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from .module import DL2PAHead
from .sampling import MANY_CLASSES

__all__ = ['leave_out_of_broadcasts']

# Where DistributedDataParallel looks for names (`_set_params_and_buffers_to_ignore_for_model`).
_LEFT_OUT = '_ddp_params_and_buffers_to_ignore'
_BUFFERS = ('prototypes', 'assignment', 'averaged_assignment')
# What torch.compile puts before the names of a module.
_COMPILED = '_orig_mod.'


def leave_out_of_broadcasts(model: nn.Module) -> None:
    """Let DistributedDataParallel leave out the prototypes of very many classes; warn if it is too late for that.

    It sends all buffers of rank 0 before each forward, 512 MB for a million classes in 128 dimensions, although every
    process moves the prototypes alike. The scheduler sends them, at its first step and at the end of a warm-up; without
    a scheduler every process must load the same ones. With up to 8,192 classes nothing changes.

    Args:
        model: A model or head, which is put into DistributedDataParallel later, or is inside it.
    """
    heads = {path: module for path, module in model.named_modules() if isinstance(module, DL2PAHead)}
    many = {path: head for path, head in heads.items() if head.num_classes > MANY_CLASSES}
    if isinstance(model, DistributedDataParallel):
        sent = {id(buffer) for buffer in model.modules_buffers} if model.broadcast_buffers else ()
        for head in many.values():
            if id(head.prototypes) in sent:
                warnings.warn(f'DistributedDataParallel sends all {len(head.prototypes)} prototypes before each '
                              f'forward. Make the AssignmentScheduler before DistributedDataParallel, which then '
                              f'leaves them out, or give it broadcast_buffers=False.', stacklevel=3)
        return
    before = getattr(model, _LEFT_OUT, [])
    names = [name for name in before if name.rpartition('.')[2] not in _BUFFERS]
    for path in many:
        own = [f'{path}.{name}'.lstrip('.') for name in _BUFFERS]
        names += own + [_COMPILED + name for name in own]
    if names or before:
        setattr(model, _LEFT_OUT, names)
