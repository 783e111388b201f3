"""Write the files of a whole model in timm's own format, and check that timm makes the same model from them."""
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf

from ..files.folder import CONFIG_NAME, WEIGHTS_NAME
from ..files.labels import LabelNames, read_label_names
from ..files.tensors import check_finite, sha256_of
from ..head import heads_of
from ..options import PREFIX
from ..prototypes.files import staging_folder, write_tensors
from ..version import __version__
from .model_files import FORMAT, PACKAGE_KEY
from .wrapping import backbone_name, registry_options

__all__ = ['model_stage']


@contextmanager
def model_stage(
        model: nn.Module,
        *,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        label_names: LabelNames | None = None,
        parent: str | os.PathLike[str] | None = None,
) -> Iterator[Path]:
    """Context manager that writes a model's two files to a temporary folder, after checking that timm can load them.

    Args:
        model: A wrapped model, or a folded one.
        model_args: The arguments of `timm.create_model` for the backbone, if timm did not record them.
        data_config: The preparation of images. Default: the model's.
        label_names: The names of the C classes, if known.
        parent: The folder in which the temporary folder is created. Default: the system's.

    Yields:
        The temporary folder, which is removed on leaving the context.

    Raises:
        ValueError: The model was not made by timm, a tensor is not finite, the number of names is not C, the arguments
            are not JSON values, or the files make another model.
    """
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        raise ValueError(f'model ({type(model).__name__}) was not made by timm.create_model, and timm cannot load it: '
                         f'save or push the head alone.')
    label_names = read_label_names(label_names, model.num_classes)
    for head in heads_of(model):
        head.settle()  # an average, as of EMA weights
    # Cloned, because safetensors refuses shared memory and tensors that are not contiguous.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    check_finite(state, 'the model')
    with staging_folder(parent) as folder:
        write_tensors(folder / WEIGHTS_NAME, state, {'format': 'pt'})
        config = _write_config(model, model_args or {}, data_config, label_names, folder)
        _check_reloaded(state, config.get('model_args', {}), folder)
        yield folder


def _write_config(
        model: nn.Module,
        model_args: dict[str, Any],
        data_config: dict[str, Any] | None,
        label_names: list[str] | None,
        folder: Path,
) -> dict[str, Any]:
    """Write the config in timm's format, with this package's entries, and return it."""
    heads = heads_of(model)
    options = {**registry_options(heads[0].config), f'{PREFIX}backbone': backbone_name(model)} if heads else {}
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise ValueError(f'model_args must be JSON values: {error}.') from None
    data_arguments = {'data_config': data_config} if data_config else {}
    if data_arguments and 'data_config' not in inspect.signature(save_config_for_hf).parameters:
        raise ValueError(f'data_config needs timm 1.0.31 or newer, not {timm.__version__}.')
    # timm adds the arguments that it recorded. Those of this package may name a file of prototypes or concern training,
    # and are overridden.
    recorded = [name for name in getattr(model, '_model_args', {}) if name.startswith(PREFIX)]
    path = folder / CONFIG_NAME
    extra: dict[str, Any] = {'label_names': label_names} if label_names else {}
    if heads:
        extra[PACKAGE_KEY] = {
            'format': FORMAT,
            'head': asdict(heads[0].config),
            'weights_sha256': sha256_of(folder / WEIGHTS_NAME),
            'versions': {PACKAGE_KEY: __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
        }
    save_config_for_hf(model, path, model_config=extra,
                       model_args={**dict.fromkeys(recorded), **options, **model_args}, **data_arguments)
    config = json.loads(path.read_text(encoding='utf-8'))
    # The number of classes stands in the config itself. Beside that, transformers' TimmWrapper takes no other one.
    arguments = {name: value for name, value in (config.get('model_args') or {}).items()
                 if name in options or not (name.startswith(PREFIX) or name == 'num_classes')}
    config['model_args'] = arguments
    # The names of the classes that the weights once had: before 1.0.31, timm writes them again.
    for name in ('label_names', 'label_descriptions'):
        config.get('pretrained_cfg', {}).pop(name, None)
        if not label_names:
            config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    return config


def _check_reloaded(state: dict[str, torch.Tensor], arguments: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError unless timm loads the same tensors from the files."""
    remedy = 'Give model_args, the arguments of timm.create_model.'
    with torch.random.fork_rng(devices=[]):
        try:
            reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
        except Exception as error:
            raise ValueError(f'timm cannot load the model from its files, with the arguments {arguments}: '
                             f'{str(error).rstrip(".")}. {remedy}') from error
    for name in sorted(state.keys() | reloaded.keys()):
        if name not in state or name not in reloaded or state[name].shape != reloaded[name].shape or not torch.equal(
                state[name], reloaded[name].cpu().to(state[name].dtype)):
            raise ValueError(f'timm makes another model with the arguments {arguments}: {name} differs. {remedy}')
