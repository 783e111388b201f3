"""Letters as the twelve faces of DejaVu draw them, which matplotlib carries: hundreds of classes on every machine.

A class is a code point. Ten faces draw its training images and two its test images, each image warped at random. Of
code points that a face draws alike to the pixel, as Latin, Greek and Cyrillic A, only the first is a class.
"""
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

__all__ = ['HELD_OUT', 'SIDE', 'TRAINING', 'Letters', 'draw_letters', 'warp']

# Of the images, and of the font, in pixels: wide letters have to fit in too.
SIDE, _SIZE = 32, 22
HELD_OUT = ('DejaVuSerif-BoldItalic', 'DejaVuSansMono-Oblique')
TRAINING = tuple(f'DejaVu{family}' for family in (
    'Sans', 'Sans-Bold', 'Sans-Oblique', 'Sans-BoldOblique', 'SansMono', 'SansMono-Bold', 'SansMono-BoldOblique',
    'Serif', 'Serif-Bold', 'Serif-Italic'))


@dataclass(frozen=True)
class Letters:
    """What the faces draw of C letters.

    Attributes:
        names: The letters.
        train: (C, 10, 32, 32) uint8, white on black, a letter in the middle of its image.
        test: (C, 2, 32, 32) uint8, by the faces that are held out.
    """
    names: list[str]
    train: torch.Tensor
    test: torch.Tensor


def draw_letters(number: int) -> Letters:
    """Draw letters, the same ones in each call.

    Args:
        number: C. The letters are drawn by lot from all that the faces have.

    Raises:
        ValueError: There are fewer letters.
    """
    codes, images = _all_letters()
    if not 2 <= number <= len(codes):
        raise ValueError(f'--classes must be from 2 to {len(codes)}, the number of letters that the faces of DejaVu '
                         f'draw, not {number}.')
    chosen = np.sort(np.random.default_rng(0).permutation(len(codes))[:number])
    drawn = torch.from_numpy(images[chosen])
    return Letters([chr(codes[index]) for index in chosen], drawn[:, :len(TRAINING)], drawn[:, len(TRAINING):])


@lru_cache(maxsize=1)
def _all_letters() -> tuple[list[int], np.ndarray]:
    """Return the code points (n of them) that all faces draw, and images (n, 12, 32, 32) uint8."""
    folder = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
    files = [folder / f'{face}.ttf' for face in TRAINING + HELD_OUT]
    common = set.intersection(*(set(FT2Font(str(file)).get_charmap()) for file in files))
    codes = sorted(code for code in common if unicodedata.category(chr(code)).startswith('L'))
    images = np.stack([_draw(file, codes) for file in files], axis=1)
    first: dict[bytes, int] = {}
    kept = []
    for row, (code, faces) in enumerate(zip(codes, images)):
        keys = [bytes([number]) + face.tobytes() for number, face in enumerate(faces)]
        # A face's drawing counts whether or not this letter is kept: none may look like one that was left out.
        if all(face.any() for face in faces) and all(first.setdefault(key, code) == code for key in keys):
            kept.append(row)
    return [codes[row] for row in kept], images[kept]


def _draw(file: Path, codes: list[int]) -> np.ndarray:
    """Return images (n, 32, 32) uint8 of letters by one face; of a letter that is too large, an empty one."""
    font = ImageFont.truetype(str(file), _SIZE, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(codes), SIDE, SIDE), np.uint8)
    for image, code in zip(images, codes):
        mask = font.getmask(chr(code), mode='L')
        drawn = np.asarray(mask, np.uint8).reshape(mask.size[::-1])
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        if not len(rows):
            continue
        drawn = drawn[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        height, width = drawn.shape
        if max(height, width) <= SIDE:
            top, left = (SIDE - height) // 2, (SIDE - width) // 2
            image[top:top + height, left:left + width] = drawn
    return images


def warp(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images as if photographed: each turned, sheared, scaled, shifted, blurred and noisy in its own way.

    Args:
        images: (B, 1, H, W), 0 to 255, on the CPU.
        generator: On the CPU.

    Returns:
        (B, 1, H, W) float32, about -1 to 1.
    """
    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    images = images.float() / 255
    angle, shear, size, shift = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.9, 1.25, 1, 1), uniform(-.1, .1, 2, 1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([size * turned, shift], dim=2), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1)
    images = torch.lerp(images, blurred, uniform(0, 1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=generator)
    return 2 * (uniform(0.5, 1, 1, 1, 1) * images + uniform(0, 0.1, 1, 1, 1) * noise).clamp(0, 1) - 1
