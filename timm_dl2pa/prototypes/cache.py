"""The cache of prototype sets that take long to make. It may fail at any time: then the sets are made again."""
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .files import read_prototypes, save_prototypes

__all__ = ['CACHE_VARIABLE', 'cache_folder', 'read_cached', 'write_cached']

CACHE_VARIABLE = 'TIMM_DL2PA_CACHE'
# Increase this whenever the same arguments give other points, so that outdated cache files are no longer found.
VERSION = 1
_Info = TypeVar('_Info')
_logger = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Return the folder of cached prototypes.

    Returns:
        The folder that the environment variable TIMM_DL2PA_CACHE names, or `timm_dl2pa` in the user's cache folder;
        None (no caching) if the variable is empty, 0 or off.

    Raises:
        RuntimeError: The user, or a user that is named, has no home folder.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    if configured is not None:
        return None if configured.strip().lower() in ('', '0', 'off') else Path(configured).expanduser()
    base = os.environ.get('XDG_CACHE_HOME') or Path('~/.cache')
    return Path(base).expanduser() / 'timm_dl2pa'


def _cached_path(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    return folder and folder / ('-'.join(str(value) for value in key.values()) + f'-v{VERSION}.safetensors')


def read_cached(key: dict[str, Any], read_info: Callable[[dict[str, Any]], _Info]) -> tuple[torch.Tensor, _Info] | None:
    """Look up a prototype set in the cache.

    Args:
        key: The arguments that the set was made with, `num_prototypes` and `dim` among them.
        read_info: Makes what describes the set from the JSON values that were stored.

    Returns:
        The prototypes (K, d) float32 and what describes them, or None if the cache has no intact file for the key.
        Whatever is wrong with file or folder is logged as a warning.
    """
    try:
        path = _cached_path(key)
        if path is None or not path.is_file():
            return None
        prototypes, about = read_prototypes(path)
        if about.get('key') != key or prototypes.shape != (key['num_prototypes'], key['dim']) \
                or prototypes.dtype != torch.float32:
            raise ValueError(f'{path} holds another set')
        return prototypes, read_info(about['info'])
    except Exception as error:  # of any kind: the set can be made without the cache
        _logger.warning('The cached prototypes cannot be read and are made again: %s: %s', type(error).__name__, error)
        return None


def write_cached(key: dict[str, Any], prototypes: torch.Tensor, info: dict[str, Any]) -> None:
    """Store a prototype set in the cache. If that fails, a warning is logged.

    Args:
        key: The arguments that the set was made with.
        prototypes: (K, d) float32.
        info: JSON values that describe the set.
    """
    try:
        path = _cached_path(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prototypes(path, prototypes, {'key': key, 'info': info})
    except Exception as error:  # of any kind: the set has been made
        _logger.warning('The prototypes could not be cached (%s: %s). Set %s=off to disable the cache.',
                        type(error).__name__, error, CACHE_VARIABLE)
