"""Fonts as sources of images: faces found and grouped into families, and code points drawn by them.

A face is one font of a file. A family is what must not be on both sides of a split: faces of one file (the regional
cuts of a collection), of files that differ in the weight alone, and faces that draw alike (derivatives under other
names: Takao and IPAex of IPA, UMing of Mingti and Sungti).
"""
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['SIDE', 'Face', 'drawable', 'faces_of', 'families_of', 'installed_files', 'render']

# Of the images, in pixels.
SIDE = 32
_COLLECTIONS = ('.ttc', '.otc')
_WEIGHT = re.compile(r'-(Thin|ExtraLight|Light|DemiLight|Regular|Medium|SemiBold|Bold|Black|Italic|Oblique)+$', re.I)
# An image that a face draws for more code points than this is its sign for what it lacks.
_MOST_ALIKE = 4
# Faces are of one family from this median correlation of their images on. Over U+4E00 to U+9FA5 the Debian packages'
# faces of one origin have 0.87 to 1.00, others up to 0.84; but for cwTeX's bold and round Gothic, 0.87, which thus are
# one family.
_SAME_FAMILY = 0.86
# Least number of code points that a face must have to be of use.
_LEAST_CODES = 300
# Share of images alike to the pixel from which on two faces are one.
_SAME_FACE = 0.95
# Code points by which faces are compared: about so many, and no comparison by fewer than the second number.
_SAMPLE, _LEAST_SAMPLE = 300, 15


@dataclass(frozen=True)
class Face:
    """One font of a file: the file, and its number in it where the file is a collection."""
    path: Path
    index: int = 0

    def __str__(self) -> str:
        return f'{self.path.stem}:{self.index}' if self.path.suffix.lower() in _COLLECTIONS else self.path.stem


def installed_files() -> list[Path]:
    """Return the files of the fonts that fontconfig knows.

    Raises:
        FileNotFoundError: fontconfig's `fc-list` is not installed.
    """
    try:
        said = subprocess.run(['fc-list', '--format', '%{file}\n'], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise FileNotFoundError('fc-list is not installed: install fontconfig, or give a folder of fonts.') from None
    return [Path(line) for line in said.splitlines()]


def faces_of(files: Iterable[Path], needed: Sequence[int]) -> dict[Face, frozenset[int]]:
    """Return the faces of font files that have some hundred of the needed code points, each with those.

    A symbolic link and what it points to are one file.
    """
    from fontTools.ttLib import TTCollection, TTFont
    wanted, faces = frozenset(needed), {}
    for path in sorted({path.resolve() for path in files}):
        if path.suffix.lower() not in ('.ttf', '.otf', *_COLLECTIONS):
            continue
        collection = path.suffix.lower() in _COLLECTIONS
        for index in range(len(TTCollection(path, lazy=True)) if collection else 1):
            with TTFont(path, fontNumber=index if collection else -1, lazy=True) as font:
                codes = wanted & (font.getBestCmap() or {}).keys()
            if len(codes) >= _LEAST_CODES:
                faces[Face(path, index)] = codes
    return faces


def render(face: Face, codes: Sequence[int], size: int) -> np.ndarray:
    """Return images (N, 32, 32) uint8 of code points, white on black, what is drawn in the middle.

    Args:
        face: What draws.
        codes: N code points that it has.
        size: Of the font, in pixels. A glyph that is larger than the image becomes an empty image.
    """
    font = ImageFont.truetype(str(face.path), size, index=face.index, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(codes), SIDE, SIDE), np.uint8)
    for image, code in zip(images, codes):
        canvas = Image.new('L', (3 * SIDE, 3 * SIDE))
        ImageDraw.Draw(canvas).text((SIDE, SIDE), chr(code), fill=255, font=font)
        box = canvas.getbbox()
        if box is None or box[2] - box[0] > SIDE or box[3] - box[1] > SIDE:
            continue
        top, left = (SIDE - box[3] + box[1]) // 2, (SIDE - box[2] + box[0]) // 2
        drawn = np.asarray(canvas.crop(box))
        image[top:top + drawn.shape[0], left:left + drawn.shape[1]] = drawn
    return images


def drawable(images: np.ndarray) -> np.ndarray:
    """Return which images (N, 32, 32) of one face show a glyph, (N,) bool: not empty, and not the same as many others,
    as the box for what a font lacks is."""
    keys = [image.tobytes() for image in images]
    alike, empty = Counter(keys), bytes(SIDE * SIDE)
    return np.array([key != empty and alike[key] <= _MOST_ALIKE for key in keys], dtype=bool)


def families_of(faces: dict[Face, frozenset[int]], size: int, of_files: bool = False) -> list[list[Face]]:
    """Group faces into families. Of faces that draw the same, one is kept.

    Args:
        faces: With the code points that each can draw.
        size: Of the font, in pixels.
        of_files: Each file is a family of its own.
    """
    if of_files:
        return [[face] for face in faces]
    codes = sorted(frozenset().union(*faces.values()))
    codes = codes[::max(1, len(codes) // _SAMPLE)]
    place = {code: row for row, code in enumerate(codes)}
    families: list[list[Face]] = []
    drawn: dict[Face, np.ndarray] = {}
    for face, has in faces.items():
        own = [code for code in codes if code in has]
        images = render(face, own, size)
        drawn[face] = np.zeros((len(codes), SIDE, SIDE), np.uint8)
        drawn[face][[place[code] for code in own]] = images * drawable(images)[:, None, None]
        near = {other: _alike(drawn[face], drawn[other]) for family in families for other in family}
        if any(same >= _SAME_FACE for same, _ in near.values()):
            continue
        joined = [family for family in families if any(
            near[other][1] >= _SAME_FAMILY or _typeface(other) == _typeface(face) for other in family)]
        families = [family for family in families if family not in joined]
        families.append([*(other for family in joined for other in family), face])
    return sorted((sorted(family, key=str) for family in families), key=lambda family: str(family[0]))


def _typeface(face: Face) -> str:
    return _WEIGHT.sub('', face.path.stem)


def _alike(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the share of images (N, 32, 32) that are the same, and the median of their correlations, each at the best
    shift by at most a pixel, among those that both have."""
    both = one.any(axis=(1, 2)) & other.any(axis=(1, 2))
    if both.sum() < _LEAST_SAMPLE:
        return 0.0, 0.0
    one, other = one[both], other[both]
    first = _standardised(one)
    best = np.full(len(one), -1.0)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            second = _standardised(np.roll(other, (down, right), axis=(1, 2)))
            best = np.maximum(best, (first * second).sum(axis=1))
    return float((one == other).all(axis=(1, 2)).mean()), float(np.median(best))


def _standardised(images: np.ndarray) -> np.ndarray:
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
