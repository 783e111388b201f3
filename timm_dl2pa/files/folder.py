"""Weights and config, two files in a folder or a Hub repository: found, read with care, replaced together."""
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..options import is_kind

__all__ = ['CONFIG_NAME', 'WEIGHTS_NAME', 'check_finite', 'check_format', 'check_label_names', 'find_files',
           'read_config', 'read_tensors', 'replace_files', 'sha256_of']

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = 'model.safetensors'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.tar')


def find_files(
        source: str | os.PathLike,
        what: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
) -> tuple[Path, str]:
    """Return the folder that holds config and weights, downloaded if need be, and how to call it in errors.

    Args:
        source: A folder, or the name of a repository ('me/name'; also 'hf-hub:me/name@revision' and
            'local-dir:folder').
        what: 'a DL2PA head' or the like, for errors.
        revision: Branch, tag or commit of the repository.
        token: huggingface_hub's.
        options: Further ones of `hf_hub_download`.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing in it.
        ValueError: The repository lacks a file, or has its weights as a pickle alone.
        huggingface_hub.errors.LocalEntryNotFoundError: The Hub cannot be reached, and no download is kept.
        huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises otherwise.
    """
    text = os.fspath(source)
    repository = text.removeprefix('hf-hub:')
    local = text.removeprefix('local-dir:')
    if local != text or (repository == text and Path(text).is_dir()):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (Path(local) / name).is_file():
                _refuse_pickle([path.name for path in Path(local).glob('*')], name, local)
                raise FileNotFoundError(f'{local} has no {name}: it is no folder of {what}.')
        return Path(local), local
    repository, _, said = repository.partition('@')
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', repository):
        raise FileNotFoundError(f'{text}: no such folder, and not the name of a repository on the Hub (me/name).')
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    revision = revision or said or None
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = hf_hub_download(repository, name, revision=revision, token=token, library_name='timm_dl2pa',
                                   **options)
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        why = 'local_files_only=True' if options.get('local_files_only') else \
            'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else \
            f'the Hub could not be asked ({type(cause).__name__}: {cause})' if cause else 'the Hub could not be asked'
        raise LocalEntryNotFoundError(f'{repository} has no {name} among the downloads that are kept, and {why}: '
                                      f'download it once with a connection.') from error
    except EntryNotFoundError:
        _refuse_pickle(HfApi(token=token).list_repo_files(repository, revision=revision), name, repository)
        raise ValueError(f'{repository} has no {name}: it is no repository of {what}.') from None
    return Path(path).parent, repository


def _refuse_pickle(names: list[str], missing: str, origin: str) -> None:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if missing == WEIGHTS_NAME and pickles:
        raise ValueError(f'{origin} has its weights as a pickle alone ({pickles[0]}), which could run any code and is '
                         f'not loaded. Ask its owner for {WEIGHTS_NAME}.')


def read_config(folder: Path, origin: str) -> dict[str, Any]:
    """Read the config, or raise a ValueError if it is no JSON object."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{origin}: {CONFIG_NAME} is damaged: {error}') from None
    if not isinstance(config, dict):
        raise ValueError(f'{origin}: {CONFIG_NAME} is damaged: it is no JSON object.')
    return config


def check_label_names(label_names: Any, num_classes: int, where: str) -> None:
    """Raise a ValueError unless there are C names, or None."""
    if label_names is not None and not (isinstance(label_names, (list, tuple)) and len(label_names) == num_classes
                                        and all(isinstance(name, str) for name in label_names)):
        given = len(label_names) if isinstance(label_names, (list, tuple)) else label_names
        raise ValueError(f'{where} must be {num_classes} names, one a class, not {given!r}.')


def read_tensors(
        path: Path,
        origin: str,
        shapes: dict[str, tuple[int, ...]],
        whole_numbers: Collection[str],
        digest: str | None,
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, once its header has told that they are those.

    Args:
        path: The file.
        origin: How to call it in errors.
        shapes: What must be in it, nothing more and nothing less.
        whole_numbers: Names of those tensors that are not floating point.
        digest: The file's sha256; None where nobody wrote it down.

    Raises:
        ValueError: It is damaged, or holds other tensors or values that are not finite.
    """
    again = 'Download it again (force_download=True), or have it saved again.'
    try:
        with safe_open(path, framework='pt') as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(shapes.keys() | found.keys()):
                if shapes.get(name) != found.get(name):
                    raise ValueError(f'{origin}: {WEIGHTS_NAME} does not fit {CONFIG_NAME}: {name} is '
                                     f'{found.get(name, "missing")}, not {shapes.get(name, "there")}.')
            if digest is not None and sha256_of(path) != digest:
                raise ValueError(f'{origin}: {WEIGHTS_NAME} is not what {CONFIG_NAME} was written for (its sha256 is '
                                 f'another). {again}')
            # Copies: the file's tensors are views at any offset, and kernels for unaligned weights round differently.
            tensors = {name: file.get_tensor(name).clone() for name in found}
    except SafetensorError as error:
        raise ValueError(f'{origin}: {WEIGHTS_NAME} is damaged: {error}. {again}') from None
    check_finite(tensors, f'{origin}: {WEIGHTS_NAME}')
    for name, tensor in tensors.items():
        if tensor.is_floating_point() == (name in whole_numbers):
            raise ValueError(f'{origin}: {name} in {WEIGHTS_NAME} must not be {tensor.dtype}.')
    return tensors


def check_format(number: Any, newest: int, origin: str) -> None:
    """Raise a ValueError unless a config's format is one that this version reads."""
    if not is_kind(number, int) or number < 1:
        raise ValueError(f'{origin}: {CONFIG_NAME} names no format.')
    if number > newest:
        raise ValueError(f'{origin} has the format {number}, newer than this version of timm_dl2pa reads ({newest}): '
                         f'install a newer one.')


def check_finite(tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Raise a ValueError that names the first tensor with values that are not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f'{origin}: {name} is not finite.')


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def replace_files(parts: dict[Path, Path]) -> None:
    """Let each complete file (a value) take the place of its target (the key) on the same disk: all, or none.

    Each step is atomic. If one fails, what was there before is put back.
    """
    mark = uuid.uuid4().hex
    before = {target: target.with_name(f'{target.name}.{mark}.old') for target in parts if target.exists()}
    done = []
    try:
        for target, old in before.items():
            try:
                os.link(target, old)
            except OSError:  # a disk without hard links
                shutil.copy2(target, old)
        for target, part in parts.items():
            os.replace(part, target)
            done.append(target)
    except BaseException:
        for target in done:
            if target in before:
                os.replace(before[target], target)
            else:
                target.unlink()
        raise
    finally:
        for old in before.values():
            old.unlink(missing_ok=True)
