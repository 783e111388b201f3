"""The recipes by their words, as arguments: the one place of these tests that knows how a recipe is asked for."""
import math
from typing import Any

RECIPES = ('placed', 'even', 'paper')


def scheduler_arguments(recipe: str, warmup: int) -> dict[str, Any]:
    """Return the arguments of `AssignmentScheduler`, with a warm-up of so many batches where the recipe has one."""
    return {'placed': {'warmup': warmup}, 'even': {'warmup': warmup, 'evenness': math.inf},
            'paper': {'warmup': 0}}[recipe]


def plugin_options(recipe: str) -> dict[str, Any]:
    """Return the dl2pa_... options of `timm.create_model`."""
    return {'placed': {}, 'even': {'dl2pa_evenness': 'inf'}, 'paper': {'dl2pa_warmup_epochs': 0}}[recipe]
