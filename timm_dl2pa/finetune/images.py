"""The images of a fine-tuning: an ImageFolder, with a part for validation or without one, and its transforms."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

__all__ = ['ImageFiles', 'Images', 'UnreadableImageError', 'find_images', 'split_indices']

VALIDATION_FOLDERS = ('val', 'valid', 'validation', 'test')
VALIDATION_SHARE = 0.2
# Light: a pretrained backbone needs few epochs. timm's defaults (scale from 0.08, colours) are for hundreds of them.
_AUGMENTATION = {'scale': (0.6, 1.0), 'hflip': 0.5, 'color_jitter': None}


class UnreadableImageError(ValueError):
    """An image cannot be read. Its file is named."""

    def one_line(self) -> str:
        """Return the message without the traceback that a worker of a DataLoader puts around it."""
        return str(self).strip().rpartition(f'{type(self).__name__}: ')[2]


@dataclass(frozen=True)
class ImageFiles:
    """The files of a fine-tuning.

    Attributes:
        train: The path and the class of each training image.
        validation: Those of the validation images.
        names: The names of the C classes.
        held_out: Whether the validation images were held out of one folder.
    """
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    names: list[str]
    held_out: bool


class Images(Dataset[tuple[Any, int]]):
    """Images of files, with their classes.

    Args:
        files: The path and the class of each image.
        config: The preparation of images, as `timm.data.resolve_data_config` returns it.
        augment: Whether they are cropped and flipped at random, for training.
    """

    def __init__(self, files: Sequence[tuple[str, int]], config: dict[str, Any], augment: bool = False):
        self.files = files
        self.transform: Any = create_transform(**config, is_training=augment, **(_AUGMENTATION if augment else {}))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.files[index]
        return self.transform(_read_image(path)), label


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except Exception as error:  # of damaged files Pillow raises errors of many kinds
        raise UnreadableImageError(f'{path} cannot be read as an image ({error}): remove or replace it.') from None


def _is_visible_image(path: str) -> bool:
    return is_image_file(path) and not os.path.basename(path).startswith('.')


class _Folder(ImageFolder):
    """torchvision's ImageFolder without hidden files and folders, such as .ipynb_checkpoints and those of macOS."""

    def __init__(self, root: Path):
        try:
            super().__init__(str(root), is_valid_file=_is_visible_image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{root}: {str(error).strip().rstrip(".")}. Each class needs a folder of its own '
                                    f'with images in it, {root}/<class>/*.jpg.') from None
        if len(self.classes) < 2:
            raise ValueError(f'{root} has one class, {self.classes[0]!r}: at least 2 are needed, each in a folder of '
                             f'its own.')

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and their indices."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != '.')
        if not names:
            raise FileNotFoundError('there are no folders in it')
        return names, {name: index for index, name in enumerate(names)}


def find_images(data: str | os.PathLike[str], seed: int = 0) -> ImageFiles:
    """Find the images of a folder. None is opened.

    Args:
        data: A folder with `train/` and one of `val/`, `valid/`, `validation/` and `test/`, each with a folder for each
            class; or with the folders of the classes, or `train/` alone. Of these a fifth of each class is held out.
        seed: Seed of the images that are held out.

    Raises:
        FileNotFoundError: The folder does not exist, or a class has no images.
        ValueError: There are fewer than two classes, training and validation have different ones, or a class has one
            image, so that none can be held out.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f'{root}: no such folder.')
    train_root = root / 'train' if (root / 'train').is_dir() else root
    validation_root = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if train_root == root and validation_root and any(entry.is_dir() for entry in os.scandir(validation_root)):
        raise FileNotFoundError(f'{root} has a folder {validation_root.name}/ with folders in it, but no train/.')
    train = _Folder(train_root)
    if train_root != root and validation_root:
        validation = _Folder(validation_root)
        if validation.classes != train.classes:
            name = min(set(validation.classes) ^ set(train.classes))
            has, lacks = (train_root, validation_root) if name in train.classes else (validation_root, train_root)
            raise ValueError(f'{train_root} and {validation_root} must have the same classes: {has} has {name!r}, '
                             f'{lacks} has not.')
        return ImageFiles(train.samples, validation.samples, train.classes, held_out=False)
    for index, count in enumerate(np.bincount(train.targets)):
        if count < 2:
            raise ValueError(f'{train_root / train.classes[index]} has one image, of which none can be held out for '
                             f'validation: add another, or make a folder val/ beside train/.')
    kept, held_out = ([train.samples[index] for index in part]
                      for part in split_indices(train.targets, VALIDATION_SHARE, seed))
    return ImageFiles(kept, held_out, train.classes, held_out=True)


def split_indices(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split samples in two, class by class.

    Args:
        labels: The classes of the samples. Each has at least two.
        share: The share of each class that is in the second part, where at least one sample is, and not all.
        seed: Seed of the choice.

    Returns:
        The indices of both parts, each in order.
    """
    labels, generator = np.asarray(labels), np.random.default_rng(seed)
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        samples = generator.permutation(np.flatnonzero(labels == label))
        second[samples[:min(max(1, round(share * len(samples))), len(samples) - 1)]] = True
    return np.flatnonzero(~second).tolist(), np.flatnonzero(second).tolist()
