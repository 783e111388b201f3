"""The data sets of `suite.py`: of different kinds, small enough to train on within minutes, tested on held-out images.

digits          scikit-learn's: 10 classes, 8 x 8 pixels, 1,440 training images
cifar20         CIFAR-100, 20 training images a class
cifar100        CIFAR-100, 100 training images a class
cifar100_longer the same, five times as many steps
long_tail       CIFAR-100, 450 training images of the largest class, 4 of the smallest (imbalance 0.01)
letters         400 letters as 12 faces of DejaVu draw them, 15 images a class; two faces are held out
ideographs      1,000 ideographs of GB 2312, 15 images a class; four families of fonts are held out
features        features of EfficientNet-Lite0, pretrained, of CIFAR-100 at 96 px, 20 images a class
grocery         such features of the photographs of GroceryStore, 81 classes of 16 to 70 images

CIFAR-100 is tested on 50 training images a class that are left out, GroceryStore on a quarter of its training images.
No test image of either is looked at.
"""
from pathlib import Path

import numpy as np
import torch
from finetune_data import CACHE, Pixels, features_of, load_backbone, load_data
from glyphs import few_images, load_glyphs
from image_arrays import Images, load_images, long_tail

__all__ = ['DATA', 'Samples', 'load_samples']

DATA = ('digits', 'cifar20', 'cifar100', 'cifar100_longer', 'long_tail', 'letters', 'ideographs', 'features', 'grocery')
_HELD_OUT = 50
_FEATURES_SIZE = {'features': 96, 'grocery': 128}


class Samples:
    """Training and test samples: images (N, channels, H, W) uint8, or features (N, F) float32; labels (N,) int64."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor, y_test: torch.Tensor):
        self.x, self.y, self.x_test, self.y_test = x, y, x_test, y_test
        self.num_classes = int(y.max()) + 1
        self.are_features = x.ndim == 2

    @classmethod
    def of(cls, images: Images) -> 'Samples':
        return cls(images.x_train, images.y_train, images.x_test, images.y_test)


def load_samples(name: str, *, arrays: str | None, grocery: str | None, weights: Path | None) -> Samples:
    """Return a data set by its name.

    Args:
        name: One of `DATA`.
        arrays: The folder with CIFAR-100's npz files.
        grocery: The folder of GroceryStore, an ImageFolder.
        weights: Of EfficientNet-Lite0, for features.

    Raises:
        ValueError: The name is unknown, or what it needs was not given.
    """
    needed = {'grocery': grocery and weights, 'features': arrays and weights, 'cifar20': arrays, 'cifar100': arrays,
              'cifar100_longer': arrays, 'long_tail': arrays}
    if name not in DATA or not needed.get(name, True):
        raise ValueError(f'data must be one of {", ".join(DATA)}, and {name} needs --arrays, --grocery or --weights: '
                         f'see the head of suite_data.py.')
    if name == 'digits':
        return Samples.of(load_images())
    if name == 'letters':
        return Samples.of(few_images(load_glyphs('dejavu', 400), 15, 10))
    if name == 'ideographs':
        return Samples.of(few_images(load_glyphs('gb2312', 1000), 15, 5))
    if name == 'grocery':
        images = load_data(grocery, arrays=None, size=_FEATURES_SIZE[name], seed=0, test_images=0)
        whole, labels = _features(images, weights, _FEATURES_SIZE[name]), images.y_train
        train, test = _split(labels, lambda own: len(own) - len(own) // 4, lambda own: len(own) // 4)
        return Samples(whole[train], labels[train], whole[test], labels[test])
    images = load_images(arrays=arrays)
    if name == 'long_tail':
        train, test = _split(images.y_train, lambda own: len(own) - _HELD_OUT, lambda own: _HELD_OUT)
        rest = long_tail(_chosen(images, train, test), 0.01)
        return Samples.of(rest)
    number = 100 if name.startswith('cifar100') else 20
    train, test = _split(images.y_train, lambda own: number, lambda own: _HELD_OUT)
    images = _chosen(images, train, test)
    if name == 'features':
        whole = _features(images, weights, _FEATURES_SIZE[name])
        test = _features(Images(images.x_test, images.y_test, images.x_test[:1], images.y_test[:1], images.classes),
                         weights, _FEATURES_SIZE[name])
        return Samples(whole, images.y_train, test, images.y_test)
    return Samples.of(images)


def _split(labels: torch.Tensor, train, test) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows for training and for the test: of each class the first and the last ones in a random order."""
    generator = np.random.default_rng(0)
    rows: tuple[list, list] = ([], [])
    for label in range(int(labels.max()) + 1):
        own = generator.permutation(np.flatnonzero(labels.numpy() == label))
        rows[0].append(own[:train(own)])
        rows[1].append(own[len(own) - test(own):])
    return tuple(torch.from_numpy(np.concatenate(part)) for part in rows)


def _chosen(images: Images, train: torch.Tensor, test: torch.Tensor) -> Images:
    return Images(images.x_train[train], images.y_train[train], images.x_train[test], images.y_train[test],
                  images.classes)


def _features(images: Images, weights: Path, size: int) -> torch.Tensor:
    """Return the features of the training images, (N, F) float32."""
    backbone = load_backbone('tf_efficientnet_lite0', weights, images.num_classes)
    few = Images(images.x_train, images.y_train, images.x_test[:1], images.y_test[:1], images.classes)
    return features_of(backbone, few, Pixels(backbone, size), cache=CACHE).passes[0]
