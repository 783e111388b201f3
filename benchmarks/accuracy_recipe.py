"""What decides an accuracy run: the method, the network, the schedule, the seed; and sets of defaults for these."""
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dl2pa_recipes import RECIPES

__all__ = ['LOSSES', 'METHODS', 'SCHEDULES', 'SIZES', 'Recipe', 'learning_rate']

METHODS = ('softmax', 'cosine_softmax', 'static', 'etf', 'paper', 'dl2pa')
LOSSES = ('cross_entropy', 'balanced_softmax', 'squared_cosine', 'dot_regression')
# (epoch share, factor): the learning rate is multiplied by the factor of the last share that is over.
SCHEDULES = {
    'steps': ((0.5, 0.1), (0.8, 0.01)),  # the short recipe
    'paper': ((0.4, 0.1), (0.8, 0.01)),  # 250 epochs: at 100 and 200
    'paper_lt': ((0.8, 0.1), (0.9, 0.001)),  # 200 epochs: x 0.1 at 160, x 0.01 of that at 180
    'distiller': ((0.625, 0.1), (0.75, 0.01), (0.875, 0.001)),  # 240 epochs: at 150, 180 and 210
}
# RepDistiller's schedule, by which a plain softmax ResNet-32 reaches about 71 % on CIFAR-100.
_DISTILLER = dict(model='cifar_resnet32', lr=0.05, batch_size=64, schedule='distiller', warmup=0.0, weight_decay=5e-4)
SIZES = {
    'short': dict(model='cifar_resnet14', epochs=8, lr=0.1, schedule='steps', warmup=0.05),
    'paper': dict(model='cifar_resnet32', epochs=250, lr=0.01, schedule='paper', warmup=0.0, loss='squared_cosine',
                  loss_weight=128.0),
    'paper_lt': dict(model='cifar_resnet32', epochs=200, lr=0.1, schedule='paper_lt', warmup=0.025, weight_decay=2e-4,
                     loss='dot_regression', neck='linear_bn', mixup=1.0),
    'modern': dict(model='cifar_resnet32', epochs=250, lr=0.1, schedule='cosine', warmup=0.02, weight_decay=5e-4),
    'distiller': dict(**_DISTILLER, epochs=240),
    'distiller_100': dict(**_DISTILLER, epochs=100),  # the same shares of fewer epochs
}


@dataclass(frozen=True)
class Recipe:
    """All that decides a run, but for the data's place and the machine."""
    method: str = 'dl2pa'
    dim: int = 50
    loss: str = 'cross_entropy'
    model: str = 'cifar_resnet14'
    shortcut: str = 'conv3x3'
    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    schedule: str = 'steps'
    warmup: float = 0.05
    neck: str | None = None
    scale: float | None = None
    learn_scale: bool = False
    loss_weight: float | None = None
    imbalance: float | None = None
    mixup: float = 0.0
    classes: str = 'all'
    start_from: str | None = None
    validation: bool = False
    image_size: int | None = None
    precision: str = 'auto'
    seed: int = 3
    dl2pa_recipe: str | None = None
    dl2pa: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (('method', METHODS), ('loss', LOSSES), ('schedule', (*SCHEDULES, 'cosine')),
                            ('classes', ('all', 'first_half', 'second_half')),
                            ('precision', ('auto', 'float32', 'bfloat16')), ('dl2pa_recipe', (None, *RECIPES))):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(map(str, known))}, not {getattr(self, name)!r}.')
        if self.start_from not in (None, 'first_half') or self.start_from == self.classes:
            raise ValueError(f"start_from must be 'first_half' of other classes, not {self.start_from!r}.")
        if self.loss not in ('cross_entropy', 'balanced_softmax') and self.method.endswith('softmax'):
            raise ValueError(f'{self.method} takes cross_entropy or balanced_softmax, not {self.loss}.')
        if self.learn_scale and self.method != 'cosine_softmax':
            raise ValueError(f'learn_scale is for cosine_softmax, not for {self.method}: dl2pa decides for itself, and '
                             f'the others have none, or a fixed one.')
        if self.dl2pa_recipe and self.method != 'dl2pa':
            raise ValueError(f'dl2pa_recipe is for the method dl2pa, not for {self.method}.')

    def name(self) -> str:
        """Return the stem of the run's file: what differs from the defaults."""
        parts = [self.method, f'd{self.dim}']
        default = asdict(Recipe())
        for key, value in asdict(self).items():
            if key not in ('method', 'dim', 'seed') and value != default[key]:
                text = '-'.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else value
                parts.append(f'{key}={text}')
        return '_'.join([*parts, f's{self.seed}'])


def learning_rate(recipe: Recipe, share: float) -> float:
    """Return the learning rate when this share of the training is over."""
    if share < recipe.warmup:
        return recipe.lr * share / recipe.warmup
    if recipe.schedule == 'cosine':
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (share - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.lr * next((factor for over, factor in reversed(SCHEDULES[recipe.schedule]) if share >= over), 1.0)
