"""What an AssignmentScheduler refuses: unfit heads, numbers out of range, states that are not its own."""
import warnings
from typing import Any

import torch
import torch.nn as nn

from ..head import DL2PAHead, left_out_by_peft
from ..head.config import check_scale
from ..values import checked_value, real_number, whole_number

__all__ = ['check_heads', 'check_numbers', 'check_same_classes', 'check_scheduler_state', 'settled_by_pinned']


def check_heads(model: nn.Module, heads: list[DL2PAHead]) -> list[DL2PAHead]:
    """Return the heads of a model, or raise a ValueError unless there are some, which can share an assignment."""
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    for other in heads[1:]:
        if other.num_classes != heads[0].num_classes or not torch.equal(other.prototypes, heads[0].prototypes):
            raise ValueError('the DL2PA heads of the model differ in classes or prototypes, so that they cannot '
                             'share an assignment: make a scheduler for each head.')
    left_out = left_out_by_peft(model)
    if left_out:
        warnings.warn(f'PEFT will not save the DL2PAHead {left_out[0]!r}, whose prototypes and assignment change in '
                      f'training: give its name to the adapter, '
                      f"modules_to_save=['{left_out[0].rpartition('.')[2]}'].", stacklevel=3)
    return heads


def check_numbers(start: int, stop: int | None, momentum: float, ignore_index: int
                  ) -> tuple[int, int | None, float, int]:
    """Return the numbers as Python's, or raise a ValueError if one is out of range."""
    return (whole_number('start', start, least=0),
            None if stop is None else whole_number('stop', stop, least=0, remedy='None never stops.'),
            real_number('momentum', momentum, 0, 1),
            whole_number('ignore_index', ignore_index))


def settled_by_pinned(head: DL2PAHead, warmup: str | None, stop: int | None) -> tuple[str | None, int | None]:
    """Return warm-up and stop as they were given; of a head that is pinned, those that let nothing move.

    Raises:
        ValueError: The head is pinned, and a warm-up or re-solves were asked for.
    """
    if not head.config.pinned:
        return warmup, stop
    for name, value in (('warmup', None if warmup == 'none' else warmup), ('stop', stop or None)):
        if value is not None:
            raise ValueError(f'{name}={value!r} would change prototypes or assignment, and those of this head are '
                             f'pinned, as wrap_dl2pa(head=...) does: its embeddings stay comparable with those of the '
                             f'model that the head is from. Leave {name} out; or, if nothing is to be compared, wrap '
                             f'with pinned=False (a wrapped model: wrap_dl2pa(model, head=model, pinned=False)).')
    return 'none', 0


def check_same_classes(head: DL2PAHead, num_classes: int) -> None:
    """Raise a RuntimeError if a head has got classes since a scheduler of C classes was made."""
    if head.num_classes != num_classes:
        raise RuntimeError(f'the model has {head.num_classes} classes, and this AssignmentScheduler was made when it '
                           f'had {num_classes}: make a new one after add_classes.')


def check_scheduler_state(own: dict[str, Any], state: dict[str, Any], **parts: Any) -> None:
    """Raise a ValueError unless a state is complete and fits the parts of the scheduler that is to go on from it.

    Args:
        own: That scheduler's state now.
        state: The saved one.
        parts: Class means, resolver and warm-up by their keys in the state, each with a `check_state`. A warm-up that
            is None belongs to a scheduler, or a state, that has none.
    """
    differ = sorted(own.keys() ^ state.keys())
    if differ:
        raise ValueError(f'the saved state of the scheduler lacks, or does not know, {", ".join(differ)}.')
    scales = checked_value('held_scales', state['held_scales'], list)
    if len(scales) != len(own['held_scales']):
        raise ValueError(f'the saved state is of a model with {len(scales)} DL2PA heads, not '
                         f'{len(own["held_scales"])}.')
    for scale in scales:
        if scale is not None:
            check_scale(real_number('held_scales', scale))
    for name, part in parts.items():
        if part is not None:
            part.check_state(state[name])
        elif state[name] is not None:
            raise ValueError(f"the saved state is of the warm-up {state[name].get('name')!r}, and this scheduler has "
                             f'none: make it with the recipe that it was saved with.')
