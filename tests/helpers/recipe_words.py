"""The recipes by their words, as arguments."""
from typing import Any

RECIPES = ('placed', 'even', 'paper')


def scheduler_arguments(recipe: str, warmup: int) -> dict[str, Any]:
    """Return the arguments of `AssignmentScheduler`, with a warm-up of so many batches where the recipe has one."""
    return {'recipe': recipe, 'warmup_length': warmup}


def plugin_options(recipe: str) -> dict[str, Any]:
    """Return the dl2pa_... options of `timm.create_model`."""
    return {'dl2pa_recipe': recipe}
