"""AssignmentUpdate: what changed in an assignment, and when."""
from dataclasses import dataclass

__all__ = ['AssignmentUpdate']


@dataclass(frozen=True)
class AssignmentUpdate:
    """What a re-solve, or the end of a warm-up, did.

    Attributes:
        step: Number of batches that had been folded in.
        epoch: Number of epochs that were over (by `epoch_end()`).
        moved: Number of classes that changed their prototype.
        objective_before: `sum_c <m_c, p_a(c)>` over the class means, under the assignment that was in force.
        objective: The same under the new one. After a re-solve it is the maximum.
        seconds: Time of the re-solve; of one in the background, beside the training.
        event: 'resolve', or for the end of a warm-up its name: 'placed' (prototypes stay where they are from now on)
            or 'rotated' (the prototypes were rotated as a whole, and matched).
        left_out: Number of samples since the update before that were left out, as not finite.

    Example:
        >>> update = AssignmentUpdate(step=100, epoch=1, moved=3, objective_before=61.0, objective=64.5, seconds=0.01)
        >>> update.event
        'resolve'
    """
    step: int
    epoch: int
    moved: int
    objective_before: float
    objective: float
    seconds: float
    event: str = 'resolve'
    left_out: int = 0
