"""Folders of small images, and a model that was fitted to them, for the commands that read both."""
from pathlib import Path

import timm
import torch
from PIL import Image

import timm_dl2pa

__all__ = ['COLOURS', 'colour_model', 'make_colours']

COLOURS = {'blue': (40, 60, 200), 'green': (40, 200, 60), 'red': (200, 50, 40)}


def make_colours(root: Path, parts: tuple[str, ...] = ('train', 'val'), count: int = 10) -> Path:
    """Write noisy images of one colour each, which stand in folders by colour."""
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-40, 40, (40, 40, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f'{number}.png')
    return root


def colour_model(folder: Path, label_names: list[str] | None = None) -> Path:
    """Save a small model whose head is set by the features of flat colours, and return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model('test_resnet', num_classes=3)
        for _ in range(20):  # running statistics
            model.train()(torch.randn(8, 3, 32, 32))
        timm_dl2pa.wrap_dl2pa(model.eval(), dim=4)
        model.pretrained_cfg['input_size'] = (3, 32, 32)
        mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ('mean', 'std'))
        flat = ((torch.tensor(list(COLOURS.values())) / 255 - mean) / std)[:, :, None, None].expand(-1, -1, 32, 32)
        images = flat.repeat(8, 1, 1, 1) + 0.3 * torch.randn(24, 3, 32, 32)
        timm_dl2pa.prime(model, [(images, torch.arange(3).repeat(8))])
    return timm_dl2pa.save_model(model, folder, label_names=label_names)
