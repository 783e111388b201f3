"""Save and load whole models in a folder or a Hub repository, in timm's own format."""
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..files.folder import new_folder, replace_files
from ..files.labels import LabelNames, read_label_names
from ..files.source import find_files
from ..head import DL2PAHead, heads_of
from .model_files import read_model
from .model_stage import model_stage
from .wrapping import backbone_name, replace_classifiers

__all__ = ['check_savable', 'label_names_of', 'load_model', 'save_model']


def save_model(
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        label_names: LabelNames | None = None,
) -> Path:
    """Save a wrapped model to a folder, from which `load_model` loads it.

    The files are `model.safetensors` and `config.json` in timm's format. With timm_dl2pa imported,
    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads the model too. Before the files replace older ones,
    the model is made from them and every tensor is compared. A difference that changes no tensor and that timm does not
    record goes unnoticed: give it in `model_args`.

    Args:
        model: A timm model with a DL2PA head.
        folder: The folder, which is created if necessary.
        model_args: The arguments of `timm.create_model` for the backbone other than its name and `num_classes`, such as
            `dict(img_size=64, in_chans=1)`, as JSON values. timm records them since 1.0.31; earlier versions need them
            here.
        data_config: The preparation of images ('input_size', 'mean', ...). Default: the model's.
        label_names: The names of the C classes: a list by index, or a mapping such as `id2label` or `class_to_idx`.
            Default: those that the model was loaded with, if any.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no DL2PA head, it is not a registered timm model, its name and `model_args` make
            another model (the difference is named), a tensor is not finite, or the number of names is not C. The
            folder is unchanged.
        OSError: A file cannot be written. The folder is unchanged.

    Example:
        >>> folder = save_model(model, 'my-model')
        >>> loaded = load_model(folder)
        >>> torch.equal(loaded(images), model.eval()(images))
        True
    """
    check_savable(model)
    label_names = label_names_of(model, label_names)
    with new_folder(folder) as folder, model_stage(
            model, model_args=model_args, data_config=data_config, label_names=label_names, parent=folder) as stage:
        replace_files({folder / part.name: part for part in sorted(stage.iterdir())})
    return folder


def label_names_of(model: nn.Module, given: LabelNames | None) -> list[str] | None:
    """Return the names of a model's classes.

    Args:
        model: A wrapped model.
        given: The names, see `read_label_names`. Default: those that the model was loaded with, if any.

    Raises:
        ValueError: They are not the names of the model's classes.
    """
    return read_label_names(getattr(model, 'label_names', None) if given is None else given, model.num_classes)


def check_savable(model: nn.Module) -> None:
    """Check that a model has a DL2PA head and was made by timm.

    Args:
        model: The model to check.

    Raises:
        ValueError: It has no head, was not made by `timm.create_model`, or is the wrapper of `torch.compile`.
    """
    if not heads_of(model):
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    if hasattr(model, '_orig_mod'):
        raise ValueError('model is the wrapper of torch.compile: give the model itself, model._orig_mod.')
    if not backbone_name(model):
        raise ValueError(f'model ({type(model).__name__}) was not made by timm.create_model, and timm cannot load it: '
                         f'save or push the head alone.')


def load_model(
        source: str | os.PathLike[str],
        device: torch.device | str = 'cpu',
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
) -> nn.Module:
    """Load a wrapped model from a folder or a repository of the Hugging Face Hub, in evaluation mode.

    The prototypes are read from the file, not computed. Nothing is unpickled. All contents are checked before the model
    is made.

    Args:
        source: A folder of `save_model`, or a Hub repository of `push_model_to_hub` ('user/model'; also
            'hf-hub:user/model@revision' and 'local-dir:folder', timm's notation).
        device: The device of the model.
        num_classes: C. Default: that of the saved model. For another number the backbone and the neck are kept, and
            prototypes and assignment are new; a warning is issued.
        revision: The branch, tag or commit of the repository.
        token: The token for huggingface_hub. Default: the stored one.
        cache_dir: The folder of downloads. Default: huggingface_hub's cache.
        force_download: Whether to download files that are in the cache already.
        local_files_only: Whether to use the cache alone, without a connection.

    Returns:
        The wrapped timm model, in the dtypes of the file. Its attribute `label_names` is a list of C names or None.

    Raises:
        FileNotFoundError: The folder does not exist, or it lacks one of the files.
        ValueError: The repository has no weights in safetensors, a file is damaged or of a newer format, or the files
            do not make a DL2PA model.
        huggingface_hub.errors.HfHubHTTPError: The Hub cannot be reached, or refuses the request.

    Example:
        >>> folder = save_model(model, 'my-model')
        >>> loaded = load_model(folder)             # or load_model('me/my-model'), of the Hub
        >>> loaded.training
        False
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
        head.config = config  # the exact scale; the buffer holds it in float32
    if num_classes not in (None, saved.num_classes):
        _change_classes(model, num_classes, origin)
    return model.to(device).eval()


def _change_classes(model: nn.Module, num_classes: int, origin: str) -> None:
    """Replace the heads of a model by heads for another number of classes on the same necks, and warn."""
    warnings.warn(f'{origin} is a model for {model.num_classes} classes, not {num_classes}: its backbone and neck are '
                  f'kept, its prototypes and assignment are new.', stacklevel=3)
    old_heads = iter(heads_of(model))

    def make_head(in_features: int, **factory_kwargs: Any) -> DL2PAHead:
        return next(old_heads).with_classes(num_classes)

    replace_classifiers(model, make_head)
    for cfg in (model.pretrained_cfg, model.default_cfg):
        cfg.update(num_classes=num_classes, label_names=None, label_descriptions=None)
