"""Whole models in a folder or a Hub repository, in timm's own format: saved, and loaded with care."""
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..files.folder import find_files, replace_files
from ..head import DL2PAHead, heads_of
from .model_files import model_stage, read_model
from .wrapping import backbone_name, replace_classifiers

__all__ = ['check_savable', 'load_model', 'save_model']


def save_model(
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        label_names: list[str] | None = None,
) -> Path:
    """Write a wrapped model to a folder, from which `load_model` makes it again.

    The files are `model.safetensors` and `config.json`, as timm writes them, so that with timm_dl2pa imported
    `timm.create_model('local-dir:FOLDER', pretrained=True)` makes the model too. Before they take the place of older
    ones the model is made again from them, and every tensor compared. What changes no tensor and timm does not record
    is not noticed: name it in `model_args`.

    Args:
        model: A timm model with a DL2PA head.
        folder: Made if missing.
        model_args: The arguments that `timm.create_model` made the backbone with, other than its name and
            `num_classes` (say, `dict(img_size=64, in_chans=1)`), as JSON values. timm records them from 1.0.31 on;
            earlier versions need them here.
        data_config: How images are prepared ('input_size', 'mean', ...). Default: the model's.
        label_names: C names of the classes. Default: those that the model was loaded with, if any.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no DL2PA head, is no registered timm model, cannot be made again from its name and
            `model_args` (the difference is named), a tensor is not finite, or the number of names is not C. What was
            in the folder is as it was.
    """
    check_savable(model)
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with model_stage(model, model_args=model_args, data_config=data_config, parent=folder,
                         label_names=label_names or getattr(model, 'label_names', None)) as stage:
            replace_files({folder / part.name: part for part in sorted(stage.iterdir())})
    except BaseException:
        if made:
            folder.rmdir()
        raise
    return folder


def check_savable(model: nn.Module) -> None:
    """Raise a ValueError unless a model has a DL2PA head, and timm can make it."""
    if not heads_of(model):
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    if hasattr(model, '_orig_mod'):
        raise ValueError('model is what torch.compile made: give the model itself, model._orig_mod.')
    if not backbone_name(model):
        raise ValueError(f'model ({type(model).__name__}) was not made by timm.create_model, so that timm could not '
                         f'make it again: save or push the head alone.')


def load_model(
        source: str | os.PathLike,
        device: torch.device | str = 'cpu',
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
) -> nn.Module:
    """Make the model that a folder or a repository of the Hugging Face Hub holds, in evaluation mode.

    No prototypes are computed: they are in the file. Nothing is unpickled. Everything is checked before a model is
    made.

    Args:
        source: A folder that `save_model` wrote, or the name of a repository that `push_model_to_hub` made ('me/model',
            also 'hf-hub:me/model@revision' and 'local-dir:folder' as timm writes them).
        device: Where the model goes.
        num_classes: C. Default: that of the model. With another number backbone and neck are kept and the assignment
            starts anew, on new prototypes; a warning says so.
        revision: Branch, tag or commit of the repository.
        token: See huggingface_hub, as `cache_dir`, `force_download` and `local_files_only`.
        cache_dir: Where downloads are kept.
        force_download: Download also what is kept.
        local_files_only: Take what is kept, without a connection.

    Returns:
        The wrapped timm model, in the files' dtypes, with `label_names` (a list of C names, or None) as an attribute.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing in it.
        ValueError: There are no weights in safetensors, a file is damaged or of a newer format, or they do not make a
            DL2PA model.
        huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises.
    """
    folder, origin = find_files(source, 'a DL2PA model', revision=revision, token=token, cache_dir=cache_dir,
                                force_download=force_download, local_files_only=local_files_only)
    saved, tensors = read_model(folder, origin)
    with torch.random.fork_rng(devices=[]):
        model = saved.build()
    configs = [head.config for head in heads_of(model)]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f'{origin}: {error}') from None
    for head, config in zip(heads_of(model), configs):
        head.config = config  # to the digit, where the buffer is rounded
    if num_classes not in (None, saved.num_classes):
        _change_classes(model, num_classes, origin)
    return model.to(device).eval()


def _change_classes(model: nn.Module, num_classes: int, origin: str) -> None:
    """Put heads for another number of classes on the necks of a model, and warn."""
    warnings.warn(f'{origin} is a model of {model.num_classes} classes, not {num_classes}: backbone and neck are kept, '
                  f'prototypes and assignment are new.', stacklevel=3)
    old = iter(heads_of(model))

    def make_head(in_features: int, **place: Any) -> DL2PAHead:
        return next(old).with_classes(num_classes)

    replace_classifiers(model, make_head)
    model.label_names = None
    for cfg in (model.pretrained_cfg, model.default_cfg):
        cfg.update(num_classes=num_classes, label_names=None, label_descriptions=None)
