"""A head by itself, in a folder or a Hub repository: safetensors for its tensors, JSON for what builds it again."""
import hashlib
import json
import math
import os
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

from ..files.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_finite,
    check_label_names,
    find_files,
    is_kind,
    read_config,
    read_tensors,
    replace_files,
)
from .head import DL2PAConfig, DL2PAHead

__all__ = ['KINDS', 'check_format', 'head_config', 'head_files', 'load_head', 'save_head', 'with_classes']

_LIBRARY = 'timm_dl2pa'
_FORMAT = 1
# Of the values of a DL2PAConfig, in a JSON file.
KINDS = {'in_features': int, 'num_classes': int, 'dim': int, 'num_prototypes': int, 'neck': str,
         'scale': (int, float), 'learn_scale': bool, 'train_output': str, 'seed': int, 'own_prototypes': bool}


def head_files(head: DL2PAHead, label_names: list[str] | None = None) -> dict[str, bytes]:
    """Return the contents of the two files that hold a head, by their names.

    Raises:
        ValueError: There are not C label names, a tensor is not finite, or layers of the backbone's own classifier
            stand before the head's neck: they belong to the model.
    """
    if any(True for _ in head.before.parameters()) or any(True for _ in head.before.buffers()):
        raise ValueError('layers of the backbone\'s classifier stand before the neck of this head (head.before), and '
                         'are part of the model: save the whole model.')
    if label_names is not None:
        label_names = list(label_names)
    check_label_names(label_names, head.num_classes, 'label_names')
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    check_finite(tensors, 'the head')
    from .. import __version__
    weights = save(tensors, metadata={'format': 'pt'})
    config = {
        'library_name': _LIBRARY,
        'format': _FORMAT,
        'head': asdict(head.config),
        'label_names': label_names,
        'weights_sha256': hashlib.sha256(weights).hexdigest(),
        'versions': {_LIBRARY: __version__, 'torch': str(torch.__version__)},
    }
    return {WEIGHTS_NAME: weights, CONFIG_NAME: (json.dumps(config, indent=2) + '\n').encode()}


def save_head(head: DL2PAHead, folder: str | os.PathLike, *, label_names: list[str] | None = None) -> Path:
    """Write a head to a folder, from which `load_head` makes it again.

    All files are complete before the first takes the place of an older one; if that fails, the older ones come back.
    The config names the weights' sha256.

    Args:
        head: The head. Where it is on another device, copies of its tensors are written.
        folder: Made if missing.
        label_names: C names of the classes.

    Returns:
        The folder.

    Raises:
        ValueError: See `head_files`. Nothing was written.
    """
    contents = head_files(head, label_names)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix='.part-', dir=folder) as stage:
        for name, content in contents.items():
            (Path(stage) / name).write_bytes(content)
        replace_files({folder / name: Path(stage) / name for name in contents})
    return folder


def load_head(
        source: str | os.PathLike,
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
) -> DL2PAHead:
    """Make the head that a folder or a repository of the Hugging Face Hub holds, in evaluation mode.

    No prototypes are computed: they are in the file. Nothing is unpickled. Everything is checked before a head is made.

    Args:
        source: A folder, or the name of a repository ('me/head', also 'hf-hub:me/head@revision' and 'local-dir:folder'
            as timm writes them).
        num_classes: C. Default: that of the head. With another number the neck is kept and the assignment starts anew,
            on new prototypes; a warning says so.
        revision: Branch, tag or commit of the repository.
        token: See huggingface_hub, as `cache_dir`, `force_download` and `local_files_only`.
        cache_dir: Where downloads are kept.
        force_download: Download also what is kept.
        local_files_only: Take what is kept, without a connection.

    Returns:
        The head, with `label_names` (a list of C names, or None) as an attribute.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing in it.
        ValueError: There are no weights in safetensors, a file is damaged or of a newer format, or the values in it are
            no head's.
        huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises.
    """
    folder, origin = find_files(source, 'a DL2PA head', revision=revision, token=token, cache_dir=cache_dir,
                                force_download=force_download, local_files_only=local_files_only)
    config, label_names, digest = _read_head_config(folder, origin)
    tensors = read_tensors(folder / WEIGHTS_NAME, origin, _shapes(config), ('assignment', 'neck.1.num_batches_tracked'),
                           digest)
    with torch.random.fork_rng(devices=[]):
        head = DL2PAHead.from_config(config, torch.eye(config.dim)[:1].expand(config.num_prototypes, -1))
    try:
        head.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f'{origin}: {error}') from None
    if not config.learn_scale and float(tensors['scale']) != torch.tensor(config.scale).item():
        raise ValueError(f'{origin}: scale is {float(tensors["scale"])} in {WEIGHTS_NAME}, and {config.scale} in '
                         f'{CONFIG_NAME}.')
    head.config = config  # to the digit, where the buffer is rounded
    head.label_names = label_names
    if num_classes not in (None, head.num_classes):
        head = with_classes(head, num_classes, origin)
    return head.eval()


def with_classes(head: DL2PAHead, num_classes: int, origin: str | None, stacklevel: int = 3) -> DL2PAHead:
    """Return a head for another number of classes on the neck of this one, and warn if there is an origin to name."""
    if origin:
        warnings.warn(f'{origin} is a head of {head.num_classes} classes, not {num_classes}: its neck is kept, '
                      f'prototypes and assignment start anew.', stacklevel=stacklevel)
    scale = None if not head.config.learn_scale else head.config.scale
    config = replace(head.config, num_classes=num_classes, num_prototypes=None, scale=scale, own_prototypes=False)
    like = next(head.neck.parameters(), head.prototypes)
    with torch.random.fork_rng(devices=[]):
        other = DL2PAHead.from_config(config, device=like.device, dtype=like.dtype)
    other.neck.load_state_dict(head.neck.state_dict())
    if hasattr(head, 'log_scale'):
        other.log_scale.data.copy_(head.log_scale.data)
    other.label_names = None
    return other


def _read_head_config(folder: Path, origin: str) -> tuple[DL2PAConfig, list[str] | None, str]:
    """Return the head's config, the label names, and the sha256 of the weights."""
    config = read_config(folder, origin)
    if config.get('library_name') != _LIBRARY or not isinstance(config.get('head'), dict):
        raise ValueError(f'{origin}: {CONFIG_NAME} is not that of a DL2PA head. (A whole model: load it with '
                         f"timm.create_model('hf-hub:...') or load_model.)")
    check_format(config.get('format'), _FORMAT, origin)
    head = head_config(config['head'], origin)
    labels, digest = config.get('label_names'), config.get('weights_sha256')
    check_label_names(labels, head.num_classes, f'{origin}: label_names in {CONFIG_NAME}')
    if not isinstance(digest, str):
        raise ValueError(f'{origin}: {CONFIG_NAME} names no weights_sha256.')
    return head, labels, digest


def check_format(number: Any, newest: int, origin: str) -> None:
    """Raise a ValueError unless a config's format is one that this version reads."""
    if not is_kind(number, int) or number < 1:
        raise ValueError(f'{origin}: {CONFIG_NAME} names no format.')
    if number > newest:
        raise ValueError(f'{origin} has the format {number}, newer than this version of timm_dl2pa reads ({newest}): '
                         f'install a newer one.')


def head_config(given: dict[str, Any], origin: str) -> DL2PAConfig:
    """Make a head's config of what a JSON file says, or raise a ValueError."""
    unknown = given.keys() ^ {field.name for field in fields(DL2PAConfig)}
    if unknown:
        raise ValueError(f'{origin}: the head in {CONFIG_NAME} lacks, or does not know, {", ".join(sorted(unknown))}.')
    for name, kind in KINDS.items():
        if not is_kind(given[name], kind):
            raise ValueError(f'{origin}: {name} in {CONFIG_NAME} must not be {given[name]!r}.')
    try:
        if not math.isfinite(given['scale']):
            raise ValueError(f'scale in {CONFIG_NAME} must be finite, not {given["scale"]}.')
        return DL2PAConfig(**given)
    except (ValueError, OverflowError) as error:
        raise ValueError(f'{origin}: {CONFIG_NAME}: {error}') from None


def _shapes(config: DL2PAConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a head, without making one: a config may ask for any size."""
    d, features = config.dim, config.in_features
    shapes: dict[str, tuple[int, ...]] = {
        'prototypes': (config.num_prototypes, d), 'assignment': (config.num_classes,),
        'log_scale' if config.learn_scale else 'scale': ()}
    if config.neck == 'linear':
        shapes.update({'neck.weight': (d, features), 'neck.bias': (d,)})
    elif config.neck == 'linear_bn':
        shapes.update({'neck.0.weight': (d, features), 'neck.1.num_batches_tracked': (),
                       **{f'neck.1.{name}': (d,) for name in ('weight', 'bias', 'running_mean', 'running_var')}})
    return shapes


def fits(head: DL2PAHead, model: nn.Module, in_features: int) -> None:
    """Raise a ValueError unless a head takes the features that a model's classifier takes."""
    if head.in_features != in_features:
        raise ValueError(f'head takes {head.in_features} features, but the classifier of {type(model).__name__} is '
                         f'given {in_features}: it was trained on another backbone.')
