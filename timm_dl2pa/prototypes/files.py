"""Prototype sets in safetensors files, and a cache of the sets that take long to make."""
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checks import check_prototypes

__all__ = ['CACHE_VARIABLE', 'cache_folder', 'load_prototypes', 'read_cached', 'replace_file', 'save_prototypes',
           'write_cached']

CACHE_VARIABLE = 'TIMM_DL2PA_CACHE'
# Increase this whenever the same arguments give other points, so that outdated cache files are no longer found.
VERSION = 1
_TENSOR_NAME = 'prototypes'
_logger = logging.getLogger(__name__)


def replace_file(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: to a temporary file in the same folder, which then replaces `path`.

    If `write` raises, `path` is unchanged.

    Args:
        path: The file to create or replace.
        write: Writes the content to the path that it is given.
    """
    path = Path(path)
    # A unique name, because two processes may write the same file at the same time.
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_prototypes(path: str | os.PathLike, prototypes: torch.Tensor, about: dict[str, Any] | None = None) -> None:
    """Write a prototype set to a safetensors file, which `load_prototypes` reads.

    The file is complete before it replaces an older one. Its metadata hold the sha256 of the prototypes.

    Args:
        path: The file to create or replace.
        prototypes: (K, d) unit rows, any floating-point dtype, on any device.
        about: JSON values that describe the set, for the file's metadata.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> save_prototypes('prototypes.safetensors', make_prototypes(10, 3))
        >>> load_prototypes('prototypes.safetensors').shape
        torch.Size([10, 3])
    """
    prototypes = prototypes.detach().cpu().contiguous()
    metadata = {'format': 'pt', 'about': json.dumps(about or {}), 'sha256': _digest(prototypes)}
    replace_file(path, lambda temporary: save_file({_TENSOR_NAME: prototypes}, temporary, metadata=metadata))


def load_prototypes(path: str | os.PathLike) -> torch.Tensor:
    """Read a prototype set from a safetensors file: its tensor `prototypes`, or its only tensor.

    Args:
        path: A file of `save_prototypes` or `timm-dl2pa prototypes --out`, or any safetensors file of one tensor.

    Returns:
        (K, d) unit rows, in the file's dtype, on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not in safetensors format or is damaged, it holds several tensors and none of them is
            named `prototypes`, or its tensor is not a prototype set (see `check_prototypes`).

    Example:
        >>> save_prototypes('simplex.safetensors', make_prototypes(4, 3))
        >>> prototypes = load_prototypes('simplex.safetensors')
        >>> head = DL2PAHead(in_features=16, num_classes=4, dim=3, prototypes=prototypes)
    """
    return _read_file(path)[0]


def _read_file(path: str | os.PathLike) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the prototypes of a file, checked, and the `about` of its metadata."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist: give the path of a safetensors file of prototypes.')
    try:
        with safe_open(path, framework='pt') as file:
            names = list(file.keys())
            if _TENSOR_NAME not in names and len(names) != 1:
                raise ValueError(f'{path} must hold one tensor named {_TENSOR_NAME!r}, or a single tensor, not '
                                 f'{", ".join(names)}.')
            # Cloned, because the file's tensors are views at arbitrary offsets.
            prototypes = file.get_tensor(_TENSOR_NAME if _TENSOR_NAME in names else names[0]).clone()
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f'{path} is not an intact safetensors file: {error}') from error
    if metadata.get('sha256', _digest(prototypes)) != _digest(prototypes):
        raise ValueError(f'{path} is damaged: the sha256 of its prototypes differs from the one in its metadata.')
    try:
        check_prototypes(prototypes)
        about = json.loads(metadata.get('about', '{}'))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    return prototypes, about


def _digest(prototypes: torch.Tensor) -> str:
    return hashlib.sha256(prototypes.contiguous().view(torch.uint8).numpy()).hexdigest()


def cache_folder() -> Path | None:
    """Return the folder of cached prototypes.

    Returns:
        The folder that the environment variable TIMM_DL2PA_CACHE names, or `timm_dl2pa` in the user's cache folder;
        None (no caching) if the variable is empty, 0 or off.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    if configured is not None:
        return None if configured.strip().lower() in ('', '0', 'off') else Path(configured).expanduser()
    base = os.environ.get('XDG_CACHE_HOME') or Path('~/.cache')
    return Path(base).expanduser() / 'timm_dl2pa'


def _cached_path(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    return folder and folder / ('-'.join(str(value) for value in key.values()) + f'-v{VERSION}.safetensors')


def read_cached(key: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """Look up a prototype set in the cache.

    Args:
        key: The arguments that the set was made with, `num_prototypes` and `dim` among them.

    Returns:
        The prototypes (K, d) and their `about`, or None if the cache has no intact file for the key. A damaged file is
        logged as a warning.
    """
    path = _cached_path(key)
    if path is None or not path.is_file():
        return None
    try:
        prototypes, about = _read_file(path)
    except (ValueError, OSError) as error:
        _logger.warning('The cached prototypes cannot be read and are made again: %s', error)
        return None
    if about.get('key') != key or prototypes.shape != (key['num_prototypes'], key['dim']):
        return None
    return prototypes, about


def write_cached(key: dict[str, Any], prototypes: torch.Tensor, about: dict[str, Any]) -> None:
    """Store a prototype set in the cache. If the file cannot be written, a warning is logged.

    Args:
        key: The arguments that the set was made with.
        prototypes: (K, d).
        about: JSON values that describe the set.
    """
    path = _cached_path(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prototypes(path, prototypes, {**about, 'key': key})
    except OSError as error:
        _logger.warning('The prototypes could not be cached (%s). Set %s=off to disable the cache.', error,
                        CACHE_VARIABLE)
