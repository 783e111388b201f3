"""register_scheduler: saves and loads an AssignmentScheduler with Accelerate's checkpoints."""
from accelerate import Accelerator

from ..scheduling import AssignmentScheduler

__all__ = ['register_scheduler']


def register_scheduler(accelerator: Accelerator, scheduler: AssignmentScheduler) -> None:
    """Let `accelerator.save_state` save a scheduler and `load_state` load it, in one process and in several.

    `accelerator.register_for_checkpointing(scheduler)` alone does for one process. In several, rank 0's state is saved,
    and the class sums of all must be added to it before.

    Args:
        accelerator: The accelerator.
        scheduler: Of the model, before or after `accelerator.prepare`.

    Raises:
        TypeError: `scheduler` is no AssignmentScheduler.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> scheduler = AssignmentScheduler(model, interval=len(loader), total=20 * len(loader))
        >>> register_scheduler(accelerator, scheduler)
    """
    if not isinstance(scheduler, AssignmentScheduler):
        raise TypeError(f'scheduler must be an AssignmentScheduler, not {type(scheduler).__name__}.')
    accelerator.register_for_checkpointing(scheduler)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: scheduler.merge())
