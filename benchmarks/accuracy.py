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
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from accuracy_arguments import make_parser, recipe_of
from accuracy_execute import execute
from accuracy_queue import queue
from image_arrays import load_images

# Exit status of a run that ended at --until.
OUT_OF_TIME = 3


def main() -> int:
    args = make_parser(__doc__).parse_args()
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
    recipe = recipe_of(args)
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
