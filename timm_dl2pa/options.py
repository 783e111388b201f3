"""The one table of options: what a person may set of a head and of its training.

The dl2pa_... options of `create_model`, `--model-kwargs`, YAML files and `timm-dl2pa run` are made from it, and so are
the kinds of the values in saved configs and the table in the documentation. The signatures of `wrap_dl2pa`, `DL2PAHead`
and `AssignmentScheduler` are checked against it by a test.
"""
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args

from .recipes import DEFAULT_RECIPE, RECIPES, LossName, NeckName, Recipe, RecipeName, WarmupName, find_recipe
from .values import checked_value, shown

__all__ = ['KINDS', 'LOSSES', 'PREFIX', 'PluginOptions', 'named_as_options', 'names_of']

PREFIX = 'dl2pa_'
LOSSES: tuple[str, ...] = get_args(LossName)
# Those that depend on the scale, and not on the target's cosine alone.
SCALED_LOSSES = ('criterion', 'sampled_cross_entropy', 'balanced_softmax')


# What a number must be, and a function that says whether it is that. NaN is none of these.
_Range = tuple[str, Callable[[float], bool]]
_AT_LEAST_0: _Range = ('at least 0', lambda number: 0 <= number < 2 ** 63)
_AT_LEAST_1: _Range = ('at least 1', lambda number: 1 <= number < 2 ** 63)
_FINITE: _Range = ('at least 0 and finite', lambda number: 0 <= number < math.inf)
_POSITIVE: _Range = ('above 0 and finite', lambda number: 0 < number < 1e30)
_SHARE: _Range = ('from 0 to 1', lambda number: 0 <= number <= 1)
_SHARE_BELOW_1: _Range = ('from 0 to below 1', lambda number: 0 <= number < 1)
# No text is longer, but paths.
_LONGEST_TEXT = 100


def _option(scope: str, default: Any, kinds: tuple[type, ...], help: str, choices: tuple[str, ...] = (),
            limits: _Range | None = None) -> Any:
    return field(default=default, metadata={'scope': scope, 'kinds': kinds, 'help': help, 'choices': choices,
                                            'limits': limits})


def _checked(spec: Field, value: Any) -> Any:
    """Return a value of an option as a plain one, or raise a ValueError with the name, the value and the remedy."""
    name, metadata = PREFIX + spec.name, spec.metadata
    remedy = 'Leave it out for the default' + ('.' if spec.default is None else f', {spec.default}.')
    try:
        value = checked_value(name, value, metadata['kinds'])
    except ValueError as error:
        raise ValueError(f'{error} {remedy}') from None
    if metadata['choices'] and value not in metadata['choices']:
        raise ValueError(f'{name} must be one of {", ".join(metadata["choices"])}, not {shown(value)}. {remedy}')
    if isinstance(value, str) and len(value) > _LONGEST_TEXT and spec.name != 'prototypes':
        raise ValueError(f'{name} must have at most {_LONGEST_TEXT} characters, not {len(value)}. {remedy}')
    if metadata['limits'] and not isinstance(value, str):
        text, is_in_range = metadata['limits']
        if not is_in_range(value):
            raise ValueError(f'{name} must be {text}, not {shown(value)}. {remedy}')
    return value


@dataclass(frozen=True)
class PluginOptions:
    """What a person may set of the head and of its training in a script of timm's. Each name has the prefix dl2pa_.

    The metadata of a field are its row of the table: `scope` ('head' for arguments of `wrap_dl2pa`, 'scheduler' for
    those of `AssignmentScheduler`, 'script' for what the plugin alone has), `kinds`, `help`, `choices` and `limits`.

    Raises:
        ValueError: A value has the wrong type, is not one of the choices, or is out of range. What depends on the model
            and on other options is checked by what the values are for.
    """
    recipe: RecipeName = _option('head', DEFAULT_RECIPE, (str,), 'placed (prototypes move with their classes for 90 % '
                                 'of the training), even (the evenly spread set, rotated once) or paper (the '
                                 'published method); sets warm-up, loss, neck and scale', tuple(RECIPES))
    dim: int = _option('head', 128, (int,), 'd, the dimension of the embeddings', limits=_AT_LEAST_1)
    num_prototypes: int | None = _option('head', None, (int,), 'K, at least the number of classes (default: that '
                                         'number)', limits=_AT_LEAST_1)
    prototypes: str | None = _option('head', None, (str,), 'a safetensors file of prototypes, as `timm-dl2pa '
                                     'prototypes --out` writes it (default: made with the seed)')
    neck: NeckName | None = _option('head', None, (str,), "linear, linear_bn or none (default: the recipe's)",
                                   get_args(NeckName))
    scale: float | None = _option('head', None, (int, float), 'a fixed factor on the cosines in the logits (default: '
                                  'learned, or by the number of classes)', limits=_POSITIVE)
    learn_scale: bool | None = _option('head', None, (bool,), "make the scale a parameter (default: the recipe's, if "
                                       'no scale is given and the loss depends on it)')
    seed: int = _option('head', 0, (int,), 'of the prototypes', limits=_AT_LEAST_0)
    loss: LossName | None = _option('script', None, (str,), "criterion (the script's own, on the logits), "
                                    "squared_cosine, sampled_cross_entropy (for very many classes), dot_regression or "
                                    "balanced_softmax (both for long tails), which take its place (default: the "
                                    "recipe's)", LOSSES)
    loss_weight: float | None = _option('script', None, (int, float), "factor on squared_cosine and dot_regression "
                                        "(default: the recipe's or the loss's own)", limits=_POSITIVE)
    num_sampled: int | None = _option('script', None, (int,), 'number of classes that sampled_cross_entropy samples '
                                      "for a batch (default: the loss's own)", limits=_AT_LEAST_1)
    class_weights: Literal['auto'] | None = _option(
        'script', None, (str,), 'auto: weigh each class in the loss by the inverse of its number of samples (default: '
        'all classes weigh the same)', ('auto',))
    interval: int | str = _option('scheduler', 'epoch', (int, str), "re-solve after each 'epoch', or after so many "
                                  "batches, or 'every:until,every' batches, e.g. 100:1000,1000", limits=_AT_LEAST_1)
    warmup: WarmupName | None = _option('scheduler', None, (str,), "placed, rotated or none (default: the recipe's)",
                                        get_args(WarmupName))
    warmup_length: int | str | None = _option('scheduler', None, (int, str), "a number of batches, '5 epochs', half or "
                                              "30% of the training (default: the recipe's)", limits=_AT_LEAST_1)
    evenness: float | None = _option('scheduler', None, (int, float), 'how strongly prototypes are kept apart while '
                                     'they are placed, at least 0 (default: 0.4 (d / C)^2, at most 0.4)',
                                     limits=_FINITE)
    start: int = _option('scheduler', 0, (int,), 'no re-solve before so many epochs, or batches', limits=_AT_LEAST_0)
    stop: int | None = _option('scheduler', None, (int,), 'none after so many; 0 keeps the assignment static (default: '
                               'never stops)', limits=_AT_LEAST_0)
    momentum: float | None = _option('scheduler', None, (int, float), "factor on the class sums after each re-solve "
                                     "(default: the recipe's)", limits=_SHARE)
    min_gain: float = _option('scheduler', 0.0, (int, float), 'least gain in the objective, as a share of it, below '
                              'which nothing moves', limits=_SHARE_BELOW_1)
    background: bool = _option('scheduler', False, (bool,), 'solve beside the training, and take the answer some '
                               'batches later')
    lag: int = _option('scheduler', 16, (int,), 'how many batches later', limits=_AT_LEAST_1)
    prime: int = _option('script', 0, (int,), 'number of batches at the start that are not trained on, but set '
                         'assignment and neck by a pretrained backbone; takes the place of the warm-up',
                         limits=_AT_LEAST_0)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is not None or spec.default is not None:
                object.__setattr__(self, spec.name, _checked(spec, value))
        recipe = self.recipe_parts
        if self.loss is None:
            object.__setattr__(self, 'loss', recipe.loss)
        if self.loss in SCALED_LOSSES and self.loss_weight is not None:
            raise ValueError(f'{PREFIX}loss_weight is a factor on squared_cosine and dot_regression: it has no meaning '
                             f'with {PREFIX}loss={self.loss!r}.')
        if self.loss != 'sampled_cross_entropy' and self.num_sampled is not None:
            raise ValueError(f'{PREFIX}num_sampled is for {PREFIX}loss=sampled_cross_entropy: it has no meaning with '
                             f'{PREFIX}loss={self.loss!r}.')

    @property
    def recipe_parts(self) -> Recipe:
        """What the recipe sets."""
        return find_recipe(self.recipe)

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> 'PluginOptions | None':
        """Remove the dl2pa_... entries from `arguments` and return them; None if there are none.

        Raises:
            ValueError: One of them is unknown, or its value is no good.
        """
        given = {name: arguments.pop(name) for name in list(arguments) if name.startswith(PREFIX)}
        return cls.from_mapping(given) if given else None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> 'PluginOptions':
        """Return the options of a mapping from dl2pa_... names.

        Raises:
            ValueError: One of them is unknown, or its value is no good.
        """
        known = [PREFIX + spec.name for spec in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise ValueError(f'{", ".join(unknown)}: no such option. There are {", ".join(known)}.')
        return cls(**{name[len(PREFIX):]: value for name, value in given.items()})

    def head_arguments(self) -> dict[str, Any]:
        """Return those that `wrap_dl2pa` takes. The scale is learned only where the loss depends on it."""
        arguments = {name: getattr(self, name) for name in names_of('head')}
        if self.learn_scale is None and self.loss not in SCALED_LOSSES:
            arguments['learn_scale'] = False
        return arguments

    def scheduler_arguments(self) -> dict[str, Any]:
        """Return those that `AssignmentScheduler` takes."""
        return {name: getattr(self, name) for name in names_of('scheduler')}

    def loss_arguments(self) -> dict[str, Any]:
        """Return the arguments of a loss of this package: the recipe's where it is the recipe's loss."""
        recipe = self.recipe_parts
        given = {'weight': self.loss_weight, 'num_sampled': self.num_sampled}
        return {**(recipe.loss_arguments if self.loss == recipe.loss else {}),
                **{name: value for name, value in given.items() if value is not None}}


@contextmanager
def named_as_options() -> Iterator[None]:
    """Context manager for what takes values of options: an error that begins with the name of one gets the prefix.

    Raises:
        ValueError: With the name of the option as it was given.
    """
    try:
        yield
    except ValueError as error:
        name = re.match(r'\w*', str(error))[0]
        if name in (spec.name for spec in fields(PluginOptions)):
            raise ValueError(f'{PREFIX}{error}') from error
        raise


def names_of(scope: str) -> tuple[str, ...]:
    """Return the names of the options of a scope, without the prefix."""
    return tuple(spec.name for spec in fields(PluginOptions) if spec.metadata['scope'] == scope)


# Of the values of a head's config, in a JSON file: those of the table, and what only a made head has.
KINDS: dict[str, tuple[type, ...]] = {
    'in_features': (int,), 'num_classes': (int,), 'train_output': (str,), 'own_prototypes': (bool,),
    'pinned': (bool,),
    'held_scale': (float, type(None)),
    **{spec.name: spec.metadata['kinds'] for spec in fields(PluginOptions) if spec.metadata['scope'] == 'head'},
}
