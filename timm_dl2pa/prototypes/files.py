"""Prototype sets in safetensors files, and the cache of those that took long to make."""
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
# Rises whenever the same arguments give other points: what was kept before is then not found any more.
VERSION = 1
_NAME = 'prototypes'
_logger = logging.getLogger(__name__)


def replace_file(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, and move it there when it is complete: at once, or not at all."""
    path = Path(path)
    # A name of its own: two processes may write the same file at the same time.
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_prototypes(path: str | os.PathLike, prototypes: torch.Tensor, about: dict[str, Any] | None = None) -> None:
    """Write prototypes (K, d), and JSON values about them, to a safetensors file that `load_prototypes` reads."""
    prototypes = prototypes.detach().cpu().contiguous()
    metadata = {'format': 'pt', 'about': json.dumps(about or {}), 'sha256': _digest(prototypes)}
    replace_file(path, lambda part: save_file({_NAME: prototypes}, part, metadata=metadata))


def load_prototypes(path: str | os.PathLike) -> torch.Tensor:
    """Read prototypes (K, d) from a safetensors file: its tensor `prototypes`, or the only one in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, it is damaged, or what it holds is no prototype set.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike) -> tuple[torch.Tensor, dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file of prototypes.')
    try:
        with safe_open(path, framework='pt') as file:
            names = list(file.keys())
            if _NAME not in names and len(names) != 1:
                raise ValueError(f'{path} must hold one tensor named {_NAME!r}, or one alone, not {", ".join(names)}.')
            # A copy: the file's tensors are views at any offset.
            prototypes = file.get_tensor(_NAME if _NAME in names else names[0]).clone()
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f'{path} is not an intact safetensors file: {error}') from error
    if metadata.get('sha256', _digest(prototypes)) != _digest(prototypes):
        raise ValueError(f'{path} is damaged: its prototypes are not those that were written.')
    try:
        check_prototypes(prototypes)
        about = json.loads(metadata.get('about', '{}'))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    return prototypes, about


def _digest(prototypes: torch.Tensor) -> str:
    return hashlib.sha256(prototypes.contiguous().view(torch.uint8).numpy()).hexdigest()


def cache_folder() -> Path | None:
    """Return where made prototypes are kept: what TIMM_DL2PA_CACHE names, or timm_dl2pa in the user's cache folder.

    None if TIMM_DL2PA_CACHE is empty, 0 or off.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return None if named.strip().lower() in ('', '0', 'off') else Path(named).expanduser()
    base = os.environ.get('XDG_CACHE_HOME') or Path('~/.cache')
    return Path(base).expanduser() / 'timm_dl2pa'


def _cached_path(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    return folder and folder / ('-'.join(str(value) for value in key.values()) + f'-v{VERSION}.safetensors')


def read_cached(key: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """Return the prototypes kept under a key and what was written about them; None where there are none, or damaged."""
    path = _cached_path(key)
    if path is None or not path.is_file():
        return None
    try:
        prototypes, about = _read(path)
    except (ValueError, OSError) as error:
        _logger.warning('Prototypes are made anew: %s', error)
        return None
    if about.get('key') != key or prototypes.shape != (key['num_prototypes'], key['dim']):
        return None
    return prototypes, about


def write_cached(key: dict[str, Any], prototypes: torch.Tensor, about: dict[str, Any]) -> None:
    """Keep prototypes under a key. That nothing can be written there is said once, and is no error."""
    path = _cached_path(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prototypes(path, prototypes, {**about, 'key': key})
    except OSError as error:
        _logger.warning('Prototypes could not be kept (%s): %s=off ends the attempts.', error, CACHE_VARIABLE)
