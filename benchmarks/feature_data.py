"""Frozen features in npz files, `<name>_train.npz` and `<name>_test.npz` with `x` (N, F) float32 and `y` (N,) int64.

    python benchmarks/feature_data.py cifar100 --arrays CIFAR100 --weights FILE --features FOLDER
    python benchmarks/feature_data.py grocery --data-dir GROCERY --weights FILE --features FOLDER
    python benchmarks/feature_data.py digits --weights FILE --features FOLDER

cifar100    CIFAR-100 at 96 px: 100 training images a class, drawn by seed 0, and the first 20 test images a class
grocery     GroceryStore's photographs at 128 px, an ImageFolder with train/ and val/
digits      scikit-learn's handwritten digits, 8 x 8 pixels enlarged to 96; a test file alone: images of another kind

All are pooled features of EfficientNet-Lite0 in evaluation mode. Any other features in such files do as well.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from finetune_data import Pixels, load_backbone, load_data, pooled
from image_arrays import load_images
from tqdm import tqdm

__all__ = ['SETS', 'FeatureSet', 'load_feature_file', 'load_features']

SETS = {'cifar100': 96, 'grocery': 128, 'digits': 96}


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, F) float32 and labels (N,) int64, for training and for the test."""
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def num_classes(self) -> int:
        return int(self.y.max()) + 1

    def halves(self, seed: int) -> tuple['FeatureSet', 'FeatureSet']:
        """Return the set with half of the classes, drawn by the seed, and that with the others; labels from 0 on."""
        order = np.random.default_rng(seed).permutation(self.num_classes)
        middle = self.num_classes // 2
        return self._of(np.sort(order[:middle])), self._of(np.sort(order[middle:]))

    def _of(self, classes: np.ndarray) -> 'FeatureSet':
        place = torch.full((self.num_classes,), -1)
        place[torch.from_numpy(classes)] = torch.arange(len(classes))
        parts = []
        for x, y in ((self.x, self.y), (self.x_test, self.y_test)):
            own = place[y] >= 0
            parts += [x[own], place[y[own]]]
        return FeatureSet(*parts)


def load_feature_file(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels of one file."""
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: the head of feature_data.py says how it is made.')
    with np.load(path) as content:
        return torch.from_numpy(content['x']).float(), torch.from_numpy(content['y']).long()


def load_features(name: str, folder: Path) -> FeatureSet:
    """Return the set of a name."""
    return FeatureSet(*load_feature_file(folder / f'{name}_train.npz'), *load_feature_file(folder / f'{name}_test.npz'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=SETS)
    parser.add_argument('--weights', type=Path, required=True, help='of EfficientNet-Lite0')
    parser.add_argument('--arrays', help="the folder with CIFAR-100's npz files")
    parser.add_argument('--data-dir', help='the folder of GroceryStore')
    parser.add_argument('--features', type=Path, required=True, help='the folder of the files')
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = SETS[args.name]
    if args.name == 'digits':
        images = load_images()
        x = torch.cat([images.x_train, images.x_test]).expand(-1, 3, -1, -1)
        parts = {'test': (x, torch.cat([images.y_train, images.y_test]))}
    else:
        images = load_data('cifar100:100' if args.name == 'cifar100' else args.data_dir, arrays=args.arrays, size=size,
                           seed=0, test_images=20)
        parts = {'train': (images.x_train, images.y_train), 'test': (images.x_test, images.y_test)}
    backbone = load_backbone('tf_efficientnet_lite0', args.weights, images.num_classes)
    pixels = Pixels(backbone, size)
    args.features.mkdir(parents=True, exist_ok=True)
    for part, (x, y) in parts.items():
        found = torch.cat([pooled(backbone, pixels(rows)) for rows in tqdm(x.split(64), part, disable=None)])
        np.savez(args.features / f'{args.name}_{part}.npz', x=found.numpy(), y=y.numpy())


if __name__ == '__main__':
    main()
