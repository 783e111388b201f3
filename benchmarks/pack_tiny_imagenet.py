"""Packs Tiny-ImageNet's JPEGs into a few npz files, each small enough to be sent: train-0.npz, ..., test.npz.

    python benchmarks/pack_tiny_imagenet.py tiny-imagenet-200 ARRAYS
    python benchmarks/accuracy.py --arrays ARRAYS ...

The folder is as Stanford's CS231n made it: `train/<wnid>/images/*.JPEG`, and `val/images/*.JPEG` with the classes in
`val/val_annotations.txt`; its `test` has no labels, so that the validation images are what is tested on. The images
are ImageNet's, whose terms allow no copy of them in this repository.
"""
import argparse
from pathlib import Path

import numpy as np

__all__ = ['pack_tiny_imagenet']

# Bytes that a file may have.
LARGEST = 60 * 10 ** 6


def pack_tiny_imagenet(folder: Path, into: Path, largest: int = LARGEST) -> list[Path]:
    """Write the files, and return their paths: the encoded images one after the other, with offsets and labels.

    Args:
        folder: `tiny-imagenet-200`.
        into: Folder of the npz files.
        largest: Bytes that one of them may have.

    Raises:
        ValueError: There are no classes or images, or the validation images' classes are not known.
    """
    classes = sorted(path.name for path in (folder / 'train').glob('*') if path.is_dir())
    if not classes:
        raise ValueError(f'{folder} has no folders train/<class>.')
    label_of = {name: label for label, name in enumerate(classes)}
    train = [(path, label_of[name]) for name in classes
             for path in sorted((folder / 'train' / name).rglob('*.JPEG'))]
    annotations = folder / 'val' / 'val_annotations.txt'
    test = []
    for line in annotations.read_text().splitlines():
        name, label, *_ = line.split('\t')
        if label not in label_of:
            raise ValueError(f'{annotations} gives {name} the class {label}, of which there is no training image.')
        test.append((folder / 'val' / 'images' / name, label_of[label]))
    if not train or not test:
        raise ValueError(f'{folder} has {len(train)} training and {len(test)} validation images.')
    # In an order of its own for each file to have all classes: half of the files is a smaller data set.
    order = np.random.default_rng(0).permutation(len(train))
    into.mkdir(parents=True, exist_ok=True)
    written, part, size = [], [], 0
    for number in order:
        path, label = train[number]
        image = path.read_bytes()
        if part and size + len(image) + 2 ** 4 * (len(part) + 1) + 2 ** 16 > largest:
            written.append(_write(into / f'train-{len(written)}.npz', part, classes))
            part, size = [], 0
        part.append((image, label))
        size += len(image)
    written.append(_write(into / f'train-{len(written)}.npz', part, classes))
    written.append(_write(into / 'test.npz', [(path.read_bytes(), label) for path, label in test], classes))
    too_large = [path.name for path in written if path.stat().st_size > largest]
    if too_large:
        raise ValueError(f'{", ".join(too_large)} came out larger than {largest} bytes.')
    return written


def _write(path: Path, images: list[tuple[bytes, int]], classes: list[str]) -> Path:
    lengths = [len(image) for image, _ in images]
    with open(path, 'wb') as file:
        np.savez(file, blob=np.frombuffer(b''.join(image for image, _ in images), np.uint8),
                 offsets=np.cumsum([0, *lengths]), labels=np.array([label for _, label in images], np.int64),
                 classes=np.array(classes))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='tiny-imagenet-200')
    parser.add_argument('into', type=Path, help='folder of the npz files')
    args = parser.parse_args()
    for path in pack_tiny_imagenet(args.folder, args.into):
        print(path, f'{path.stat().st_size / 10 ** 6:.1f} MB')


if __name__ == '__main__':
    main()
