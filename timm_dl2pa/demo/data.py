"""The demo's images: letters, or those of a folder. Batches for the training, batches for the test, a picture a class.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from ..finetune.images import Images, find_images
from .letters import SIDE, Letters, draw_letters, warp

__all__ = ['BATCH_SIZE', 'Data', 'letter_data', 'load_data']

BATCH_SIZE = 64
# Warps of each drawing by a face that is held out.
_TEST_WARPS = 2
_PICTURE_SIDE = 64


@dataclass(frozen=True)
class Data:
    """The images of a demo.

    Attributes:
        source: What they are.
        names: The names of the C classes.
        train: Batches of images (B, 3, H, W) and labels (B,), in another order each time. Has a length.
        test: Those of the test images, always the same.
        num_train: The number of training images.
        num_test: The number of test images.
        pictures: One of each class: (H, W) white on black, or (H, W, 3); uint8.
    """
    source: str
    names: list[str]
    train: Iterable[tuple[torch.Tensor, torch.Tensor]]
    test: Iterable[tuple[torch.Tensor, torch.Tensor]]
    num_train: int
    num_test: int
    pictures: list[np.ndarray]


class _LetterBatches:
    """The training images of letters, warped anew whenever they are gone through."""

    def __init__(self, letters: Letters, seed: int):
        self.images = letters.train.flatten(0, 1).unsqueeze(1)
        self.labels = torch.arange(len(letters.names)).repeat_interleave(letters.train.shape[1])
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return max(1, len(self.labels) // BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for rows in order.split(BATCH_SIZE)[:len(self)]:
            yield warp(self.images[rows], self.generator).expand(-1, 3, -1, -1), self.labels[rows]


def load_data(data_dir: str | None, classes: int, model: str, seed: int, device: torch.device) -> Data:
    """Return the letters, or the images of a folder if one is given.

    Args:
        data_dir: See `run_demo`.
        classes: The number of letters.
        model: The name of the timm model that says how the images of a folder are prepared.
        seed: Of the order and the warps of the training images, and of the images that are held out.
        device: Where the batches go.

    Raises:
        ValueError: There are fewer letters, or the folder is none of images.
        OSError: The folder cannot be read.
    """
    if data_dir is None:
        return letter_data(classes, seed)
    files = find_images(data_dir, seed)
    config = timm.data.resolve_data_config({'model': model})
    parts = {'num_workers': 2, 'pin_memory': device.type == 'cuda', 'batch_size': BATCH_SIZE}
    train, test = Images(files.train, config, augment=True), Images(files.validation, config)
    first: dict[int, str] = {}
    for path, label in files.train:
        first.setdefault(label, path)
    return Data(
        source=f'the images of the folder {Path(data_dir).resolve().name}', names=files.names,
        train=DataLoader(train, shuffle=True, drop_last=len(train) > BATCH_SIZE, persistent_workers=True,
                         generator=torch.Generator().manual_seed(seed), **parts),
        test=DataLoader(test, persistent_workers=True, **parts),
        num_train=len(train), num_test=len(test),
        pictures=[_thumbnail(first[label]) for label in range(len(files.names))])


def letter_data(classes: int, seed: int) -> Data:
    """Return letters as the faces of DejaVu draw them. The test images are the same for every seed.

    Raises:
        ValueError: There are fewer letters.
    """
    letters = draw_letters(classes)
    drawings = letters.test.repeat_interleave(_TEST_WARPS, dim=1)
    images = warp(drawings.flatten(0, 1).unsqueeze(1), torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    test = TensorDataset(images, torch.arange(classes).repeat_interleave(drawings.shape[1]))
    train = _LetterBatches(letters, seed)
    return Data(source=f'letters as the faces of DejaVu draw them, two faces held out ({SIDE} x {SIDE} pixels)',
                names=letters.names, train=train, test=DataLoader(test, 4 * BATCH_SIZE),
                num_train=len(train.labels), num_test=len(test), pictures=list(letters.train[:, 0].numpy()))


def _thumbnail(path: str) -> np.ndarray:
    with Image.open(path) as image:
        image = image.convert('RGB')
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return np.asarray(image.resize((_PICTURE_SIDE, _PICTURE_SIDE), box=(left, top, left + side, top + side)))
