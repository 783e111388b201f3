"""wrap_dl2pa: a timm model with its classifier replaced."""
import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ..head import DL2PAConfig, DL2PAHead, heads_of, load_head
from ..options import PREFIX, names_of
from ..prototypes import make_prototypes
from ..recipes import DEFAULT_RECIPE

__all__ = ['replace_classifiers', 'wrap_dl2pa']


class RemovedLinear(nn.Identity):
    """Marks, in `DL2PAHead.before`, where the last linear layer of timm's classifier was."""


@dataclass(frozen=True)
class _Place:
    """Where one classifier of a model stands, and what its last linear layer was.

    Attributes:
        path: Of the module that timm's `reset_classifier(0)` takes away: here the head goes.
        linear: Path within it of the layer that has a row a class; '' if it is that layer itself.
        in_features: Of that layer.
        channels_first: Whether that layer is a 1x1 convolution.
        auxiliary: Whether `get_classifier()` leaves it out.
    """
    path: str
    linear: str
    in_features: int
    channels_first: bool
    auxiliary: bool


def _check_has_classifier(model: nn.Module) -> None:
    if not hasattr(model, 'get_classifier') or not hasattr(model, 'reset_classifier'):
        raise ValueError(f'model ({type(model).__name__}) has no get_classifier() and reset_classifier(): wrap_dl2pa '
                         f'takes a timm classification model. For another, put a DL2PAHead in its classifier\'s place.')


def _timms_classifiers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what timm calls the model's classifiers, the main one first."""
    waiting = [type(model).get_classifier(model)]
    while waiting:
        found = waiting.pop(0)
        if isinstance(found, nn.Module) and not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
            yield found
        elif found is not None:
            waiting[:0] = found.values() if isinstance(found, (dict, nn.ModuleDict)) else found


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its weights: every parameter and buffer is on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to('meta'), p.requires_grad) for p in model.parameters()}
    memo.update((id(tensor), tensor.detach().to('meta')) for tensor in [*model.buffers(), *loose_tensors(model)])
    return copy.deepcopy(model, memo)


def loose_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield tensors that modules keep beside parameters and buffers (LeViT's cache, say), which may have a history
    that cannot be copied."""
    for module in model.modules():
        for value in vars(module).values():
            values = value.values() if isinstance(value, dict) else [value]
            yield from (tensor for tensor in values if isinstance(tensor, torch.Tensor)
                        and not isinstance(tensor, nn.Parameter))


def _reset(model: nn.Module, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """timm's own reset_classifier, whatever stands before it."""
    type(model).reset_classifier(model, num_classes, *args, **kwargs)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _find_places(model: nn.Module) -> list[_Place]:
    """Find every classifier, the main one first, by what timm's own `reset_classifier` does to a copy.

    The layers that have a row a class are those that get other rows for another number of classes, or vanish. What
    `reset_classifier(0)` takes away is the classifier: such a layer, or the module around it (one with a batch norm
    before the layer, say).
    """
    modules = dict(model.named_modules())
    classifiers = list(_timms_classifiers(model))
    unseen = 1 + max([len(p) for p in model.parameters() if p.dim()], default=0)
    plan = _skeleton(model)
    old = set(plan.modules())
    with torch.device('meta'):
        _reset(plan, unseen)
        other = dict(plan.named_modules())
        _reset(plan, 0)
    none = dict(plan.named_modules())

    order: dict[str, int] = {}
    for path, module in modules.items():
        if not _is_linear(module):
            continue
        if path in other and (other[path] in old or len(next(other[path].parameters(), ())) != unseen):
            continue
        owner = next((i for i, classifier in enumerate(classifiers) if module in set(classifier.modules())), None)
        order[path] = len(classifiers) if owner is None else owner
    places = []
    for path in sorted(order, key=order.get):
        names = path.split('.')
        above = ('.'.join(names[:i]) for i in range(1, len(names) + 1))
        top = next(name for name in above if name == path or isinstance(none.get(name, nn.Identity()), nn.Identity))
        layer = modules[path]
        places.append(_Place(
            path=top,
            linear=path[len(top) + 1:],
            in_features=layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features,
            channels_first=isinstance(layer, nn.Conv2d),
            auxiliary=order[path] == len(classifiers),
        ))
    if not places:
        kinds = ', '.join(type(classifier).__name__ for classifier in classifiers) or 'nothing'
        raise ValueError(f'the classifier of {type(model).__name__} is a {kinds}, which wrap_dl2pa cannot replace: it '
                         f'replaces linear layers and 1x1 convolutions with a row for each class, which timm\'s '
                         f'reset_classifier makes anew.')
    return places


def _is_without_classes(model: nn.Module) -> bool:
    return getattr(model, 'num_classes', None) == 0 or all(
        isinstance(classifier, nn.Identity) for classifier in _timms_classifiers(model))


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)


def replace_classifiers(
        model: nn.Module,
        make_head: Callable[..., DL2PAHead],
        num_classes: int | None = None,
) -> nn.Module:
    """Put `make_head(in_features=, device=, dtype=)` in the place of each classifier, the main one first.

    All heads are made before the first is put in place, so that an error leaves the model as it was.

    Args:
        model: A timm model; it may be wrapped already.
        make_head: Makes one head.
        num_classes: For a model without classes, which timm gives its classifier back first.
    """
    like = next(model.parameters())
    heads: dict[str, DL2PAHead] = {}
    given_back = False

    def add(path: str, in_features: int, device: torch.device, dtype: torch.dtype, training: bool) -> DL2PAHead:
        heads[path] = make_head(in_features=in_features, device=device, dtype=dtype).train(training)
        return heads[path]

    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, DL2PAHead)}
    if wrapped:
        for path, old in sorted(wrapped.items(), key=lambda item: item[1].auxiliary):
            weight = next(old.neck.parameters(), like)
            head = add(path, old.in_features, weight.device, weight.dtype, old.training)
            head.before, head.channels_first, head.auxiliary = old.before, old.channels_first, old.auxiliary
    else:
        timms, given_back = model, _is_without_classes(model)
        if given_back:
            timms = _skeleton(model)
            with torch.device('meta'):
                _reset(timms, num_classes)
        places = _find_places(timms)
        for place in places:
            layer = model.get_submodule(f'{place.path}.{place.linear}'.strip('.')) if timms is model else None
            weight = like if layer is None else layer.weight
            head = add(place.path, place.in_features, weight.device, weight.dtype, (layer or model).training)
            head.channels_first, head.auxiliary = place.channels_first, place.auxiliary
    if any(head.auxiliary and head.train_output == 'embeddings' for head in heads.values()):
        raise ValueError(f"train_output='embeddings' cannot serve {type(model).__name__}: it adds the largest logits "
                         f"of an auxiliary classifier to the main one's. Use train_output='logits'.")

    if given_back:
        _reset(model, num_classes)
    if not wrapped:
        for place in places:
            if place.linear:
                heads[place.path].before = around = model.get_submodule(place.path)
                set_module(around, place.linear, RemovedLinear())
    for path, head in heads.items():
        set_module(model, path, head)
    main = next(iter(heads.values()))
    model.num_classes = main.num_classes
    # As attributes of the model rather than of a class made up for it: its type stays timm's.
    record_in_registrys_terms(model, main.config)
    model.reset_classifier = _ResetClassifier(model, main.config)
    model.get_classifier = _GetClassifier(model)
    return model


REGISTRY_NAME = 'dl2pa'


def record_in_registrys_terms(model: nn.Module, config: DL2PAConfig | None) -> None:
    """Have a model say how timm's registry makes it, as timm's own exports ask: as the entry `dl2pa` on a backbone.

    Without a config, as the backbone alone. A model that timm did not make is left as it is.
    """
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return
    arguments = dict(getattr(model, '_model_args', {}))
    own = {name: arguments.pop(name) for name in list(arguments) if name.startswith(PREFIX)}
    tag = f'.{cfg["tag"]}' if cfg.get('tag') else ''
    backbone = own.get('dl2pa_backbone') or cfg['architecture'] + tag
    if config is None:
        name, _, tag = backbone.partition('.')
        cfg = {**cfg, 'architecture': name, 'tag': tag or None}
    else:
        cfg = {**cfg, 'architecture': REGISTRY_NAME, 'tag': None}
        arguments.update(registry_options(config), dl2pa_backbone=backbone)
    model.pretrained_cfg = model.default_cfg = cfg
    model._model_args = arguments


def registry_options(config: DL2PAConfig) -> dict[str, Any]:
    """Return the options that timm's registry makes a head by, but for its prototypes."""
    options = {PREFIX + name: getattr(config, name) for name in names_of('head')
               if name not in ('num_prototypes', 'prototypes')}
    if config.num_prototypes != config.num_classes:
        options[f'{PREFIX}num_prototypes'] = config.num_prototypes
    if config.train_output != 'logits':
        options[f'{PREFIX}train_output'] = config.train_output
    return options


def backbone_name(model: nn.Module) -> str | None:
    """Return the name, with its tag, that `timm.create_model` makes a wrapped model's backbone by; None if unknown."""
    return getattr(model, '_model_args', {}).get('dl2pa_backbone')


class _GetClassifier:
    """`get_classifier()` of a wrapped model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> Any:
        """Return the head; where timm has several classifiers, a tuple of heads, the main one first."""
        heads = tuple(head for head in heads_of(self.model) if not head.auxiliary)
        if not heads:  # after reset_classifier(0)
            return type(self.model).get_classifier(self.model)
        return heads[0] if len(heads) == 1 else heads


class _ResetClassifier:
    """`reset_classifier(num_classes)` of a wrapped model: a new DL2PA head, or with 0 none, as in timm."""

    def __init__(self, model: nn.Module, config: DL2PAConfig):
        self.model = model
        self.config = config

    def __call__(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Make a head of the same kind for another number of classes, on timm's new classifier.

        Prototypes of one's own (or rotated ones) are kept if they are as many, or if there were spare ones and are
        enough; otherwise there are `num_classes` new ones. A scale that
        was the default for the number of classes becomes the new default.

        Args:
            num_classes: C, at least 2; or 0 for a model without a classifier, which a later call gives a head again.
            args, kwargs: Of timm's method (`global_pool`).

        Raises:
            ValueError: It is neither. The model was not changed.
        """
        heads = heads_of(self.model)
        self.config = old = heads[0].config if heads else self.config
        if num_classes == 0:
            _reset(self.model, 0, *args, **kwargs)
            record_in_registrys_terms(self.model, None)
            return
        points = heads[0].prototypes if heads and old.own_prototypes else None
        spare = old.num_prototypes > old.num_classes  # then a part of the points is meant to serve
        if points is not None and len(points) != num_classes and not (spare and len(points) > num_classes):
            points = None
        config = old.for_classes(num_classes, None if points is None else len(points))
        if points is None:
            points = make_prototypes(config.num_prototypes, config.dim, seed=config.seed)

        def make_head(in_features: int, **place: Any) -> DL2PAHead:
            return DL2PAHead.from_config(replace(config, in_features=in_features), points, **place)

        _reset(self.model, num_classes, *args, **kwargs)
        replace_classifiers(self.model, make_head)
        for head in heads_of(self.model):
            head.train(self.model.training)  # timm before 1.0.31 leaves new layers in training mode


def wrap_dl2pa(
        model: nn.Module,
        dim: int = 128,
        *,
        recipe: str = DEFAULT_RECIPE,
        num_classes: int | None = None,
        num_prototypes: int | None = None,
        prototypes: torch.Tensor | str | os.PathLike | None = None,
        neck: str | None = None,
        scale: float | None = None,
        learn_scale: bool | None = None,
        train_output: str = 'logits',
        seed: int = 0,
        head: DL2PAHead | str | os.PathLike | None = None,
) -> nn.Module:
    """Replace the classifier of a timm model by a DL2PA head, in place, and return the model.

    The backbone's weights are untouched; forward_features, forward_head, get_classifier (now the head),
    reset_classifier (now a new DL2PA head), parameter groups and so on go on working. The head is made on the
    classifier's device and, but for the prototypes (float32), in its dtype.

    What is replaced is the last linear layer of timm's classifier; what else timm counts as the classifier (LeViT's
    batch norm, MetaFormer's hidden layer) stays, as `head.before`. A model with several classifiers gets a head for
    each, with tensors of its own, and combines their logits as it combined those of its classifiers: distilled models,
    CrossViT and EfficientViM average them (EfficientViM with learned weights), VOLO adds half the largest logits of
    its patch tokens.

    Args:
        model: A timm classification model; also one without classes (`num_classes=0`) or an already wrapped one.
        dim: d, the dimension of the embeddings, which may be far smaller than the number of classes.
        recipe: 'placed', 'even' or 'paper': sets neck, scale and the first assignment, and what an
            `AssignmentScheduler` of the model does.
        num_classes: C. Default: the model's.
        num_prototypes: K >= C. Default: C.
        prototypes: (K, d) unit rows of your own, or a safetensors file of them. Default: made by `make_prototypes`.
        neck: 'linear', 'linear_bn' (batch norm after it), or 'none' where the features already have d dimensions.
            Default: the recipe's.
        scale: Factor on the cosines in the logits, which then is fixed. Default: learned, or by the number of classes,
            see `default_scale`.
        learn_scale: Make the scale a parameter. Default: the recipe's, if no scale is given.
        train_output: 'logits', or 'embeddings' for a loss of this package at very many classes.
        seed: Seed of the prototypes.
        head: A trained head, or where `load_head` finds one: a folder or a repository of the Hub. The other arguments
            then are its own. With another `num_classes` its neck is kept and the assignment starts anew.

    Returns:
        The same model.

    Raises:
        ValueError: The model is no timm classification model, its classifier is of a kind that cannot be replaced, or
            an argument is out of range. The model was not changed.

    Example:
        >>> model = wrap_dl2pa(timm.create_model('resnet50', pretrained=True, num_classes=100), dim=128)
    """
    _check_has_classifier(model)
    if head is not None:
        others = dict(recipe=recipe, num_prototypes=num_prototypes, prototypes=prototypes, neck=neck, scale=scale,
                      learn_scale=learn_scale, train_output=train_output, seed=seed)
        return _wrap_with(model, head, num_classes, dim, others)
    if num_classes is None:
        num_classes = model.num_classes
        if num_classes < 1:
            raise ValueError(f'num_classes must be given: {type(model).__name__} was made without classes.')
    first: DL2PAHead | None = None

    def make_head(**place: Any) -> DL2PAHead:
        nonlocal first
        if first is not None:  # the same prototypes, made once
            config = replace(first.config, in_features=place.pop('in_features'))
            return DL2PAHead.from_config(config, first.prototypes, **place)
        first = DL2PAHead(
            num_classes=num_classes,
            dim=dim,
            recipe=recipe,
            num_prototypes=num_prototypes,
            prototypes=prototypes,
            neck=neck,
            scale=scale,
            learn_scale=learn_scale,
            train_output=train_output,
            seed=seed,
            **place,
        )
        return first

    return replace_classifiers(model, make_head, num_classes)


def _wrap_with(
        model: nn.Module,
        head: DL2PAHead | str | os.PathLike,
        num_classes: int | None,
        dim: int,
        others: dict[str, Any],
) -> nn.Module:
    """`wrap_dl2pa` with a trained head."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(wrap_dl2pa).parameters.items()}
    given = [name for name, value in others.items() if value is not defaults[name] and value != defaults[name]]
    origin = 'head' if isinstance(head, DL2PAHead) else os.fspath(head)
    if not isinstance(head, DL2PAHead):
        head = load_head(head)
    if dim not in (defaults['dim'], head.dim):
        given.append('dim')
    if given:
        raise ValueError(f'{", ".join(given)} cannot be given together with head=, which has its own: leave it out.')
    if num_classes not in (None, head.num_classes):
        warnings.warn(f'{origin} is a head of {head.num_classes} classes, not {num_classes}: its neck is kept, '
                      f'prototypes and assignment are new.', stacklevel=3)
        head = head.with_classes(num_classes)

    def make_head(in_features: int, device: torch.device, dtype: torch.dtype) -> DL2PAHead:
        if head.in_features != in_features:
            raise ValueError(f'head takes {head.in_features} features, but the classifier of {type(model).__name__} is '
                             f'given {in_features}: it was trained on another backbone.')
        return copy.deepcopy(head).to(device, dtype)

    model = replace_classifiers(model, make_head, head.num_classes)
    model.label_names = head.label_names
    return model
