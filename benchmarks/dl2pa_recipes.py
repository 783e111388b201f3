"""The library's recipes by their words, and the arguments that stand for each today.

`placed` moves each class's prototype with its class through a warm-up, `even` rotates the evenly spread set once,
`paper` has no warm-up. This is the one place of the benchmarks that knows how a recipe is asked for.
"""
import math
from typing import Any

__all__ = ['RECIPES', 'scheduler_arguments']

RECIPES = ('placed', 'even', 'paper')


def scheduler_arguments(
        recipe: str | None = None, epochs: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of `AssignmentScheduler` for a recipe.

    Args:
        recipe: 'placed', 'even' or 'paper'. Default: what the options say, or else the library's default, 'placed'.
        epochs: Length of the training: prototypes are placed during its first half, as with the plugin. Default: the
            scheduler's own length.
        options: More arguments, as a command line gives them: they come last, and 'inf' stands for infinity.

    Raises:
        ValueError: There is no such recipe.
    """
    options = {name: math.inf if value == 'inf' else value for name, value in (options or {}).items()}
    if recipe is None:
        recipe = 'even' if options.get('evenness') == math.inf else 'placed'
    if recipe not in RECIPES:
        raise ValueError(f'recipe must be one of {", ".join(RECIPES)}, not {recipe!r}.')
    arguments: dict[str, Any] = {}
    if recipe == 'even':
        arguments['evenness'] = math.inf
    elif recipe == 'paper':
        arguments['warmup'] = 0
    elif epochs is not None:
        arguments['warmup'] = max(1, epochs // 2)
    return {**arguments, **options}
