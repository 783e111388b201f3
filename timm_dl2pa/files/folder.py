"""Config and weights, two files in a folder or a Hub repository: find, check, read and replace them."""
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..values import is_kind

__all__ = ['CONFIG_NAME', 'WEIGHTS_NAME', 'check_finite', 'check_format', 'check_variances', 'find_files',
           'new_folder', 'read_config', 'read_tensors', 'replace_files', 'sha256_of']

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = 'model.safetensors'
# As safetensors names them.
_FLOAT_DTYPES = ('F16', 'BF16', 'F32', 'F64')
_WHOLE_NUMBER_DTYPES = ('I8', 'I16', 'I32', 'I64', 'U8')
_PICKLE_SUFFIXES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.tar')


def find_files(
        source: str | os.PathLike,
        what: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
) -> tuple[Path, str]:
    """Find the folder that holds config and weights. A Hub repository is downloaded to the cache.

    Args:
        source: A folder or a Hub repository ('user/name'; also 'hf-hub:user/name@revision' and 'local-dir:folder').
        what: The expected content for error messages, such as 'a DL2PA head'.
        revision: The branch, tag or commit of the repository.
        token: The token for huggingface_hub.
        options: Further options of `hf_hub_download`.

    Returns:
        The folder, and the name of the source for error messages.

    Raises:
        FileNotFoundError: The folder does not exist, or it lacks one of the files.
        ValueError: The repository lacks one of the files, or has its weights only as a pickle.
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub cannot be reached, and the cache has no copy.
        huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub.
    """
    text = os.fspath(source)
    repository = text.removeprefix('hf-hub:')
    local = text.removeprefix('local-dir:')
    if local != text or (repository == text and Path(text).is_dir()):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (Path(local) / name).is_file():
                _refuse_pickle([path.name for path in Path(local).glob('*')], name, local)
                raise FileNotFoundError(f'{local} has no {name}: it does not hold {what}.')
        return Path(local), local
    repository, _, named_revision = repository.partition('@')
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', repository):
        raise FileNotFoundError(f'{text} is neither a folder nor the name of a repository on the Hub (user/name).')
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    revision = revision or named_revision or None
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = hf_hub_download(repository, name, revision=revision, token=token, library_name='timm_dl2pa',
                                   **options)
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        reason = 'local_files_only=True' if options.get('local_files_only') else \
            'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else \
            f'the request to the Hub failed ({type(cause).__name__}: {cause})' if cause else \
            'the request to the Hub failed'
        raise LocalEntryNotFoundError(f'The cache has no {name} of {repository}, and {reason}: download it once with '
                                      f'a connection.') from error
    except EntryNotFoundError:
        _refuse_pickle(HfApi(token=token).list_repo_files(repository, revision=revision), name, repository)
        raise ValueError(f'{repository} has no {name}: it does not hold {what}.') from None
    return Path(path).parent, repository


def _refuse_pickle(names: list[str], missing: str, origin: str) -> None:
    """Raise a ValueError if the missing file is the weights, and there are weights in a pickle."""
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if missing == WEIGHTS_NAME and pickles:
        raise ValueError(f'{origin} has its weights only as a pickle ({pickles[0]}), which could run any code and is '
                         f'not loaded. Ask its owner for {WEIGHTS_NAME}.')


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


def read_tensors(
        path: Path,
        origin: str,
        shapes: dict[str, tuple[int, ...]],
        whole_numbers: Collection[str],
        digest: str | None,
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, after their names and shapes in its header have been checked.

    Args:
        path: The file.
        origin: The name of the source for error messages.
        shapes: The shapes of all expected tensors by name.
        whole_numbers: The names of the tensors that are not of a floating-point dtype.
        digest: The sha256 of the file, or None if it is unknown.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: The file is damaged, it has other tensors, shapes or kinds of dtype, or a value is not finite or a
            negative variance.
    """
    remedy = 'Download it again (force_download=True), or ask its owner to save it again.'
    try:
        with safe_open(path, framework='pt') as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(shapes.keys() | found.keys()):
                if shapes.get(name) != found.get(name):
                    problem = 'is missing' if name not in found else 'is not expected' if name not in shapes else \
                        f'has the shape {found[name]}, not {shapes[name]}'
                    raise ValueError(f'{origin}: {WEIGHTS_NAME} does not match {CONFIG_NAME}: {name} {problem}.')
            if digest is not None and sha256_of(path) != digest:
                raise ValueError(f'{origin}: {WEIGHTS_NAME} does not match {CONFIG_NAME}: its sha256 differs. '
                                 f'{remedy}')
            for name in found:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in (_WHOLE_NUMBER_DTYPES if name in whole_numbers else _FLOAT_DTYPES):
                    expected = 'an integer' if name in whole_numbers else 'a floating-point'
                    raise ValueError(f'{origin}: {name} in {WEIGHTS_NAME} must have {expected} dtype, not {dtype}.')
            # Cloned, because the file's tensors are views at arbitrary offsets, and kernels for unaligned weights round
            # differently.
            tensors = {name: file.get_tensor(name).clone() for name in found}
    except SafetensorError as error:
        raise ValueError(f'{origin}: {WEIGHTS_NAME} is damaged: {error}. {remedy}') from None
    check_finite(tensors, f'{origin}: {WEIGHTS_NAME}')
    check_variances(tensors, f'{origin}: {WEIGHTS_NAME}: ')
    return tensors


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


def check_finite(tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Check that all floating-point tensors are finite.

    Args:
        tensors: The tensors by name.
        origin: The name of their source for error messages.

    Raises:
        ValueError: A tensor has values that are not finite. The first one is named.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f'{origin}: {name} is not finite.')


def check_variances(tensors: Mapping[str, torch.Tensor], origin: str = '') -> None:
    """Check that no running variance of a batch norm is negative.

    Args:
        tensors: The tensors by name.
        origin: The beginning of error messages.

    Raises:
        ValueError: One is. It is named.
    """
    for name, tensor in tensors.items():
        if name.endswith('running_var') and tensor.is_floating_point() and bool((tensor < 0).any()):
            raise ValueError(f'{origin}{name} must not be negative: it holds variances.')


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file.

    Args:
        path: The file.

    Returns:
        The digest, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
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
