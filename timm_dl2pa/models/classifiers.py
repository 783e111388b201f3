"""Finds the classifiers of a timm model, and what of them a head replaces."""
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

__all__ = ['ClassifierSlot', 'check_classes_agree', 'check_has_classifier', 'find_classifiers', 'has_no_classes',
           'meta_copy', 'reset_classifier', 'unregistered_tensors']


@dataclass(frozen=True)
class ClassifierSlot:
    """The position of a classifier in a model, and the properties of its last linear layer.

    Attributes:
        path: The path of the module that timm's `reset_classifier(0)` removes, and that the head replaces.
        linear: The path, within that module, of the layer with a row for each class; '' if it is the module itself.
        rows: The output size of that layer.
        in_features: Its input size.
        channels_first: Whether that layer is a 1x1 convolution.
        auxiliary: Whether `get_classifier()` omits the classifier.
    """
    path: str
    linear: str
    rows: int
    in_features: int
    channels_first: bool
    auxiliary: bool


# What makes modules of these types, in the words of the user's code.
_WRAPPERS = {'OptimizedModule': 'torch.compile', 'PeftModel': 'get_peft_model'}


def check_has_classifier(model: nn.Module) -> None:
    """Raise a ValueError unless a model itself, not one inside it, has timm's methods for classifiers."""
    if not hasattr(type(model), 'get_classifier') or not hasattr(type(model), 'reset_classifier'):
        inner = next((inner for inner in model.modules() if hasattr(type(inner), 'get_classifier')), None)
        if inner is not None:
            raise ValueError(f'model is a {type(model).__name__} around a {type(inner).__name__}: wrap the '
                             f'{type(inner).__name__} by wrap_dl2pa first, and then the result by '
                             f'{_WRAPPERS.get(type(model).__name__, type(model).__name__)}.')
        raise ValueError(f'model ({type(model).__name__}) has no get_classifier() and reset_classifier(): wrap_dl2pa '
                         f'takes a timm classification model. In another model, replace the classifier by a DL2PAHead.')


def _timm_classifiers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the classifiers that timm's own `get_classifier()` returns, the main one first."""
    queue = [type(model).get_classifier(model)]
    while queue:
        found = queue.pop(0)
        if isinstance(found, nn.Module) and not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
            yield found
        elif found is not None:
            queue[:0] = found.values() if isinstance(found, (dict, nn.ModuleDict)) else found


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its weights: every parameter and buffer is on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to('meta'), p.requires_grad) for p in model.parameters()}
    memo.update((id(tensor), tensor.detach().to('meta'))
                for tensor in [*model.buffers(), *unregistered_tensors(model)])
    return copy.deepcopy(model, memo)


def unregistered_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules hold without registering them as parameters or buffers.

    An example is LeViT's cache of attention biases. Such tensors may have an autograd history, with which deepcopy
    fails.

    Args:
        model: Any module.

    Yields:
        One tensor at a time. Buffers are among them.
    """
    for module in model.modules():
        for value in vars(module).values():
            values = value.values() if isinstance(value, dict) else [value]
            yield from (tensor for tensor in values if isinstance(tensor, torch.Tensor)
                        and not isinstance(tensor, nn.Parameter))


def reset_classifier(model: nn.Module, num_classes: int | None, *args: Any, **kwargs: Any) -> None:
    """Call timm's own `reset_classifier`, also on a wrapped model."""
    type(model).reset_classifier(model, num_classes, *args, **kwargs)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def find_classifiers(model: nn.Module) -> list[ClassifierSlot]:
    """Find every classifier, the main one first, by the effect of timm's own `reset_classifier` on a copy.

    A layer has a row for each class if it gets another number of rows, or vanishes, with another number of classes. The
    classifier is the module that `reset_classifier(0)` removes: such a layer, or a module around it (for example, with
    a batch norm before the layer).
    """
    modules = dict(model.named_modules())
    classifiers = list(_timm_classifiers(model))
    unused_size = 1 + max([len(p) for p in model.parameters() if p.dim()], default=0)
    trial = meta_copy(model)
    original_modules = set(trial.modules())
    with torch.device('meta'):
        reset_classifier(trial, unused_size)
        resized = dict(trial.named_modules())
        reset_classifier(trial, 0)
    removed = dict(trial.named_modules())

    order: dict[str, int] = {}
    for path, module in modules.items():
        if not _is_linear(module):
            continue
        if path in resized and (resized[path] in original_modules
                                or len(next(resized[path].parameters(), ())) != unused_size):
            continue
        owner = next((i for i, classifier in enumerate(classifiers) if module in set(classifier.modules())), None)
        order[path] = len(classifiers) if owner is None else owner
    slots: dict[str, ClassifierSlot] = {}
    for path in sorted(order, key=order.get):
        names = path.split('.')
        prefixes = ('.'.join(names[:i]) for i in range(1, len(names) + 1))
        top = next(name for name in prefixes
                   if name == path or isinstance(removed.get(name, nn.Identity()), nn.Identity))
        layer = modules[path]
        # Of several layers in one classifier (hidden ones, in a module of the user's own) the last has the classes.
        slots[top] = ClassifierSlot(
            path=top,
            linear=path[len(top) + 1:],
            rows=len(layer.weight),
            in_features=layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features,
            channels_first=isinstance(layer, nn.Conv2d),
            auxiliary=order[path] == len(classifiers),
        )
    if not slots:
        kinds = ', '.join(type(classifier).__name__ for classifier in classifiers) or 'nothing'
        raise ValueError(f'the classifier of {type(model).__name__} is a {kinds}, which wrap_dl2pa cannot replace: it '
                         f'replaces linear layers and 1x1 convolutions that have a row for each class and that '
                         f'reset_classifier of timm creates.')
    return list(slots.values())


def check_classes_agree(model: nn.Module, rows: dict[str, int]) -> None:
    """Raise a ValueError unless every classifier, by its path, has as many rows as the model says it has classes."""
    differ = {path: count for path, count in rows.items() if count != model.num_classes}
    if differ:
        path, count = next(iter(differ.items()))
        raise ValueError(f'{type(model).__name__} has num_classes={model.num_classes}, but its classifier {path!r} has '
                         f'{count} rows: it was replaced. Give num_classes={count} to wrap_dl2pa, or whichever is '
                         f'right. (To change the number of classes, timm has model.reset_classifier({count}).)')


def has_no_classes(model: nn.Module) -> bool:
    """Return whether a model was made without classes, or its classifiers were removed."""
    return getattr(model, 'num_classes', None) == 0 or all(
        isinstance(classifier, nn.Identity) for classifier in _timm_classifiers(model))
