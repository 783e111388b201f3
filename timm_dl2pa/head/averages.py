"""Averages of a head (EMA, SWA): what was averaged number by number becomes a head again, or is refused."""
import torch
import torch.nn as nn

from ..assignment import check_assignment
from ..prototypes import check_prototypes

__all__ = ['buffer_stamps', 'copy_class_vectors', 'digits_of', 'settle_average']

_WATCHED = ('prototypes', 'assignment', 'averaged_assignment')
# Of the digits of the assignment's numbers: up to 64^4, 16.8 million prototypes.
_BASE, _PLACES = 64, 4
# An average of equal digits is off by up to 64 * 2^-24 / (1 - decay) where each term is rounded: 0.04 for 0.9999.
_ROUNDING = 0.1
# Averaged prototypes shorter than this have cancelled each other out: they have no direction.
_SHORTEST = 1e-3
_REMEDY = ('Copy the buffers in place of averaging them (AveragedModel(..., use_buffers=False), and '
           'torch.optim.swa_utils.update_bn for batch norm), or average only while labels stay.')


def buffer_stamps(head: nn.Module) -> tuple[int, ...]:
    """Return numbers that change when somebody writes into the head's buffers. Reads no values."""
    buffers = [head._buffers[name] for name in _WATCHED]
    return () if any(buffer.is_inference() for buffer in buffers) else tuple(buffer._version for buffer in buffers)


def digits_of(assignment: torch.Tensor) -> torch.Tensor:
    """Return the digits (4, C) float32, to the base 64, of an assignment (C,); the lowest first."""
    return torch.stack([assignment // _BASE ** place % _BASE for place in range(_PLACES)]).float()


def _number_of(digits: torch.Tensor) -> torch.Tensor:
    return sum(digits[place].round().long() * _BASE ** place for place in range(_PLACES))


@torch.no_grad()
def settle_average(head: nn.Module) -> bool:
    """Make a head whose buffers were averaged a head again, in place. Waits for the device.

    Some averages go over all buffers, and average the assignment as numbers, which become others by rounding. The
    buffer `averaged_assignment` holds their digits in float32: averages of equal ones stay near them. Prototypes that
    moved during a warm-up have averages inside the sphere, and are divided by their lengths.

    Args:
        head: A DL2PAHead.

    Returns:
        Whether prototypes were changed.

    Raises:
        ValueError: The average is one of different assignments, or prototypes are not finite or have no direction.
    """
    assignment, averaged = head.assignment, head.averaged_assignment
    stamps = buffer_stamps(head)
    # A copy of the state dict, as of timm's EMA, leaves alone the buffer that is no part of it.
    was_averaged = bool(stamps) and stamps[2] != head._stamps[2]
    if was_averaged and averaged.dtype == torch.float32 and not torch.equal(averaged, digits_of(assignment)):
        if not bool(((averaged - averaged.round()).abs() < _ROUNDING).all()):
            raise ValueError(f'this head is an average of heads with different assignments, which has no meaning. '
                             f'{_REMEDY}')
        numbers = _number_of(averaged)
        check_assignment(numbers, len(numbers), len(head.prototypes))
        assignment.copy_(numbers)
    check_assignment(assignment, len(assignment), len(head.prototypes))
    averaged.copy_(digits_of(assignment))
    moved = _settle_prototypes(head.prototypes)
    head._stamps = buffer_stamps(head)
    return moved


def _settle_prototypes(prototypes: torch.Tensor) -> bool:
    """Divide prototypes by their lengths, if these are not 1, and return whether they were not."""
    lengths = torch.linalg.vector_norm(prototypes.float(), dim=1, keepdim=True)
    # Half-precision copies, as FSDP makes them, have lengths of their own.
    tolerance = 1e-5 if prototypes.dtype == torch.float32 else 4e-3
    if not bool(((lengths - 1).abs() > tolerance).any()) and bool(lengths.isfinite().all()):
        return False
    if not bool(torch.isfinite(prototypes).all()):
        check_prototypes(prototypes)  # names the row
    row = int(lengths.argmin())
    if float(lengths[row]) < _SHORTEST:
        raise ValueError(f'this head is an average of heads whose prototypes cancel each other out: row {row} has the '
                         f'length {float(lengths[row]):.3g}. {_REMEDY}')
    prototypes.div_(lengths)
    return True


@torch.no_grad()
def copy_class_vectors(head: nn.Module, average: nn.Module) -> None:
    """Copy prototypes, assignment and a fixed scale into an average of a head, where averages of them have no meaning.

    Args:
        head: A DL2PAHead in training.
        average: A copy of it, whose buffers somebody averages.
    """
    for name in (*_WATCHED, 'scale'):
        if name in head._buffers:
            average._buffers[name].copy_(head._buffers[name])
    average._stamps = buffer_stamps(average)
    average.config = head.config
