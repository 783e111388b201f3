"""Prototype sets in safetensors files; and how all files of tensors are written."""
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checks import check_prototypes

__all__ = ['load_prototypes', 'read_prototypes', 'save_prototypes', 'staging_folder', 'write_tensors']

_TENSOR_NAME = 'prototypes'
_STAGE_PREFIX = '.timm-dl2pa-part-'
# No writer takes longer, so that an older staging folder is what a killed one left behind.
_LONGEST_WRITE = 24 * 3600


@contextmanager
def staging_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Context manager for a temporary folder, in which files are completed before they replace others.

    What writers that were killed left in the parent is removed.

    Args:
        parent: The folder in which it is made, so that both are on one file system. Default: the system's.

    Yields:
        The folder, which is removed on leaving the context.
    """
    if parent is not None:
        for left in Path(parent).glob(f'{_STAGE_PREFIX}*'):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _LONGEST_WRITE:
                    shutil.rmtree(left)
    with TemporaryDirectory(prefix=_STAGE_PREFIX, dir=parent, ignore_cleanup_errors=True) as stage:
        yield Path(stage)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, with the mode of any new file.

    Args:
        path: The file to create, in a staging folder.
        tensors: The tensors by name.
        metadata: The metadata.

    Raises:
        OSError: The file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors makes a file that nobody else can read
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f'{path.name} cannot be written: {error}') from error
    path.chmod(stat.S_IMODE(mode))


def save_prototypes(path: str | os.PathLike[str], prototypes: torch.Tensor, about: dict[str, Any] | None = None
                    ) -> None:
    """Write a prototype set to a safetensors file, which `load_prototypes` reads.

    The file is complete before it replaces an older one. Its metadata hold the sha256 of its contents.

    Args:
        path: The file to create or replace.
        prototypes: (K, d) unit rows, any floating-point dtype, on any device.
        about: JSON values that describe the set, for the file's metadata.

    Raises:
        ValueError: The prototypes are not a prototype set (see `check_prototypes`).
        OSError: The file cannot be written.

    Example:
        >>> save_prototypes('prototypes.safetensors', make_prototypes(10, 3))
        >>> load_prototypes('prototypes.safetensors').shape
        torch.Size([10, 3])
    """
    prototypes = prototypes.detach().cpu().contiguous()
    check_prototypes(prototypes)
    path, text = Path(path), json.dumps(about or {})
    with staging_folder(path.parent) as stage:
        write_tensors(stage / path.name, {_TENSOR_NAME: prototypes},
                      {'format': 'pt', 'about': text, 'sha256': _digest(prototypes, text)})
        os.replace(stage / path.name, path)


def load_prototypes(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read a prototype set from a safetensors file: its tensor `prototypes`, or its only tensor.

    Args:
        path: A file of `save_prototypes` or `timm-dl2pa prototypes --out`, or any safetensors file of one tensor.

    Returns:
        (K, d) unit rows, in the file's dtype, on the CPU.

    Raises:
        OSError: The file does not exist (FileNotFoundError), or cannot be opened.
        ValueError: The file is not in safetensors format or is damaged, it holds several tensors and none of them is
            named `prototypes`, or its tensor is not a prototype set (see `check_prototypes`).

    Example:
        >>> save_prototypes('simplex.safetensors', make_prototypes(4, 3))
        >>> prototypes = load_prototypes('simplex.safetensors')
        >>> head = DL2PAHead(in_features=16, num_classes=4, dim=3, prototypes=prototypes)
    """
    return read_prototypes(path)[0]


def read_prototypes(path: str | os.PathLike[str]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read a prototype set and the description in its file's metadata.

    Args:
        path: See `load_prototypes`.

    Returns:
        The prototypes (K, d), and the `about` of `save_prototypes`; empty if the file has none.

    Raises:
        OSError, ValueError: See `load_prototypes`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist: give the path of a safetensors file of prototypes.')
    with open(path, 'rb'):
        pass  # safetensors says in no OSError that it may not read a file
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
    text = metadata.get('about', '{}')
    try:
        check_prototypes(prototypes)
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from None
    if metadata.get('sha256', _digest(prototypes, text)) != _digest(prototypes, text) or not isinstance(about, dict):
        raise ValueError(f'{path} is damaged: its sha256 differs from the one in its metadata.')
    return prototypes, about


def _digest(prototypes: torch.Tensor, about: str) -> str:
    digest = hashlib.sha256(about.encode())
    digest.update(prototypes.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
