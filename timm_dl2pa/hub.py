"""Whole models in a folder: safetensors for the weights, JSON for what rebuilds the model."""
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .head import DL2PAConfig, DL2PAHead, heads_of
from .models import backbone_name, replace_classifiers
from .prototypes.files import replace_file

__all__ = ['load_model', 'save_model']

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = 'model.safetensors'
_FORMAT = 1


def save_model(
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        model_args: dict[str, Any] | None = None,
        label_names: list[str] | None = None,
) -> Path:
    """Write a wrapped model to a folder, from which `load_model` makes it again.

    Writes `model.safetensors` and `config.json`. Before anything is written the model is rebuilt, and the names and
    shapes of its tensors are compared; each file replaces an older one only when it is complete. What changes no tensor
    (another `global_pool`, say) is not noticed: name it in `model_args`.

    Args:
        model: A timm model with a DL2PA head.
        folder: Made if missing.
        model_args: The arguments that `timm.create_model` made the backbone with, other than its name and
            `num_classes` (say, `dict(img_size=64, in_chans=1)`). They must be JSON values.
        label_names: C names of the classes.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no DL2PA head, is no registered timm model, cannot be rebuilt from its name and
            `model_args` (the difference is named), or the number of names is not C.
    """
    heads = heads_of(model)
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    head = heads[0]
    if label_names is not None and len(label_names) != head.num_classes:
        raise ValueError(f'label_names has {len(label_names)} names for {head.num_classes} classes.')
    pretrained_cfg = getattr(model, 'pretrained_cfg', None) or {}
    if not pretrained_cfg.get('architecture'):
        raise ValueError(f'model ({type(model).__name__}) was not made by timm.create_model: its pretrained_cfg names '
                         f'no architecture.')
    config = {
        'format': _FORMAT,
        'architecture': backbone_name(model),
        'model_args': model_args or {},
        'head': asdict(head.config),
        'label_names': label_names,
        'versions': {'timm_dl2pa': _own_version(), 'timm': timm.__version__, 'torch': str(torch.__version__)},
    }
    try:
        text = json.dumps(config, indent=2) + '\n'
    except TypeError as error:
        raise ValueError(f'model_args and label_names must be JSON values: {error}') from None
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    _check_tensors(tensors, _build(config, head.prototypes), 'the model')

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={'format': 'pt'}))
    replace_file(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding='utf-8'))
    return folder


def load_model(folder: str | os.PathLike, device: torch.device | str = 'cpu') -> nn.Module:
    """Make the model that `save_model` wrote, in evaluation mode. No prototypes are computed, nothing is unpickled.

    Args:
        folder: Holds `model.safetensors` and `config.json`.
        device: Where the model goes.

    Returns:
        The wrapped timm model, with `label_names` (a list of C names, or None) as an attribute.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: A file is damaged, of a newer format, or the two do not fit each other.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} has no {name}: it is not a folder that save_model wrote.')
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
        # Copies: the file's tensors are views at any offset, and the kernels for unaligned weights round differently.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_NAME).items()}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{folder} is damaged: {error}') from error
    _check_config(config, folder)
    head = config['head']
    shape = (head['num_prototypes'], head['dim'])
    prototypes = next((tensor for name, tensor in tensors.items()
                       if name.rpartition('.')[2] == 'prototypes' and tuple(tensor.shape) == shape), None)
    if prototypes is None:
        raise ValueError(f'{folder / WEIGHTS_NAME} has no prototypes of the shape {shape} that its config names.')
    model = _build(config, prototypes)
    _check_tensors(tensors, model, str(folder / WEIGHTS_NAME))
    # With the files' dtypes: a model saved in bfloat16 comes back in bfloat16.
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f'{folder / WEIGHTS_NAME} cannot be loaded: {error}') from None
    model.label_names = config['label_names']
    return model.to(device).eval()


def _own_version() -> str:
    from . import __version__
    return __version__


def _build(config: dict[str, Any], prototypes: torch.Tensor) -> nn.Module:
    """Make the model of a config with random weights. The host's random state stays as it was."""
    head = DL2PAConfig(**config['head'])

    def make_head(in_features: int, **place: Any) -> DL2PAHead:
        return DL2PAHead.from_config(replace(head, in_features=in_features), prototypes, **place)

    with torch.random.fork_rng(devices=[]):
        try:
            model = timm.create_model(
                config['architecture'], pretrained=False, num_classes=head.num_classes, **config['model_args'])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f'timm cannot make {config["architecture"]!r} with the arguments '
                             f'{config["model_args"]}: {error}') from error
        return replace_classifiers(model, make_head)


def _check_tensors(tensors: dict[str, torch.Tensor], model: nn.Module, origin: str) -> None:
    """Raise a ValueError unless the tensors have the names and shapes of the rebuilt model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f'{origin} is not what its architecture and model_args rebuild: {name} is '
                             f'{found.get(name, "missing")}, not {expected.get(name, "there")}. Give save_model the '
                             f'model_args that timm.create_model had.')


def _check_config(config: Any, folder: Path) -> None:
    where = folder / CONFIG_NAME
    if not isinstance(config, dict) or not isinstance(config.get('format'), int):
        raise ValueError(f'{where} was not written by save_model: it names no format.')
    if config['format'] > _FORMAT:
        raise ValueError(f'{where} has the format {config["format"]}, newer than this version of timm_dl2pa reads '
                         f'({_FORMAT}): install a newer one.')
    kinds = {'architecture': str, 'model_args': dict, 'head': dict, 'label_names': (list, type(None))}
    for name, kind in kinds.items():
        if not isinstance(config.get(name, ...), kind):
            raise ValueError(f'{where} has no valid {name!r}.')
    unknown = config['head'].keys() ^ {field.name for field in fields(DL2PAConfig)}
    if unknown:
        raise ValueError(f"{where}: 'head' lacks, or does not know, {', '.join(sorted(unknown))}.")
