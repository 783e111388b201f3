"""The arguments of `AssignmentScheduler` for the library's recipes by their words.

`placed` moves each class's prototype with its class through a warm-up, `even` rotates the evenly spread set once,
`paper` has no warm-up and the paper's class means.
"""
from typing import Any

from timm_dl2pa.recipes import RECIPES

__all__ = ['RECIPES', 'scheduler_arguments']


def scheduler_arguments(
        recipe: str | None = None, epochs: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of `AssignmentScheduler` for a recipe.

    Args:
        recipe: 'placed', 'even' or 'paper'. Default: the head's.
        epochs: Length of the training, which the length of a warm-up may refer to.
        options: More arguments, as a command line gives them; they come last.
    """
    arguments: dict[str, Any] = {} if recipe is None else {'recipe': recipe}
    if epochs is not None:
        arguments['total'] = f'{epochs} epochs'
    return {**arguments, **(options or {})}
