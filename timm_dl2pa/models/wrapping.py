"""`wrap_dl2pa`: replaces the classifiers of a timm model by DL2PA heads."""
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn as nn

from ..files.labels import read_label_names
from ..head import DL2PAConfig, DL2PAHead, TrainOutput, heads_of, leave_out_of_broadcasts, load_head, taken_over
from ..options import PREFIX, names_of
from ..recipes import DEFAULT_RECIPE, NeckName, RecipeName
from ..values import checked_value
from .classifiers import (
    check_classes_agree,
    check_has_classifier,
    find_classifiers,
    has_no_classes,
    meta_copy,
    reset_classifier,
)
from .reparameterization import fuse_around_heads

__all__ = ['REGISTRY_NAME', 'RemovedLinear', 'backbone_name', 'record_registry_entry', 'registry_options',
           'replace_classifiers', 'set_module', 'wrap_dl2pa']

# The type of a model, which stays what it is.
Model = TypeVar('Model', bound=nn.Module)

# The name of the entry for wrapped models in timm's registry.
REGISTRY_NAME = 'dl2pa'


class RemovedLinear(nn.Identity):
    """Placeholder, within `DL2PAHead.before`, for the removed last linear layer of timm's classifier."""


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a submodule of a model.

    Args:
        model: The model, which is changed in place.
        path: The path of the submodule, such as 'head.fc'.
        module: The new submodule.
    """
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)


def replace_classifiers(
        model: nn.Module,
        make_head: Callable[..., DL2PAHead],
        num_classes: int | None = None,
) -> nn.Module:
    """Replace each classifier of a model by a head, the main one first, in place.

    All heads are made before the first one is inserted. An error in `make_head` leaves the model unchanged.

    Args:
        model: A timm model, possibly already wrapped.
        make_head: Called with `in_features`, `device` and `dtype`; returns a head.
        num_classes: C. For a model without classes, timm first restores its classifier with this number. None for a
            model that has classes: its `num_classes`, which must agree with the rows of its classifiers.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no classifier that can be replaced, or a head does not suit it.
    """
    reference_weight = next(model.parameters())
    heads: dict[str, DL2PAHead] = {}
    restore_classifier = False

    def add(path: str, in_features: int, device: torch.device, dtype: torch.dtype, training: bool) -> DL2PAHead:
        heads[path] = make_head(in_features=in_features, device=device, dtype=dtype).train(training)
        return heads[path]

    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, DL2PAHead)}
    if wrapped:
        if num_classes is None:
            check_classes_agree(model, {path: head.num_classes for path, head in wrapped.items()})
        for path, old in sorted(wrapped.items(), key=lambda item: item[1].auxiliary):
            weight = next(old.neck.parameters(), reference_weight)
            head = add(path, old.in_features, weight.device, weight.dtype, old.training)
            head.before, head.channels_first, head.auxiliary = old.before, old.channels_first, old.auxiliary
    else:
        timm_model, restore_classifier = model, has_no_classes(model)
        if restore_classifier:
            timm_model = meta_copy(model)
            with torch.device('meta'):
                reset_classifier(timm_model, num_classes)
        slots = find_classifiers(timm_model)
        if num_classes is None:
            check_classes_agree(model, {f'{slot.path}.{slot.linear}'.strip('.'): slot.rows for slot in slots})
        for slot in slots:
            layer = model.get_submodule(f'{slot.path}.{slot.linear}'.strip('.')) if timm_model is model else None
            weight = reference_weight if layer is None else layer.weight
            head = add(slot.path, slot.in_features, weight.device, weight.dtype, (layer or model).training)
            head.channels_first, head.auxiliary = slot.channels_first, slot.auxiliary
    if any(head.auxiliary and head.train_output == 'embeddings' for head in heads.values()):
        raise ValueError(f"train_output='embeddings' does not work with {type(model).__name__}: the model adds the "
                         f"largest logits of an auxiliary classifier to those of the main one. Use "
                         f"train_output='logits'.")

    if restore_classifier:
        reset_classifier(model, num_classes)
    if not wrapped:
        for slot in slots:
            if slot.linear:
                heads[slot.path].before = classifier = model.get_submodule(slot.path)
                set_module(classifier, slot.linear, RemovedLinear())
    for path, head in heads.items():
        set_module(model, path, head)
    fuse_around_heads(model)
    leave_out_of_broadcasts(model)
    main = next(iter(heads.values()))
    if model.num_classes != main.num_classes:
        model.label_names = None
    model.num_classes = main.num_classes
    # Attributes of the instance, so that the type of the model remains timm's.
    record_registry_entry(model, main.config)
    model.reset_classifier = _ResetClassifier(model, main.config)
    model.get_classifier = _GetClassifier(model)
    return model


def record_registry_entry(model: nn.Module, config: DL2PAConfig | None) -> None:
    """Record in a model how timm's registry makes it, for timm's export functions: as the entry `dl2pa` on a backbone.

    A model that timm did not make is left unchanged.

    Args:
        model: The model. Its `pretrained_cfg`, `default_cfg` and `_model_args` are replaced.
        config: The config of the main head; None records the backbone alone.
    """
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return
    arguments = dict(getattr(model, '_model_args', {}))
    options = {name: arguments.pop(name) for name in list(arguments) if name.startswith(PREFIX)}
    tag = f'.{cfg["tag"]}' if cfg.get('tag') else ''
    backbone = options.get('dl2pa_backbone') or cfg['architecture'] + tag
    if config is None:
        name, _, tag = backbone.partition('.')
        cfg = {**cfg, 'architecture': name, 'tag': tag or None}
    else:
        cfg = {**cfg, 'architecture': REGISTRY_NAME, 'tag': None}
        arguments.update(registry_options(config), dl2pa_backbone=backbone)
    model.pretrained_cfg = model.default_cfg = cfg
    model._model_args = arguments


def registry_options(config: DL2PAConfig) -> dict[str, Any]:
    """Return the options with which timm's registry makes a head of a config, without its prototypes.

    Args:
        config: The config of the head.

    Returns:
        The options by their dl2pa_... names.
    """
    options = {PREFIX + name: getattr(config, name) for name in names_of('head')
               if name not in ('num_prototypes', 'prototypes')}
    if config.num_prototypes != config.num_classes:
        options[f'{PREFIX}num_prototypes'] = config.num_prototypes
    if config.train_output != 'logits':
        options[f'{PREFIX}train_output'] = config.train_output
    return options


def backbone_name(model: nn.Module) -> str | None:
    """Return the name of a wrapped model's backbone.

    Args:
        model: A wrapped model, or any other module.

    Returns:
        The name for `timm.create_model`, with its tag; None if it is unknown.
    """
    return getattr(model, '_model_args', {}).get('dl2pa_backbone')


class _GetClassifier:
    """The method `get_classifier()` of a wrapped model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> Any:
        """Return the head. For a model with several classifiers, return a tuple of heads, the main one first."""
        heads = tuple(head for head in heads_of(self.model) if not head.auxiliary)
        if not heads:  # after reset_classifier(0)
            return type(self.model).get_classifier(self.model)
        return heads[0] if len(heads) == 1 else heads


class _ResetClassifier:
    """The method `reset_classifier(num_classes)` of a wrapped model. It makes a new DL2PA head, or none for 0."""

    def __init__(self, model: nn.Module, config: DL2PAConfig):
        self.model = model
        self.config = config

    def __call__(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Make a new head with the same options for another number of classes.

        Prototypes that the seed alone does not reproduce (given, moved or rotated ones) are kept if there are exactly C
        of them, or if K was greater than the old C and is still greater than the new one. Otherwise the head gets new
        prototypes. A scale that was the default for the old number of classes becomes the default for the new one.

        Args:
            num_classes: C, at least 2; or 0 to remove the classifier. A later call adds a head again.
            args: Arguments of timm's method (`global_pool`).
            kwargs: Arguments of timm's method.

        Raises:
            ValueError: `num_classes` is negative or 1. The model was not changed.
        """
        heads = heads_of(self.model)
        self.config = old = heads[0].config if heads else self.config
        if num_classes == 0:
            reset_classifier(self.model, 0, *args, **kwargs)
            record_registry_entry(self.model, None)
            return
        points = heads[0].prototypes if heads and old.own_prototypes else None
        has_spare = old.num_prototypes > old.num_classes
        if points is not None and len(points) != num_classes and not (has_spare and len(points) > num_classes):
            points = None
        config = old.for_classes(num_classes, None if points is None else len(points))
        if points is None:
            points = config.first_prototypes()

        def make_head(in_features: int, **factory_kwargs: Any) -> DL2PAHead:
            return DL2PAHead.from_config(replace(config, in_features=in_features), points, **factory_kwargs)

        if num_classes != self.model.num_classes:
            self.model.label_names = None
        reset_classifier(self.model, num_classes, *args, **kwargs)
        replace_classifiers(self.model, make_head)
        for head in heads_of(self.model):
            head.train(self.model.training)  # before 1.0.31, timm leaves new layers in training mode


def wrap_dl2pa(
        model: Model,
        dim: int = 128,
        *,
        recipe: RecipeName = DEFAULT_RECIPE,
        num_classes: int | None = None,
        num_prototypes: int | None = None,
        prototypes: torch.Tensor | str | os.PathLike[str] | None = None,
        neck: NeckName | None = None,
        scale: float | None = None,
        learn_scale: bool | None = None,
        train_output: TrainOutput = 'logits',
        seed: int = 0,
        head: nn.Module | str | os.PathLike[str] | None = None,
        pinned: bool | None = None,
) -> Model:
    """Replace the classifier of a timm model by a DL2PA head, in place.

    The backbone's weights are unchanged. The methods of the model keep working: forward_features, forward_head,
    get_classifier (returns the head), reset_classifier (makes a new DL2PA head), parameter groups and so on. The head
    is made on the classifier's device and in its dtype; its prototypes are always float32.

    Only the last linear layer of timm's classifier is replaced. Other layers of the classifier (LeViT's batch norm,
    MetaFormer's hidden layer) are kept as `head.before`. A model with several classifiers gets a head for each, with
    separate tensors, and combines their logits as before: distilled models, CrossViT and EfficientViM average them
    (EfficientViM with learned weights), VOLO adds half the largest logits of its patch tokens.

    Args:
        model: A timm classification model. It may have no classes (`num_classes=0`), or be wrapped already.
        dim: d, the dimension of the embeddings. It may be much smaller than the number of classes.
        recipe: 'placed', 'even' or 'paper'. It sets neck, scale and initial assignment, and the warm-up and class means
            of an `AssignmentScheduler` for the model.
        num_classes: C. Default: that of the model, which must agree with the rows of its classifiers.
        num_prototypes: K >= C. Default: C.
        prototypes: (K, d) unit rows, or the path of a safetensors file of them. Default: the best set that about two
            seconds give. See `DL2PAHead`.
        neck: 'linear', 'linear_bn' (with batch norm), or 'none' if the features already have d dimensions. Default: the
            recipe's.
        scale: A fixed factor on the cosines in the logits. Default: learned if `learn_scale`, otherwise
            `default_scale(C)`.
        learn_scale: Whether the scale is a parameter. Default: the recipe's, if no scale is given.
        train_output: 'logits', or 'embeddings' to return unit embeddings in training mode, for a loss of this package
            with very many classes.
        seed: Seed of the prototypes, and of a random initial assignment.
        head: A trained head, a model with one, or the source of a head for `load_head`: a folder or a Hub repository.
            It determines all other arguments. Prototypes, assignment and scale are copied; the neck too, where it
            takes as many features as the classifier, otherwise it is new (`prime` sets it). With another `num_classes`
            the neck is kept, and prototypes and assignment are new.
        pinned: Whether prototypes and assignment stay: no warm-up, no re-solve and no `prime` changes them, so that
            embeddings remain comparable between the models that have them. Default: True where `head` is given, and
            its prototypes are kept.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not a timm classification model (but, say, a wrapper of `torch.compile` around one),
            its classifier is of a kind that cannot be replaced, or was replaced by one for another number of classes;
            an argument is out of range, or is given together with `head`. The model was not changed.

    Example:
        >>> model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=10), dim=8)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.get_classifier().dim
        8
    """
    check_has_classifier(model)
    if pinned is not None:
        pinned = checked_value('pinned', pinned, bool)
    if head is not None:
        options = dict(recipe=recipe, num_prototypes=num_prototypes, prototypes=prototypes, neck=neck, scale=scale,
                       learn_scale=learn_scale, train_output=train_output, seed=seed)
        return _wrap_with_head(model, head, num_classes, dim, pinned, options)
    if num_classes is None and has_no_classes(model):
        raise ValueError(f'num_classes must be given: {type(model).__name__} has no classifier.')
    first: DL2PAHead | None = None

    def make_head(**factory_kwargs: Any) -> DL2PAHead:
        nonlocal first
        if first is not None:  # all heads get the prototypes of the first one
            config = replace(first.config, in_features=factory_kwargs.pop('in_features'))
            return DL2PAHead.from_config(config, first.prototypes, **factory_kwargs)
        first = DL2PAHead(
            num_classes=model.num_classes if num_classes is None else num_classes,
            dim=dim,
            recipe=recipe,
            num_prototypes=num_prototypes,
            prototypes=prototypes,
            neck=neck,
            scale=scale,
            learn_scale=learn_scale,
            train_output=train_output,
            seed=seed,
            **factory_kwargs,
        )
        first.config = replace(first.config, pinned=bool(pinned))
        return first

    return replace_classifiers(model, make_head, num_classes)


def _wrap_with_head(
        model: nn.Module,
        source: nn.Module | str | os.PathLike[str],
        num_classes: int | None,
        dim: int,
        pinned: bool | None,
        options: dict[str, Any],
) -> nn.Module:
    """Wrap a model with a trained head, or with those of a model. Options that differ from their defaults are refused.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(wrap_dl2pa).parameters.items()}
    given = [name for name, value in options.items() if value is not defaults[name] and value != defaults[name]]
    is_module = isinstance(source, nn.Module)
    heads = heads_of(source) if is_module else [load_head(source)]
    if not heads:
        raise ValueError(f'head is a {type(source).__name__} that has no DL2PAHead: give a head, a model with one, or '
                         f'the folder of one.')
    head = heads[0]
    label_names = read_label_names(getattr(source, 'label_names', None) if is_module else head.label_names,
                                   head.num_classes, 'head.label_names')
    if dim not in (defaults['dim'], head.dim):
        given.append('dim')
    if given:
        raise ValueError(f'{", ".join(given)} cannot be given together with head, which determines it: leave it out.')
    if num_classes not in (None, head.num_classes):
        warnings.warn(f'{"head" if is_module else os.fspath(source)} is a head for {head.num_classes} classes, not '
                      f'{num_classes}: its neck is kept, its prototypes and assignment are new.', stacklevel=3)
        heads, label_names = [head.with_classes(num_classes) for head in heads], None
        pinned = bool(pinned)
    config = replace(heads[0].config, pinned=pinned is not False)
    remaining = iter(heads)

    def make_head(in_features: int, device: torch.device, dtype: torch.dtype) -> DL2PAHead:
        copied = taken_over(next(remaining, heads[0]), replace(config, in_features=in_features))
        return copied.to(device, dtype)

    model = replace_classifiers(model, make_head, config.num_classes)
    model.label_names = label_names
    widths = [head.in_features for head in heads_of(model)]
    if any(width != head.in_features for width, head in zip(widths, heads)):
        warnings.warn(f'head takes {heads[0].in_features} features, and the classifier of {type(model).__name__} takes '
                      f'{widths[0]}: its neck is new, so that the model must be trained, or primed.', stacklevel=3)
    return model
