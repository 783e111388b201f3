"""How accurate is the head? The same backbone and budget, with each method; one JSON file a run.

    python benchmarks/accuracy.py --method dl2pa --dim 50 --seed 3 --arrays FOLDER        # one run
    python benchmarks/accuracy.py --queue short --arrays FOLDER                           # all of a list, resumable
    python benchmarks/accuracy.py --method dl2pa --dim 8 --epochs 3                       # a smoke run on digits
    python benchmarks/readme_tables.py                                                    # the tables

Data: `--data-dir` (ImageFolder: train/, validation/), `--arrays` (a folder of npz files), or scikit-learn's digits.
`--validation` trains on nine tenths of the training images and tests on the last tenth: choose there, never on test
images. A run whose file is complete is not run again; one that was cut goes on from its last epoch.

The methods are described in `accuracy_methods.py`.
"""
import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from accuracy_execute import execute
from accuracy_queue import QUEUES, queue
from accuracy_recipe import SIZES, Recipe
from image_arrays import load_images
from results_file import RESULTS

# Exit status of a run that ended at --until.
OUT_OF_TIME = 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir')
    parser.add_argument('--arrays')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=RESULTS / 'accuracy')
    parser.add_argument('--queue', choices=QUEUES, help='run a list of runs, one after the other')
    parser.add_argument('--parallel', type=int, default=1, help='runs of a list side by side, on a large GPU')
    parser.add_argument('--until', type=float, default=math.inf, metavar='UNIX_TIME',
                        help='end by then with a checkpoint, from which the next call goes on; exit status 3')
    parser.add_argument('--size', choices=tuple(SIZES), help='a set of defaults')
    parser.add_argument('--dl2pa', nargs='*', default=[], metavar='NAME=VALUE', help='arguments of AssignmentScheduler')
    for name, value in asdict(Recipe()).items():
        flag = '--' + name.replace('_', '-')
        if isinstance(value, bool):
            parser.add_argument(flag, action='store_true', default=None)
        elif name != 'dl2pa':
            kinds = {'scale': float, 'loss_weight': float, 'imbalance': float, 'image_size': int, 'neck': str,
                     'start_from': str, 'dl2pa_recipe': str}
            parser.add_argument(flag, type=kinds.get(name) or type(value))
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    given = {name: getattr(args, name) for name in asdict(Recipe()) if name != 'dl2pa'}
    given = {name: value for name, value in given.items() if value is not None}
    options = {}
    for pair in args.dl2pa:
        name, _, value = pair.partition('=')
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return Recipe(**{**SIZES.get(args.size, {}), **given, 'dl2pa': options})


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    place = [f'{flag}={value}' for flag, value in (('--data-dir', args.data_dir), ('--arrays', args.arrays)) if value]
    place += [f'--device={args.device}', f'--output={args.output}', f'--until={args.until}']
    if args.queue:
        # A process a run, so that a run's peak memory and random numbers are its own.
        def run(arguments: list[str]) -> int:
            if time.time() > args.until:
                return OUT_OF_TIME
            return subprocess.run([sys.executable, __file__, *arguments, *place], check=False).returncode

        with ThreadPoolExecutor(args.parallel) as pool:
            failed = [code for code in pool.map(run, queue(args.queue)) if code]
        return failed[0] if failed else 0
    recipe = _recipe(args)
    images = load_images(data_dir=args.data_dir, arrays=args.arrays, size=recipe.image_size)
    args.output.mkdir(parents=True, exist_ok=True)
    hidden, words = ('--data-dir', '--arrays', '--output', '--device', '--until'), []
    for word, previous in zip(sys.argv[1:], sys.argv):
        if previous in hidden or word.partition('=')[0] in hidden:
            continue
        words.append(word)
    data = ' --data-dir DATA' if args.data_dir else ' --arrays DATA' if args.arrays else ''
    command = f'python benchmarks/accuracy.py {shlex.join(words)}{data} --device {args.device}'
    record = execute(recipe, images, torch.device(args.device), args.output, command, args.until)
    if record is None:
        return OUT_OF_TIME
    print(json.dumps(record['results']))
    return 0


if __name__ == '__main__':
    sys.exit(main())
