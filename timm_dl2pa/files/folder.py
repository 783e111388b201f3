"""Config and weights, two files in a folder: their names, the config, and how they are replaced."""
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..values import is_kind

__all__ = ['CONFIG_NAME', 'WEIGHTS_NAME', 'check_format', 'new_folder', 'read_config', 'replace_files']

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = 'model.safetensors'


def read_config(folder: Path, origin: str) -> dict[str, Any]:
    """Read the config.

    Args:
        folder: The folder that holds `config.json`.
        origin: The name of the source for error messages.

    Returns:
        The JSON object in the file.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{origin}: {CONFIG_NAME} is damaged: {error}') from None
    if not isinstance(config, dict):
        raise ValueError(f'{origin}: {CONFIG_NAME} is damaged: it must hold a JSON object.')
    return config


def check_format(number: Any, newest: int, origin: str) -> None:
    """Check the format number of a config.

    Args:
        number: The value of `format` in the config.
        newest: The newest format that this version reads.
        origin: The name of the source for error messages.

    Raises:
        ValueError: It is not a format number, or it is newer.
    """
    if not is_kind(number, int) or number < 1:
        raise ValueError(f'{origin}: {CONFIG_NAME} must state its format, a positive integer, not {number!r}.')
    if number > newest:
        raise ValueError(f'{origin} has the format {number}, newer than the formats that this version of timm_dl2pa '
                         f'reads (up to {newest}): install a newer version.')


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager that creates a folder if necessary, and removes what it created if its body raises.

    Args:
        folder: The folder.

    Yields:
        The folder.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # something else is in it by now
            for path in created:
                path.rmdir()
        raise


def replace_files(parts: dict[Path, Path]) -> None:
    """Replace several files together: all of them, or none.

    Each replacement is atomic. If one fails, the earlier files are restored.

    Args:
        parts: The complete new files, by the targets that they replace. Both are on the same file system.

    Raises:
        OSError: A file cannot be replaced. All targets are as they were.
    """
    unique = uuid.uuid4().hex
    backups = {target: target.with_name(f'{target.name}.{unique}.old') for target in parts if target.exists()}
    done = []
    try:
        for target, backup in backups.items():
            try:
                os.link(target, backup)
            except OSError:  # a file system without hard links
                shutil.copy2(target, backup)
        for target, part in parts.items():
            os.replace(part, target)
            done.append(target)
    except BaseException:
        for target in done:
            if target in backups:
                os.replace(backups[target], target)
            else:
                target.unlink()
        raise
    finally:
        for backup in backups.values():
            backup.unlink(missing_ok=True)
