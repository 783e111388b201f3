"""The backbone of a fine-tuning: made by its name, with pretrained weights; the device; what of it is trained."""
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..head import heads_of
from ..models.classifiers import find_classifiers
from ..timm_scripts.checkpoint import one_line, read_checkpoint

__all__ = ['find_device', 'keep_statistics', 'make_backbone', 'size_arguments']


def find_device(name: str | None) -> torch.device:
    """Return a device that can be used. Default: a GPU if there is one.

    Raises:
        ValueError: It is unknown, or cannot be used here.
    """
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {name!r} cannot be used here: {str(error).splitlines()[0]}') from None
    return device


def make_backbone(
        name: str,
        num_classes: int,
        *,
        pretrained: bool = True,
        weights: str | Path | None = None,
        image_size: int | None = None,
) -> nn.Module:
    """Make a timm model, with pretrained weights.

    Args:
        name: The name of the model.
        num_classes: C.
        pretrained: Whether to load timm's weights, where no file is given.
        weights: A file of weights under timm's names, of which the classifier is left out.
        image_size: The side of the images in pixels. Default: the model's.

    Raises:
        ValueError: The model is unknown, or has no pretrained weights, or the file has those of another model.
        OSError: The weights cannot be downloaded, or the file cannot be read.
    """
    try:
        model = timm.create_model(name, num_classes=num_classes)
        arguments = size_arguments(model, image_size)
        if arguments:
            model = timm.create_model(name, num_classes=num_classes, **arguments)
    except Exception as error:  # what timm's models raise is not documented
        raise ValueError(f'--model {name!r} cannot be made ({one_line(error)}): timm.list_models() lists the names.'
                         ) from None
    if weights is not None:
        _load_weights(model, name, Path(weights))
    elif pretrained:
        if not any(model.pretrained_cfg.get(source) for source in ('url', 'hf_hub_id', 'file')):
            raise ValueError(f'--model {name!r} has no pretrained weights in timm: choose one of '
                             f'timm.list_models(pretrained=True), or give --weights FILE or --no-pretrained.')
        try:
            model = timm.create_model(name, pretrained=True, num_classes=num_classes, **arguments)
        except Exception as error:  # of timm's, huggingface_hub's and its HTTP client's
            raise OSError(f'the pretrained weights of {name!r} cannot be loaded ({one_line(error)}): download them '
                          f'elsewhere and give --weights FILE, or train from random weights with --no-pretrained.'
                          ) from None
    return model


def size_arguments(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for images of a size: most models take any, some are made for one."""
    fixed = (getattr(model, 'pretrained_cfg', None) or {}).get('fixed_input_size')
    return {'img_size': image_size} if image_size is not None and fixed else {}


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Load all weights but those of the classifier."""
    given, needed = read_checkpoint(path).state, model.state_dict()
    classifiers = tuple(f'{slot.path}.{slot.linear}'.strip('.') + '.' for slot in find_classifiers(model))
    wanted = {key: value for key, value in needed.items() if not key.startswith(classifiers)}
    for key, value in wanted.items():
        found = given.get(key)
        if not isinstance(found, torch.Tensor) or found.shape != value.shape:
            problem = f'is missing, one of {len(wanted)}' if found is None else \
                f'has the shape {tuple(getattr(found, "shape", ()))}, not {tuple(value.shape)}'
            raise ValueError(f'--weights {path}: {key} {problem}: the file must hold the weights of {name}, under '
                             f'timm\'s names' + (', for this --image-size.' if found is not None else '.'))
    model.load_state_dict({key: given[key] for key in wanted}, strict=False)


def keep_statistics(model: nn.Module) -> None:
    """Put the batch norms of a model in evaluation mode, but for those of its DL2PA heads.

    They then normalise by the running statistics of the pretraining, in training as in evaluation. Call it again after
    each `model.train()`. Their weights are trained on.
    """
    own = {module for head in heads_of(model) for module in head.modules()}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in own:
            module.eval()
