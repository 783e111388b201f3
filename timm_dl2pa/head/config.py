"""DL2PAConfig: what a head is made from."""
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from ..options import KINDS
from ..prototypes import make_prototypes
from ..recipes import DEFAULT_RECIPE, NeckName, RecipeName, find_recipe
from ..values import checked_value, whole_number
from .neck import NECKS, neck_shapes

__all__ = ['DL2PAConfig', 'TrainOutput', 'check_scale', 'default_scale']

TrainOutput = Literal['logits', 'embeddings']
TRAIN_OUTPUTS: tuple[str, ...] = get_args(TrainOutput)

# Where a learned scale begins: low, so that young embeddings are not asked to be certain. It grows with training.
LEARNED_SCALE_START = 4.0
# Far beyond what a training gives. Outside, logits leave the range of the dtypes, or all classes are alike.
MIN_SCALE, MAX_SCALE = 1e-6, 1e6
MAX_LOG_SCALE = 14


def default_scale(num_classes: int) -> float:
    """Return the scale of the cosines that lets a perfect embedding reach the probability P = 0.9999.

    `(C - 1) / C * log((C - 1) P / (1 - P))`, the lower bound of CosFace (Wang et al. 2018, section 3.3) for class
    vectors spread as evenly as a simplex: 10.2 for 10 classes, 13.7 for 100, 16.1 for 1,000, 19.2 for 21,841.

    Args:
        num_classes: C, at least 2.

    Example:
        >>> round(default_scale(100), 1)
        13.7
    """
    num_classes, probability = whole_number('num_classes', num_classes, least=2), 0.9999
    return (num_classes - 1) / num_classes * math.log((num_classes - 1) * probability / (1 - probability))


def check_scale(scale: float, name: str = 'scale') -> None:
    """Check the factor on the cosines.

    Args:
        scale: The factor.
        name: What it is, for error messages.

    Raises:
        ValueError: It is not between `MIN_SCALE` and `MAX_SCALE`.
    """
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f'{name} must be between {MIN_SCALE:g} and {MAX_SCALE:g}, not {scale!r:.40}.')


@dataclass(frozen=True)
class DL2PAConfig:
    """What a head is made from: with the head's state dict, enough to build it again.

    Scalars of numpy and torch become Python's.

    Attributes:
        in_features: Number of backbone features.
        num_classes: C, at least 2.
        dim: d, the dimension of the embeddings.
        num_prototypes: K >= C; None means C.
        neck: 'linear', 'linear_bn' (batch norm after it) or 'none' (the features are the embedding); None means the
            recipe's.
        scale: Factor on the cosines; None means `default_scale(num_classes)`, or 4 to begin with where it is learned.
        learn_scale: Whether the scale is a parameter; None means the recipe's, where no scale is given and the head
            returns logits in training.
        train_output: What a head in training mode returns: 'logits' (B, C) or unit 'embeddings' (B, d).
        seed: Seed of the prototypes, and of a random first assignment, in 0..2^63 - 1.
        own_prototypes: Whether the prototypes were given or moved, rather than made from the seed (see
            `first_prototypes`).
        recipe: 'placed', 'even' or 'paper'.
        pinned: Whether prototypes and assignment stay as they are, because another model has them too: no warm-up
            changes them, no re-solve and no `prime`.
        held_scale: The learned scale that `prime` has set, which training leaves as it is; None where it is learned.

    Raises:
        ValueError: A value has the wrong type or is out of range, or two exclude each other.

    Example:
        >>> config = DL2PAConfig(in_features=512, num_classes=100, dim=50)
        >>> config.neck, config.learn_scale, config.num_prototypes
        ('linear_bn', True, 100)
    """
    in_features: int
    num_classes: int
    dim: int
    num_prototypes: int | None = None
    neck: NeckName | None = None
    scale: float | None = None
    learn_scale: bool | None = None
    train_output: TrainOutput = 'logits'
    seed: int = 0
    own_prototypes: bool = False
    recipe: RecipeName = DEFAULT_RECIPE
    pinned: bool = False
    held_scale: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                self._set(field.name, checked_value(field.name, value, KINDS[field.name]))
        recipe = find_recipe(self.recipe)
        for name, least in (('in_features', 1), ('num_classes', 2), ('dim', 1)):
            if getattr(self, name) < least:
                raise ValueError(f'{name} must be at least {least}, not {getattr(self, name)}.')
        if self.num_prototypes is None:
            self._set('num_prototypes', self.num_classes)
        if self.num_prototypes < self.num_classes:
            raise ValueError(f'num_prototypes must be at least num_classes={self.num_classes}, '
                             f'not {self.num_prototypes}.')
        if self.neck is None:
            self._set('neck', recipe.neck)
        if self.neck not in NECKS:
            raise ValueError(f'neck must be one of {", ".join(NECKS)}, not {self.neck!r}.')
        if self.neck == 'none' and self.dim != self.in_features:
            raise ValueError(f"neck='none' uses the features as the embedding, so dim must be their number, "
                             f"{self.in_features}, not {self.dim}.")
        if self.train_output not in TRAIN_OUTPUTS:
            raise ValueError(f'train_output must be one of {", ".join(TRAIN_OUTPUTS)}, not {self.train_output!r}.')
        if self.learn_scale is None:
            self._set('learn_scale', recipe.learn_scale and self.scale is None and self.train_output == 'logits')
        if self.scale is None:
            self._set('scale', LEARNED_SCALE_START if self.learn_scale else default_scale(self.num_classes))
        check_scale(self.scale)
        self._set('scale', float(self.scale))
        if self.held_scale is not None:
            check_scale(self.held_scale, 'held_scale')
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f'seed must be in 0..2^63 - 1, not {self.seed}.')

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def for_classes(self, num_classes: int, num_prototypes: int | None = None) -> 'DL2PAConfig':
        """Return the config of such a head for another number of classes.

        A scale that was the default for the number of classes becomes the new default. Prototypes are made from the
        seed, unless their number is given. They are not pinned, and the scale is not held.

        Args:
            num_classes: C.
            num_prototypes: Number of prototypes that are given; None means C new ones.
        """
        scale = None if self.scale == default_scale(self.num_classes) else self.scale
        return replace(self, num_classes=num_classes, num_prototypes=num_prototypes, scale=scale,
                       own_prototypes=num_prototypes is not None, pinned=False, held_scale=None)

    def first_prototypes(self) -> torch.Tensor:
        """Make the prototypes (K, d) float32 that a head of this config begins with, where none are given.

        They depend on K, d and the seed alone, and take about two seconds, whatever the number of classes:
        `make_prototypes(K, d, method='quick', seed=seed)`.
        """
        return make_prototypes(self.num_prototypes, self.dim, method='quick', seed=self.seed)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a head's state dict, without making one: a config may ask for any size."""
        neck = neck_shapes(self.neck, self.in_features, self.dim)
        return {'prototypes': (self.num_prototypes, self.dim), 'assignment': (self.num_classes,),
                **({'log_scale': (1,)} if self.learn_scale else {'scale': ()}),
                **{f'neck.{name}': shape for name, shape in neck.items()}}

    @classmethod
    def from_json(cls, given: dict[str, Any], where: str) -> 'DL2PAConfig':
        """Make a config of what a JSON file says.

        Args:
            given: Its values, every one of the config's.
            where: How to call the file in errors.

        Raises:
            ValueError: A value is missing, unknown, of the wrong type or out of range.
        """
        unknown = given.keys() ^ {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f'{where}: the head lacks, or does not know, {", ".join(sorted(unknown))}.')
        try:
            for name, value in given.items():
                checked_value(name, value, KINDS[name])  # None too, which a constructor takes for the default
            return cls(**given)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
