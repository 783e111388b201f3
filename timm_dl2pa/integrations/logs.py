"""log_update: writes what a re-solve did to TensorBoard, Weights & Biases or any other log."""
from collections.abc import Callable
from typing import Any

from ..distributed import rank
from ..scheduling import AssignmentUpdate

__all__ = ['log_update', 'values_of']

_LOGGED = ('moved', 'objective_before', 'objective', 'seconds', 'left_out')


def values_of(update: AssignmentUpdate) -> dict[str, float]:
    """Return the numbers of an update by the names that they have in a log: 'dl2pa/resolve/moved', for one.

    The end of a warm-up has its own name in the place of 'resolve'.
    """
    return {f'dl2pa/{update.event}/{name}': getattr(update, name) for name in _LOGGED}


def log_update(
        update: AssignmentUpdate | None,
        writer: Any | Callable[[dict[str, float], int], Any],
        step: int | None = None,
) -> None:
    """Write what a re-solve did to a log. In a distributed run rank 0 alone does.

    Args:
        update: What `AssignmentScheduler.step` returned. For None nothing is written.
        writer: A TensorBoard `SummaryWriter`; a run of wandb (what is logged joins the next row of the run, at whatever
            step that is); or a function of (values by name, step), such as `accelerator.log` of Accelerate and the
            `log_metrics` of a Lightning logger.
        step: Where on the log's axis. Default: the number of batches.

    Raises:
        TypeError: The writer is none of these.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> writer = SummaryWriter('logs')
        >>> log_update(scheduler.step(labels), writer)
    """
    write = _writing(writer)
    if update is not None and rank() == 0:
        write(values_of(update), update.step if step is None else step)


def _writing(writer: Any) -> Callable[[dict[str, float], int], Any]:
    """Return the function of (values, step) that a writer stands for."""
    if hasattr(writer, 'add_scalar'):
        return lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()]
    if hasattr(writer, 'define_metric') and hasattr(writer, 'log'):
        # The rows of a run are those of its owner, whose steps a row of our own would shift.
        return lambda values, step: writer.log({**values, 'dl2pa/step': step}, commit=False)
    if callable(writer):
        return writer
    raise TypeError(f'writer must be a SummaryWriter of TensorBoard, a run of wandb, or a function of (values, step), '
                    f'not {type(writer).__name__}.')
