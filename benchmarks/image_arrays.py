"""Small images in one tensor: read once, split, kept on the device, and cropped and flipped there."""
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

__all__ = ['Images', 'augment', 'hold_out', 'keep_classes', 'load_images', 'long_tail', 'superclasses']

# The 20 superclasses of CIFAR-100 (Krizhevsky 2009), of five classes each.
_SUPERCLASSES = '''
beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip
/ bottle bowl can cup plate / apple mushroom orange pear sweet_pepper / clock keyboard lamp telephone television
/ bed chair couch table wardrobe / bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf
/ bridge castle house road skyscraper / cloud forest mountain plain sea / camel cattle chimpanzee elephant kangaroo
/ fox porcupine possum raccoon skunk / crab lobster snail spider worm / baby boy girl man woman
/ crocodile dinosaur lizard snake turtle / hamster mouse rabbit shrew squirrel
/ maple_tree oak_tree palm_tree pine_tree willow_tree / bicycle bus motorcycle pickup_truck train
/ lawn_mower rocket streetcar tank tractor'''


@dataclass(frozen=True)
class Images:
    """Training and test images: uint8 (N, channels, H, W), int64 labels (N,), names of the classes."""
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of the channels of the training images, each (channels, 1, 1) float32."""
        sample = self.x_train[:10000].float()
        mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3))
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def to(self, device: torch.device | str) -> 'Images':
        return replace(self, **{name: getattr(self, name).to(device) for name in
                                ('x_train', 'y_train', 'x_test', 'y_test')})


def load_images(*, data_dir: str | None = None, arrays: str | None = None, size: int | None = None) -> Images:
    """Read an ImageFolder (DIR/train, DIR/validation), a folder of npz files, or else scikit-learn's digits.

    What was decoded is kept in a file of the user's cache folder (XDG_CACHE_HOME), named after the folder's content.

    Args:
        data_dir: DIR/train/<class>/<image>, DIR/validation/<class>/<image>, all of one size.
        arrays: Holds train-*.npz and test.npz: `blob` and `offsets` of encoded images, `labels`, `classes`.
        size: Shrink the images to this many pixels, by averaging; it must divide theirs. Default: as they are.
    """
    if data_dir and arrays:
        raise ValueError('give either data_dir or arrays, not both.')
    if not data_dir and not arrays:
        return _digits()
    folder = Path(data_dir or arrays)
    files = sorted(folder.glob('*.npz')) if arrays else sorted(folder.glob('*/*/*'))
    if not files:
        raise FileNotFoundError(f'{folder} holds no {"npz files" if arrays else "images in folders"}.')
    key = hashlib.sha256(repr([(str(f.relative_to(folder)), f.stat().st_size) for f in files]).encode()).hexdigest()
    cached = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_dl2pa' / f'images-{key[:16]}.npz'
    if not cached.exists():
        content = _read_arrays(folder) if arrays else _read_folder(folder)
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f'.{os.getpid()}.part')
        with open(part, 'wb') as file:
            np.savez(file, **content)
        part.replace(cached)
    with np.load(cached) as content:
        x_train, x_test = (torch.from_numpy(content[name]).permute(0, 3, 1, 2) for name in ('x_train', 'x_test'))
        images = Images(x_train.contiguous(), torch.from_numpy(content['y_train']), x_test.contiguous(),
                        torch.from_numpy(content['y_test']), tuple(map(str, content['classes'])))
    return images if size is None else _shrink(images, size)


def _shrink(images: Images, size: int) -> Images:
    height = images.x_train.shape[2]
    if height % size:
        raise ValueError(f'size={size} does not divide the images\' {height} pixels.')

    def shrink(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.avg_pool2d(part.float(), height // size).round().to(torch.uint8) for part in x.split(5000)])

    return replace(images, x_train=shrink(images.x_train), x_test=shrink(images.x_test))


def _read_arrays(folder: Path) -> dict[str, np.ndarray]:
    def read(path: Path):
        with np.load(path) as file:
            blob, offsets, labels, classes = file['blob'].tobytes(), file['offsets'], file['labels'], file['classes']

        def decode(i: int) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(blob[offsets[i]:offsets[i + 1]])).convert('RGB'))

        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(decode, range(len(labels))))), labels.astype(np.int64), classes

    parts = [read(path) for path in sorted(folder.glob('train-*.npz'))]
    x_test, y_test, classes = read(folder / 'test.npz')
    x_train, y_train = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=classes)


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import ImageFolder
    content: dict[str, np.ndarray] = {}
    for split, name in (('train', 'train'), ('test', 'validation')):
        dataset = ImageFolder(str(folder / name))
        content[f'x_{split}'] = np.stack([np.asarray(image) for image, _ in dataset])
        content[f'y_{split}'] = np.array(dataset.targets, dtype=np.int64)
        content['classes'] = np.array(dataset.classes)
    return content


def _digits() -> Images:
    from sklearn.datasets import load_digits
    digits = load_digits()
    x = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return Images(x[train].contiguous(), y[train], x[test].contiguous(), y[test], tuple('0123456789'))


def hold_out(images: Images, share: float = 0.1) -> Images:
    """Return the images with a share of each class's training images in the test images' place: for choosing."""
    generator = np.random.default_rng(0)
    train, held = [], []
    for label in range(images.num_classes):
        own = generator.permutation(np.flatnonzero(images.y_train.cpu().numpy() == label))
        cut = round(share * len(own))
        held.append(own[:cut])
        train.append(own[cut:])
    train, held = torch.from_numpy(np.concatenate(train)), torch.from_numpy(np.concatenate(held))
    return replace(images, x_train=images.x_train[train], y_train=images.y_train[train],
                   x_test=images.x_train[held], y_test=images.y_train[held])


def long_tail(images: Images, imbalance: float) -> Images:
    """Return the images with class c cut to `n_max * imbalance^(c / (C - 1))` training images, truncated."""
    labels = images.y_train.cpu().numpy()
    largest = np.bincount(labels, minlength=images.num_classes).max()
    generator = np.random.default_rng(0)
    kept = []
    for label in range(images.num_classes):
        own = generator.permutation(np.flatnonzero(labels == label))
        kept.append(own[:int(largest * imbalance ** (label / (images.num_classes - 1)))])
    kept = torch.from_numpy(np.concatenate(kept))
    return replace(images, x_train=images.x_train[kept], y_train=images.y_train[kept])


def keep_classes(images: Images, classes: list[int]) -> Images:
    """Return the images of some classes, which are numbered anew in the order given."""
    new = torch.full((images.num_classes,), -1)
    new[torch.tensor(classes)] = torch.arange(len(classes))
    new_train, new_test = new[images.y_train], new[images.y_test]
    return Images(images.x_train[new_train >= 0], new_train[new_train >= 0], images.x_test[new_test >= 0],
                  new_test[new_test >= 0], tuple(images.classes[label] for label in classes))


def augment(images: torch.Tensor, padding: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Crop each image (B, channels, H, W), float32, at a place of its own out of itself padded, and flip half.

    One gather by index, on the images' device.
    """
    batch, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + left
    sample = torch.arange(batch, device=device).view(-1, 1, 1)
    # The indices stand around the channels, so that the answer is (B, H, W, channels): channels_last at no cost.
    return padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def superclasses(classes: tuple[str, ...]) -> torch.Tensor | None:
    """Return the superclass 0..19 of each of CIFAR-100's classes (C,), or None for classes of other names."""
    groups = [group.split() for group in _SUPERCLASSES.split('/')]
    of = {name: number for number, group in enumerate(groups) for name in group}
    if not all(name in of for name in classes):
        return None
    return torch.tensor([of[name] for name in classes])
