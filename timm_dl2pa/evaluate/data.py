"""The images that a model is evaluated on, with labels that are the model's classes."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from ..finetune.images import Images
from ..timm_scripts.checkpoint import one_line

__all__ = ['LabelledImages', 'class_places', 'open_images']

# What timm's names of data sets begin with.
_KINDS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels.

    Attributes:
        dataset: Pairs of a prepared image and a label.
        names: The names of the classes by label, or None where the data set has none.
        title: The name of the data set, without the folders above it.
        count: The number of images, or None where it is not known before they are read.
    """
    dataset: Dataset[Any]
    names: list[str] | None
    title: str
    count: int | None

    @property
    def has_pictures(self) -> bool:
        """Whether an image can be read again by its number."""
        return not isinstance(self.dataset, IterableDataset)


def open_images(
        data: str,
        config: dict[str, Any],
        *,
        split: str = 'validation',
        data_dir: str | None = None,
        download: bool = False,
        class_map: str | None = None,
) -> LabelledImages:
    """Open a folder of images, or any data set that `timm.data.create_dataset` makes.

    Args:
        data: A folder, in which one for the split may be; or timm's name of a data set.
        config: The preparation of images, as `timm.data.resolve_data_config` returns it.
        split: The split.
        data_dir: Where a named data set lies.
        download: Whether it is downloaded.
        class_map: timm's file of class names by index.

    Raises:
        FileNotFoundError: The folder does not exist, or has no images.
        ValueError: timm cannot make the data set.
        OSError: It cannot be read.
    """
    is_folder = Path(data).is_dir()
    if not is_folder and data.partition('/')[0].lower() not in _KINDS:
        raise FileNotFoundError(f"{data}: no such folder, and no data set of timm's ({', '.join(_KINDS)}/NAME).")
    given = {'root': data, 'name': ''} if is_folder else {'root': data_dir, 'name': data}
    if class_map is not None:
        given['class_map'] = class_map
    try:
        dataset = timm.data.create_dataset(**given, split=split, download=download)
    except OSError:
        raise
    except Exception as error:  # of timm's readers and the libraries behind them
        kind = FileNotFoundError if is_folder and 'Found 0 images' in str(error) else ValueError
        raise kind(f'{data}: {one_line(error)}') from None
    reader = getattr(dataset, 'reader', None)
    names = getattr(reader, 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    title = Path(data).resolve().name if is_folder else data
    if isinstance(reader, ReaderImageFolder) and class_map is None:
        # An image that cannot be read is an error, not another image; hidden folders are no classes.
        visible = {index: name for name, index in reader.class_to_idx.items() if not name.startswith('.')}
        places = {index: place for place, index in enumerate(visible)}
        files = [(path, places[label]) for path, label in reader.samples if label in places]
        return LabelledImages(Images(files, config), list(visible.values()), title, len(files))
    dataset.transform = timm.data.create_transform(**config, is_training=False)
    ordered = sorted(names, key=names.get) if names and sorted(names.values()) == list(range(len(names))) else None
    try:
        count = len(dataset)
    except TypeError:
        count = None
    return LabelledImages(dataset, ordered, title, count)


def class_places(names: Sequence[str] | None, own: Sequence[str] | None, num_classes: int) -> list[int] | None:
    """Return which class of the model each label of the data is; None where labels are the model's classes.

    Args:
        names: The names of the data's classes by label, or None.
        own: The names of the model's classes, or None.
        num_classes: C.

    Raises:
        ValueError: The data have a class that the model does not know; or one of the two has no names, and their
            numbers of classes differ.
    """
    if names is None:
        return None
    if own is not None and set(names) & set(own):
        index = {name: number for number, name in enumerate(own)}
        strange = [name for name in names if name not in index]
        if strange:
            raise ValueError(f'the data have {len(strange)} classes that the model does not know, such as '
                             f'{strange[0]!r}: leave them out.')
        return [index[name] for name in names]
    if len(names) != num_classes:
        raise ValueError(f'the data have {len(names)} classes ({names[0]!r}, ...) and the model {num_classes}, '
                         + ('with other names' if own else 'whose names it does not hold')
                         + ': give data with the same classes, or --class-map.')
    return None
