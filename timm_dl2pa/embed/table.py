"""Embeddings with file names and labels, as one file: safetensors, or parquet with pyarrow."""
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..prototypes.files import staging_folder, write_tensors

__all__ = ['Embeddings', 'check_output', 'read_embeddings', 'write_embeddings']

SUFFIXES = ('.safetensors', '.parquet')


@dataclass(frozen=True)
class Embeddings:
    """The contents of a file of `timm-dl2pa embed`.

    Attributes:
        embeddings: (N, d) float32 unit rows.
        labels: (N,) int64, indices into `label_names`; -1 for images that lay in no folder.
        names: The paths of the N images below the folder.
        label_names: The folders that held images.
        about: Of the run: model, preparation of images, versions.
    """
    embeddings: torch.Tensor
    labels: torch.Tensor
    names: list[str]
    label_names: list[str]
    about: dict[str, Any]


def check_output(out: Path) -> None:
    """Raise a ValueError unless a file of this name can be written here: by its suffix, and by what is installed."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f'--out must end in .safetensors or .parquet, not {out.name!r}.')
    if out.is_dir():
        raise ValueError(f'--out {out} is a folder: give the name of a file.')
    if out.suffix == '.parquet':
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError('--out in parquet needs pyarrow: pip install pyarrow, or give a name that ends in '
                             '.safetensors.') from None


def write_embeddings(out: Path, content: Embeddings) -> None:
    """Write a file. It is complete before it replaces an older one.

    In safetensors the tensors are `embeddings` and `labels`, and the names as UTF-8 of a JSON list in `names` and
    `label_names` (uint8): the metadata of such a file may not be large. In parquet the columns are `name`, `label` (the
    name of the folder, or null) and `embedding`.

    Raises:
        OSError: It cannot be written. An older file is as it was.
    """
    with staging_folder(out.parent) as stage:
        part = stage / out.name
        if out.suffix == '.parquet':
            _write_parquet(part, content)
        else:
            write_tensors(part, {'embeddings': content.embeddings, 'labels': content.labels,
                                 'names': _packed(content.names), 'label_names': _packed(content.label_names)},
                          {'about': json.dumps(content.about, sort_keys=True)})
        os.replace(part, out)


def _packed(names: list[str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def _write_parquet(path: Path, content: Embeddings) -> None:
    import pyarrow
    import pyarrow.parquet
    # Names that are no valid Unicode have no place in a column of text.
    names = [os.fsencode(name).decode(errors='replace') for name in content.names]
    labels = [content.label_names[label] if label >= 0 else None for label in content.labels.tolist()]
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(content.embeddings.flatten().numpy()),
                                                  content.embeddings.shape[1])
    table = pyarrow.table({'name': pyarrow.array(names, pyarrow.string()),
                           'label': pyarrow.array(labels, pyarrow.string()).dictionary_encode(), 'embedding': rows})
    pyarrow.parquet.write_table(table.replace_schema_metadata({'about': json.dumps(content.about, sort_keys=True)}),
                                path)


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Read a safetensors file of `timm-dl2pa embed`.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is not such a file, or it is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist: give a safetensors file of timm-dl2pa embed.')
    try:
        with safe_open(path, framework='pt') as file:
            # Cloned, because the file's tensors are views at arbitrary offsets.
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
            about = json.loads((file.metadata() or {}).get('about', '{}'))
        names, label_names = (json.loads(tensors[name].numpy().tobytes()) for name in ('names', 'label_names'))
        embeddings, labels = tensors['embeddings'], tensors['labels']
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is not an intact file of timm-dl2pa embed: {error}.') from None
    are_texts = all(isinstance(part, list) and all(isinstance(name, str) for name in part)
                    for part in (names, label_names)) and isinstance(about, dict)
    if not are_texts or embeddings.ndim != 2 or (embeddings.dtype, labels.dtype) != (torch.float32, torch.int64) \
            or not len(names) == len(embeddings) == len(labels) == labels.numel() \
            or bool(((labels < -1) | (labels >= len(label_names))).any()):
        raise ValueError(f'{path} is not an intact file of timm-dl2pa embed: its parts do not fit one another.')
    if not bool(embeddings.isfinite().all()):
        raise ValueError(f'{path} is not an intact file of timm-dl2pa embed: it has embeddings that are not finite.')
    return Embeddings(embeddings, labels, names, label_names, about)
