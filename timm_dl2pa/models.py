"""wrap_dl2pa: a timm model with its classifier replaced."""
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn as nn

from .head import DL2PAHead

__all__ = ['replace_classifiers', 'wrap_dl2pa']


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Return what timm calls the model's classifiers, the main one first."""
    if not hasattr(model, 'get_classifier'):
        raise ValueError(f'model ({type(model).__name__}) has no get_classifier(): wrap_dl2pa takes a timm '
                         f'classification model. For another, put a DL2PAHead in its classifier\'s place.')
    found = model.get_classifier()
    if isinstance(found, nn.Module) and not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
        return [found]
    return list(found.values() if isinstance(found, (dict, nn.ModuleDict)) else found)


def _in_features(model: nn.Module, classifier: nn.Module) -> int:
    if isinstance(classifier, (nn.Linear, DL2PAHead)):
        return classifier.in_features
    if isinstance(classifier, nn.Identity):
        # timm's model without classes: what would have gone into its classifier is what comes out of it.
        return getattr(model, 'head_hidden_size', None) or model.num_features
    raise ValueError(f'the classifier of {type(model).__name__} is a {type(classifier).__name__}, which wrap_dl2pa '
                     f'cannot replace: it replaces nn.Linear classifiers.')


def _places(model: nn.Module, classifiers: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield, for each classifier, the module that holds it and the name that it has there."""
    for classifier in classifiers:
        for parent in model.modules():
            names = [name for name, child in parent.named_children() if child is classifier]
            if names:
                yield parent, names[0]
                break
        else:
            raise ValueError(f'get_classifier() of {type(model).__name__} returns a module that is not part of it.')


def replace_classifiers(model: nn.Module, make_head: Callable[..., DL2PAHead]) -> nn.Module:
    """Put `make_head(in_features=, device=, dtype=)` in the place of each classifier, the main one first.

    All heads are made before the first is put in place, so that an error leaves the model as it was.
    """
    classifiers = _classifiers(model)
    places = list(_places(model, classifiers))
    heads = []
    for classifier in classifiers:
        # A classifier without parameters (nn.Identity) has the device and dtype of its model.
        like = next(classifier.parameters(), None)
        if like is None:
            like = next(model.parameters())
        head = make_head(in_features=_in_features(model, classifier), device=like.device, dtype=like.dtype)
        heads.append(head.train(classifier.training))
    for (parent, name), head in zip(places, heads):
        setattr(parent, name, head)
    model.num_classes = heads[0].num_classes
    return model


def wrap_dl2pa(
        model: nn.Module,
        dim: int = 128,
        *,
        num_classes: int | None = None,
        num_prototypes: int | None = None,
        prototypes: torch.Tensor | str | os.PathLike | None = None,
        neck: str = 'linear',
        scale: float | None = None,
        learn_scale: bool = False,
        train_output: str = 'logits',
        seed: int = 0,
) -> nn.Module:
    """Replace the classifier of a timm model by a DL2PA head, in place, and return the model.

    The backbone's weights are untouched; forward_features, forward_head, get_classifier (now the head), parameter
    groups and so on go on working. The head is made on the classifier's device and, but for the prototypes (float32),
    in its dtype. A model with several classifiers (a distilled one) gets a head for each, with tensors of its own.

    Args:
        model: A timm classification model; also one without classes (`num_classes=0`) or an already wrapped one.
        dim: d, the dimension of the embeddings, which may be far smaller than the number of classes.
        num_classes: C. Default: the model's.
        num_prototypes: K >= C. Default: C.
        prototypes: (K, d) unit rows of your own, or a safetensors file of them. Default: made by `make_prototypes`.
        neck: 'linear', 'linear_bn' (batch norm after it), or 'none' where the features already have d dimensions.
        scale: Factor on the cosines in the logits. Default: by the number of classes, see `default_scale`.
        learn_scale: Make the scale a parameter.
        train_output: 'logits', or 'embeddings' for a loss of this package at very many classes.
        seed: Seed of the prototypes.

    Returns:
        The same model.

    Raises:
        ValueError: The model is no timm classification model, its classifier is of a kind that cannot be replaced, or
            an argument is out of range. The model was not changed.

    Example:
        >>> model = wrap_dl2pa(timm.create_model('resnet50', pretrained=True, num_classes=100), dim=128)
    """
    _classifiers(model)
    if num_classes is None:
        num_classes = model.num_classes
        if num_classes < 1:
            raise ValueError(f'num_classes must be given: {type(model).__name__} was made without classes.')
    first: DL2PAHead | None = None

    def make_head(**place) -> DL2PAHead:
        nonlocal first
        if first is not None:  # the same prototypes, made once
            config = replace(first.config, in_features=place.pop('in_features'))
            return DL2PAHead.from_config(config, first.prototypes, **place)
        first = DL2PAHead(
            num_classes=num_classes,
            dim=dim,
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

    return replace_classifiers(model, make_head)
