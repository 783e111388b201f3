"""Very many classes, measured end to end: accuracy, time and memory of each kind of classifier on real glyphs.

    python benchmarks/many_classes.py                                   # the 3,755 ideographs of GB 2312's level 1
    python benchmarks/many_classes.py --data block --epochs 1 --dims 64 128 --seeds 0      # 20,902 ideographs
    python benchmarks/many_classes.py --data dejavu                     # letters, of the fonts that matplotlib carries
    python benchmarks/many_classes.py --data FOLDER --epochs 20         # FOLDER/train, FOLDER/validation: small images

The glyphs and the Debian packages that they are drawn from are described in `glyphs.py`, the methods in
`many_classes_methods.py`. All methods share the backbone, the images, the number of steps and the optimiser: AdamW with
a rise and a cosine fall. Each combination runs once, in a process of its own; it adds its row at once, so that the
command can be stopped and called again. A row has

- top-1 and top-5 on test images: of other fonts than the training images;
- top-1 by the nearest class mean: the direction of the training images' mean embedding, after the training. It is the
  same for all methods. Of `placed` also after `prime` on the trained model, which puts the prototypes anew;
- recall@1 on 500 classes that are not in the training, drawn by the test's fonts: how often the nearest of all other
  images, by the cosine of the embeddings, is of the same class. No two of a class are drawn by the same face;
- CPU seconds of training, and of it in the classifier: its forward, loss, backward and optimiser step, with all that
  the scheduler does. The backbone's part is the same for all;
- `making_cpu_seconds`: until the classifier is made, prototypes included, unless they are in the cache;
- the process's peak memory in the training, and before the classifier was made, with data and backbone.
"""
import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from glyphs import CACHE, CHARACTERS
from many_classes_methods import METHODS
from many_classes_run import Setting, run
from results_file import Runs, add_output_argument

NAME = 'many_classes'


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='gb2312', help=f'{", ".join(CHARACTERS)}, or an ImageFolder')
    parser.add_argument('--number', type=int, help='of classes, drawn at random; default: all')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--dims', type=int, nargs='+', default=[64])
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--lr', type=float, nargs='+', default=[1e-2])
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--num-sampled', type=int, nargs='+', default=[1024], help='of sampled softmax')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--validation', action='store_true', help="test on training fonts, without the test's")
    parser.add_argument('--fonts', type=Path, help='folder of fonts; default: the installed ones')
    parser.add_argument('--cache', type=Path, default=CACHE, help='folder of drawn glyphs')
    parser.add_argument('--threads', type=int, default=1)
    add_output_argument(parser)
    return parser


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Yield each combination once, a seed after the other."""
    name = args.data if args.data in CHARACTERS else Path(args.data).name
    combined = (Setting(
        data=name, number=args.number, method=method, dim=dim, epochs=args.epochs, lr=lr, batch_size=args.batch_size,
        num_sampled=num_sampled, validation=args.validation, seed=seed).normal()
        for seed, dim, method, lr, num_sampled in itertools.product(
            args.seeds, args.dims, args.methods, args.lr, args.num_sampled))
    yield from dict.fromkeys(combined)


def run_alone(*arguments: Any, threads: int) -> dict[str, Any]:
    """Return what `run` does, called in a new process."""
    with multiprocessing.get_context('spawn').Pool(1, torch.set_num_threads, (threads,)) as pool:
        return pool.apply(run, arguments)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    runs = Runs(NAME, Setting, args.output)
    todo = [setting for setting in settings_of(args) if setting not in runs]
    print(f'{len(todo)} runs')
    folder = None if args.data in CHARACTERS else Path(args.data)
    for setting in todo:
        found = run_alone(setting, folder, args.fonts, args.cache, threads=args.threads)
        runs.add(setting, found)
        print(line(setting, found), flush=True)


def line(setting: Setting, found: dict[str, Any]) -> str:
    """Return a run in one line."""
    recall = f'recall@1 {found["recall_at_1"]:.1f}, ' if 'recall_at_1' in found else ''
    return (f'{setting}: top-1 {found["top1"]:.2f}, top-5 {found["top5"]:.2f}, {recall}'
            f'{found["cpu_seconds"]:.0f} CPU s, of them {found["head_cpu_seconds"]:.0f} in the head, '
            f'{found["making_cpu_seconds"]:.0f} before, peak memory {found["peak_memory_mb"]} MiB, '
            f'before the head {found["memory_before_mb"]}')


if __name__ == '__main__':
    main()
