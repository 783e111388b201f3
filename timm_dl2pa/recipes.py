"""The three recipes: a word that sets warm-up, class means, loss, neck and scale together."""
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ['DEFAULT_RECIPE', 'RECIPES', 'LossName', 'NeckName', 'Recipe', 'RecipeName', 'WarmupName', 'find_recipe']

# The words of a recipe, for type checkers; what is made of them agrees with them by a test.
RecipeName = Literal['placed', 'even', 'paper']
NeckName = Literal['linear', 'linear_bn', 'none']
WarmupName = Literal['placed', 'rotated', 'none']
LossName = Literal['criterion', 'squared_cosine', 'dot_regression', 'sampled_cross_entropy', 'balanced_softmax']


@dataclass(frozen=True)
class Recipe:
    """What a recipe sets. Each part can still be given alone.

    Attributes:
        name: The word.
        neck: Kind of the head's neck.
        learn_scale: Whether the scale of the cosines is a parameter.
        loss: 'criterion' (the training's own, on the logits) or one of this package's losses.
        loss_arguments: Arguments of that loss.
        warmup: 'placed', 'rotated' or 'none'.
        warmup_length: Its length, as `Duration.of` reads it.
        momentum: Factor on the class sums after each re-solve.
        memory: Factor on a class's sum for each of its new samples; None: the sums are plain between re-solves.
        random_start: Whether the first assignment is random. Otherwise class c starts with prototype c.
    """
    name: RecipeName
    neck: NeckName = 'linear_bn'
    learn_scale: bool = True
    loss: LossName = 'criterion'
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    warmup: WarmupName = 'none'
    warmup_length: str = '90 %'
    momentum: float = 0.5
    memory: float | None = None
    random_start: bool = False


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    # Prototypes move with their classes for nine tenths of the training, then they are fixed: accuracy.
    Recipe(name='placed', warmup='placed'),
    # Evenly spread prototypes, rotated as a whole once and matched, then fixed: margins that are known.
    Recipe(name='even', warmup='rotated', warmup_length='1 epoch'),
    # DL2PA, section 3, to the letter: evenly spread prototypes that never move, a random first assignment, class means
    # as an exponential moving average with momentum 0.9, matching once an epoch, squared cosines summed over the batch.
    # It leaves out what belongs to the training: optimiser, learning rate, augmentation, and the long-tailed variant
    # (loss 'dot_regression' with the neck 'linear_bn').
    Recipe(
        name='paper',
        neck='linear',
        learn_scale=False,
        loss='squared_cosine',
        loss_arguments={'reduction': 'sum', 'weight': 1.0},
        momentum=1.0,
        memory=0.9,
        random_start=True,
    ),
)}

DEFAULT_RECIPE: RecipeName = 'placed'


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f'recipe must be one of {", ".join(RECIPES)}, not {name!r}.')
    return RECIPES[name]
