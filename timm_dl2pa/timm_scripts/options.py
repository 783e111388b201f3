"""The dl2pa_... options: one table for `create_model`, `--model-kwargs`, YAML files and `timm-dl2pa run`."""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..head.head import NECKS
from ..scheduling.placement import check_evenness

__all__ = ['LOSSES', 'PREFIX', 'PluginOptions']

PREFIX = 'dl2pa_'
LOSSES = ('criterion', 'squared_cosine', 'dot_regression', 'balanced_softmax')
# Those that depend on the logits, and so on their scale, and not on the target's cosine alone.
LOGIT_LOSSES = ('criterion', 'balanced_softmax')


def _option(default: Any, kinds: tuple[type, ...], help: str) -> Any:
    return field(default=default, metadata={'kinds': kinds, 'help': help})


@dataclass(frozen=True)
class PluginOptions:
    """What a person may set of the head and of its training in a script of timm's. Each name has the prefix dl2pa_.

    Raises:
        ValueError: A value has the wrong type, or names no loss. Ranges are checked by what the values are for.
    """
    dim: int = _option(128, (int,), 'd, the dimension of the embeddings (default: 128)')
    num_prototypes: int | None = _option(None, (int,), 'K, at least the number of classes (default: that number)')
    prototypes: str | None = _option(None, (str,), 'a safetensors file of prototypes, as `timm-dl2pa prototypes --out` '
                                                   'writes it (default: made with the seed)')
    neck: str = _option('linear_bn', (str,), f'one of {", ".join(NECKS)} (default: linear_bn)')
    scale: float | None = _option(None, (int, float), 'factor on the cosines in the logits, which then is fixed '
                                                      '(default: learned, or by the number of classes)')
    learn_scale: bool | None = _option(None, (bool,), "make the scale a parameter (default: with the script's own "
                                                      'loss, if no scale is given)')
    seed: int = _option(0, (int,), 'of the prototypes (default: 0)')
    loss: str = _option('criterion', (str,), "criterion (the script's own, on the logits), squared_cosine, "
                                             'dot_regression or balanced_softmax (both for long tails), which take '
                                             'its place (default: criterion)')
    loss_weight: float | None = _option(None, (int, float), "factor on our losses (default: the loss's own, 30 and 1)")
    interval: int | str = _option('epoch', (int, str), "re-solve after each 'epoch', or after so many batches, or "
                                                       "'every:until,every' batches, e.g. 100:1000,1000 (default: "
                                                       'epoch)')
    start: int = _option(0, (int,), 'no re-solve before so many epochs, or batches (default: 0)')
    stop: int | None = _option(None, (int,), 'none after so many; 0 keeps the assignment static (default: never stops)')
    momentum: float = _option(0.5, (int, float), 'factor on the class sums after each re-solve (default: 0.5)')
    min_gain: float = _option(0.0, (int, float), 'least gain in the objective, as a share of it, below which nothing '
                                                 'moves (default: 0)')
    background: bool = _option(False, (bool,), 'solve beside the training, and take the answer some batches later '
                                               '(default: training waits)')
    lag: int = _option(16, (int,), 'how many batches later (default: 16)')
    warmup_epochs: int | None = _option(None, (int,), "epochs in which the prototypes are placed, and after which "
                                                      "labels alone move; 0 is the paper's rule (default: half of the "
                                                      "script's epochs; 1 with evenness inf)")
    evenness: float | str | None = _option(None, (int, float, str), 'how strongly they are kept apart while they are '
                                                                    'placed, at least 0; inf: the evenly spread set is '
                                                                    'only rotated as a whole (default: (2 d / C)^2, '
                                                                    'at most 4)')
    prime: int = _option(0, (int,), 'number of batches at the start that are not trained on, but set assignment and '
                                    'neck by a pretrained backbone; takes the place of the warm-up (default: 0)')

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, kinds = getattr(self, spec.name), spec.metadata['kinds']
            if value is None and spec.default is None:
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                expected = ' or '.join(kind.__name__ for kind in kinds)
                raise ValueError(f'{PREFIX}{spec.name} must be {expected}, not {value!r}.')
        if self.loss not in LOSSES:
            raise ValueError(f'{PREFIX}loss must be one of {", ".join(LOSSES)}, not {self.loss!r}.')
        if isinstance(self.evenness, str):
            # --model-kwargs knows no literal for infinity.
            if self.evenness != 'inf':
                raise ValueError(f"{PREFIX}evenness must be a number or 'inf', not {self.evenness!r}.")
            object.__setattr__(self, 'evenness', math.inf)
        if self.evenness is not None:
            check_evenness(self.evenness, f'{PREFIX}evenness')
        for name in ('warmup_epochs', 'prime'):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f'{PREFIX}{name} must be at least 0, not {getattr(self, name)}.')
        if self.loss in LOGIT_LOSSES and self.loss_weight is not None:
            raise ValueError(f'{PREFIX}loss_weight is for our losses: it has no meaning with '
                             f'{PREFIX}loss={self.loss!r}.')

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
        known = [PREFIX + spec.name for spec in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise ValueError(f'{", ".join(unknown)}: no such option. There are {", ".join(known)}.')
        return cls(**{name[len(PREFIX):]: value for name, value in given.items()})

    def head_arguments(self) -> dict[str, Any]:
        """Return those that `wrap_dl2pa` takes."""
        names = ('dim', 'num_prototypes', 'prototypes', 'neck', 'scale', 'seed')
        learn_scale = self.learn_scale
        if learn_scale is None:
            learn_scale = self.loss in LOGIT_LOSSES and self.scale is None
        return {**{name: getattr(self, name) for name in names}, 'learn_scale': learn_scale}
