"""Real glyphs as small images: very many classes that every machine with some fonts can make.

    apt-get install fontconfig fonts-noto-cjk fonts-noto-cjk-extra fonts-wqy-zenhei fonts-wqy-microhei fonts-mona \\
        fonts-arphic-ukai fonts-arphic-uming fonts-arphic-bkai00mp fonts-arphic-bsmi00lp fonts-arphic-gbsn00lp \\
        fonts-arphic-gkai00mp fonts-ipafont fonts-ipaexfont fonts-takao fonts-hanazono fonts-vlgothic \\
        fonts-motoya-l-cedar fonts-sawarabi-gothic fonts-sawarabi-mincho fonts-cwtex-fs fonts-cwtex-heib \\
        fonts-cwtex-kai fonts-cwtex-ming fonts-cwtex-yen
    python benchmarks/glyphs.py --characters gb2312 --number 1000 --few 15 10 --output FILE.npz --sheet SHEET.png

A class is a code point. Its training images are drawn by fonts of other families than its test images. The sets of code
points: `gb2312`, the 3,755 ideographs of GB 2312's level 1; `block`, the 20,902 of U+4E00 to U+9FA5; `dejavu`, the
letters that all twelve faces of DejaVu have that matplotlib carries, which needs no other fonts. There two faces are
held out, not a family: the faces of DejaVu differ less than families do.

Left out are code points that too few families draw, and, of code points that two training families (of DejaVu: faces)
draw alike to the pixel, all but the first: Latin, Greek and Cyrillic A, say, or ideographs that fonts unify.
"""
import argparse
import hashlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from glyph_fonts import SIDE, Face, drawable, faces_of, families_of, installed_files, render
from image_arrays import Images
from PIL import Image

__all__ = ['CACHE', 'CHARACTERS', 'HELD_OUT', 'Glyphs', 'few_images', 'load_glyphs', 'warp']

CHARACTERS = ('gb2312', 'block', 'dejavu')
CACHE = Path(__file__).parents[1] / '.data' / 'glyphs'
# The files whose families are held out: a Gothic and two Ming faces that have (nearly) all code points or the
# traditional ones, and a Japanese Gothic.
HELD_OUT = ('wqy-zenhei', 'HanaMinA', 'cwming', 'VL-Gothic-Regular')
_DEJAVU_HELD_OUT = ('DejaVuSerif-BoldItalic', 'DejaVuSansMono-Oblique')
# Of the font, in pixels. DejaVu's wide letters have to fit in too.
_SIZES = {'gb2312': 28, 'block': 28, 'dejavu': 22}
# Training families (faces of DejaVu) that a code point needs.
_LEAST_FAMILIES = 3
# Of each family at most so many faces draw.
_MOST_FACES = 14
# Code points that no class is made of: CJK's extension A; for DejaVu they are drawn from the letters.
_UNSEEN = range(0x3400, 0x4DB6)


@dataclass(frozen=True)
class Glyphs(Images):
    """Images as drawn, (N, 1, 32, 32), with those of other code points than the classes.

    Attributes:
        x_unseen: Images by the held-out fonts, (M, 1, 32, 32) uint8, of each code point at least two, by different
            families.
        y_unseen: Number of the code point, (M,) int64.
        report: What was found and left out.
    """
    x_unseen: torch.Tensor
    y_unseen: torch.Tensor
    report: dict[str, Any]


def load_glyphs(characters: str, number: int | None = None, *, images: int = 20, unseen: int = 500, seed: int = 0,
                folder: Path | None = None, held_out: Sequence[str] | None = None, without: Sequence[str] = (),
                cache: Path = CACHE) -> Glyphs:
    """Draw glyphs, or read those that were drawn.

    Args:
        characters: One of `CHARACTERS`.
        number: Number of classes, drawn at random. Default: all.
        images: Largest number of training images a class, each of a face of its own; of few from one family, where
            many families draw it.
        unseen: Number of code points besides the classes, or fewer if held-out fonts have fewer.
        seed: Of the draw of the code points.
        folder: Holds the fonts, at any depth. Default: the installed ones; for 'dejavu' matplotlib's.
        held_out: Names of files, without ending, whose families make the test images. Default: `HELD_OUT`.
        without: Names of files whose families draw nothing: the test's, where settings are chosen on other fonts.
        cache: Folder for what was drawn.

    Raises:
        ValueError: No such set, too few code points, or no fonts on one side of the split.
    """
    if characters not in CHARACTERS:
        raise ValueError(f'characters must be one of {", ".join(CHARACTERS)}, not {characters!r}.')
    held_out = tuple(held_out or (_DEJAVU_HELD_OUT if characters == 'dejavu' else HELD_OUT))
    files = _files(characters, folder)
    key = repr((characters, number, images, unseen, seed, held_out, tuple(without),
                sorted((file.name, file.stat().st_size) for file in files)))
    path = cache / f'{characters}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz'
    if not path.exists():
        drawn = _draw(characters, number, images, unseen, seed, files, held_out, without)
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f'.{os.getpid()}.part')
        with open(part, 'wb') as file:
            np.savez(file, **drawn)
        part.replace(path)
    with np.load(path) as drawn:
        content = {name: torch.from_numpy(drawn[name]) for name in ('x_train', 'y_train', 'x_test', 'y_test',
                                                                    'x_unseen', 'y_unseen')}
        return Glyphs(**content, classes=tuple(map(str, drawn['classes'])), report=json.loads(str(drawn['report'])))


def _files(characters: str, folder: Path | None) -> list[Path]:
    if folder is not None:
        return sorted(path for path in Path(folder).rglob('*') if path.is_file())
    if characters == 'dejavu':
        import matplotlib
        return sorted((Path(matplotlib.get_data_path()) / 'fonts' / 'ttf').glob('DejaVuS*.ttf'))
    return sorted(path for path in set(installed_files()) if path.exists())


def _code_points(characters: str) -> list[int]:
    if characters == 'block':
        return list(range(0x4E00, 0x9FA6))
    if characters == 'dejavu':
        return [code for code in range(0x21, 0x3000) if unicodedata.category(chr(code))[0] == 'L']
    pairs = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 56) for cell in range(1, 95))
    return sorted(ord(text) for text in (pair.decode('gb2312', 'ignore') for pair in pairs) if text)


class _Drawn:
    """What the faces of some families draw: images, with the pairs of code points that a face draws alike."""

    def __init__(self, families: list[list[Face]], faces: dict[Face, frozenset[int]], codes: Sequence[int], size: int):
        # The first faces of all families, then their second ones: in this order a class takes its images.
        ordered = sorted((rank, family, face) for family, group in enumerate(families)
                         for rank, face in enumerate(_spread(group)))
        self.images: dict[int, list[np.ndarray]] = defaultdict(list)
        self.families: dict[int, set[int]] = defaultdict(set)
        pairs: dict[tuple[int, int], set[int]] = defaultdict(set)
        for _, family, face in ordered:
            own = [code for code in codes if code in faces[face]]
            images = render(face, own, size)
            alike: dict[bytes, list[int]] = defaultdict(list)
            for code, image, good in zip(own, images, drawable(images)):
                if good:
                    self.images[code].append(image)
                    self.families[code].add(family)
                    alike[image.tobytes()].append(code)
            for group in alike.values():
                for later in range(1, len(group)):
                    pairs[group[0], group[later]].add(family)
        self.doubles = {later for (_, later), found in pairs.items() if len(found) > 1}

    def of(self, code: int, most: int) -> list[np.ndarray]:
        """Return at most so many images of a code point, no two of them the same."""
        return list({image.tobytes(): image for image in self.images[code]}.values())[:most]


def _spread(group: list[Face]) -> list[Face]:
    """Return at most `_MOST_FACES` of a family's faces, spread over their order by weight and cut."""
    order = np.random.default_rng(0).permutation(len(group))[:_MOST_FACES]
    return [group[i] for i in order]


def _draw(characters: str, number: int | None, images: int, unseen: int, seed: int, files: list[Path],
          held_out: Sequence[str], without: Sequence[str]) -> dict[str, np.ndarray]:
    size, codes = _SIZES[characters], _code_points(characters)
    # Whatever the set, ideographs are compared over all of the block, so that the families are the same.
    faces = faces_of(files, codes if characters == 'dejavu' else _code_points('block'))
    families = [family for family in families_of(faces, size, of_files=characters == 'dejavu')
                if not any(face.path.stem in without for face in family)]
    test = [family for family in families if any(face.path.stem in held_out for face in family)]
    train = [family for family in families if family not in test]
    if not test or not train:
        raise ValueError(f'held_out={held_out} leaves {len(train)} families of fonts for the training images and '
                         f'{len(test)} for the test images, of {len(faces)} faces.')
    others = [] if characters == 'dejavu' else list(_UNSEEN)
    if others:
        faces.update({face: faces[face] | has for face, has in faces_of({face.path for face in faces}, others).items()
                      if face in faces})
    drawn, tests = _Drawn(train, faces, codes, size), _Drawn(test, faces, [*codes, *others], size)
    too_few = [code for code in codes if len(drawn.families[code]) < _LEAST_FAMILIES or not tests.families[code]]
    good = [code for code in codes if code not in drawn.doubles and code not in set(too_few)]
    generator = np.random.default_rng(seed)
    # Code points for recall: nothing of them is in the training. Two held-out families at least draw each.
    pool = [code for code in others or good if len(tests.families[code]) > 1 and code not in tests.doubles]
    pool = sorted(generator.permutation(pool)[:unseen if others else min(unseen, len(good) // 5)].tolist())
    good = [code for code in good if code not in set(pool)]
    if number is not None:
        if number > len(good):
            raise ValueError(f'number={number}, but {len(good)} code points are left.')
        good = sorted(generator.permutation(good)[:number].tolist())
    report = {
        'training_families': [[str(face) for face in _spread(family)] for family in train],
        'test_families': [[str(face) for face in _spread(family)] for family in test],
        'code_points': len(codes), 'in_too_few_families': len(too_few),
        'drawn_alike': ''.join(map(chr, sorted(drawn.doubles - set(too_few)))),
    }
    arrays: dict[str, Any] = {'classes': np.array([chr(code) for code in good]), 'report': json.dumps(report)}
    for name, source, chosen, most in (('train', drawn, good, images), ('test', tests, good, images),
                                       ('unseen', tests, pool, images)):
        pictures = [source.of(code, most) for code in chosen]
        arrays[f'x_{name}'] = np.array(list(chain(*pictures)), np.uint8).reshape(-1, 1, SIDE, SIDE)
        arrays[f'y_{name}'] = np.repeat(np.arange(len(chosen)), np.array([len(each) for each in pictures], np.int64))
    return arrays


def warp(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images as if photographed: each with an affine warp, blur, contrast and noise of its own.

    Args:
        images: (B, 1, H, W), 0 to 255.
        generator: On the images' device.

    Returns:
        (B, 1, H, W) float32, 0 to 255.
    """
    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator, device=images.device)

    images = images.float()
    angle, shear, shift = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(-0.1, 0.1, 2, 1)
    wide, high = uniform(0.9, 1.25), uniform(0.9, 1.25)  # above one the glyph shrinks
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([wide * cos, wide * (shear * cos - sin), high * sin, high * (shear * sin + cos)], dim=1)
    theta = torch.cat([rows.view(-1, 2, 2), shift], dim=2)
    images = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    # Between the image and one that is blurred by the binomial filter of five: blur of any strength in one pass.
    line = images.new_tensor([1, 4, 6, 4, 1]) / 16
    blurred = F.conv2d(images, torch.outer(line, line).view(1, 1, 5, 5), padding=2)
    images = torch.lerp(images, blurred, uniform(0, 1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (uniform(0.5, 1, 1, 1, 1) * images + uniform(0, 30, 1, 1, 1) * noise).clamp_(0, 255)


def few_images(glyphs: Glyphs, train: int, test: int, seed: int = 0) -> Images:
    """Return a data set of few images a class, each warped once.

    Args:
        glyphs: As drawn.
        train: Training images of each class, of as many faces, or of all faces more than once.
        test: Test images of each class, of its held-out faces in turn.
        seed: Of the warps.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(x: torch.Tensor, y: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.bincount(y, minlength=glyphs.num_classes)
        place = torch.arange(number) % counts.unsqueeze(1) + (counts.cumsum(0) - counts).unsqueeze(1)
        warped = torch.cat([warp(part, generator).round().to(torch.uint8) for part in x[place.flatten()].split(4096)])
        return warped, y[place.flatten()]

    return Images(*draw(glyphs.x_train, glyphs.y_train, train), *draw(glyphs.x_test, glyphs.y_test, test),
                  glyphs.classes)


def contact_sheet(images: torch.Tensor, columns: int) -> Image.Image:
    """Return images (N, 1, H, W), 0 to 255, as one picture, three times as large."""
    height, width = images.shape[2:]
    images = F.pad(images[:len(images) // columns * columns].float(), (1, 1, 1, 1), value=96)
    rows = images.view(-1, columns, height + 2, width + 2).transpose(1, 2).reshape(-1, columns * (width + 2))
    sheet = Image.fromarray(rows.round().to(torch.uint8).numpy())
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--characters', choices=CHARACTERS, default='gb2312')
    parser.add_argument('--number', type=int, help='of classes; default: all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--fonts', type=Path, help='folder of fonts; default: the installed ones')
    parser.add_argument('--few', type=int, nargs=2, metavar=('TRAIN', 'TEST'), help='images a class, warped once')
    parser.add_argument('--output', type=Path, help='npz file of x_train, y_train, x_test, y_test, classes')
    parser.add_argument('--sheet', type=Path, help='picture of some classes: training images, then test images')
    args = parser.parse_args()
    glyphs = load_glyphs(args.characters, args.number, seed=args.seed, folder=args.fonts)
    images = few_images(glyphs, *args.few, seed=args.seed) if args.few else glyphs
    print(json.dumps(glyphs.report, ensure_ascii=False, indent=1))
    counts = {name: torch.bincount(getattr(images, f'y_{name}')) for name in ('train', 'test')}
    print(f'{images.num_classes} classes; images a class: ' + ', '.join(
        f'{name} {int(count.min())} to {int(count.max())}' for name, count in counts.items())
        + f'; {len(glyphs.y_unseen.unique())} other code points with {len(glyphs.y_unseen)} images')
    if args.output:
        arrays = {name: getattr(images, name).numpy() for name in ('x_train', 'y_train', 'x_test', 'y_test')}
        np.savez(args.output, **arrays, classes=np.array(images.classes))
    if args.sheet:
        step, columns = max(1, images.num_classes // 12), 26
        lines = []
        for label in range(0, images.num_classes, step):
            line = torch.cat([images.x_train[images.y_train == label][:columns - 10],
                              images.x_test[images.y_test == label][:10]])
            lines += [line, line.new_zeros(columns - len(line), *line.shape[1:])]
        contact_sheet(torch.cat(lines), columns).save(args.sheet)


if __name__ == '__main__':
    main()
