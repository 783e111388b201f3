"""Checks and measures everything on a GPU, in the minutes that there are: the most telling first of what is missing.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9 --output FOLDER --arrays CIFAR-100 --tiny-imagenet TINY
    python benchmarks/gpu.py --dry-run --output FOLDER                  # every step at toy size, on the CPU
    python benchmarks/gpu.py --unpack FILE... [--output FOLDER]         # results into benchmarks/results

The steps, each a process of its own with a time limit:

tests          pytest -m gpu
head_step      what a head costs a step, at up to a million classes, beside nn.Linear, Partial FC and the authors' code
cifar          CIFAR-100, ResNet-32, at d = 50, 10 and 100: learned classifiers, static prototypes, the authors' rule,
               ours with each recipe; by RepDistiller's schedule (its short version first, where the long one does not
               fit), then by the paper's
assignment     21,841 and 100,000 classes, with the passes over the pairs on the card and on the CPU
prototypes     (21841, 128) and (21841, 256) by descent on the card
train_step     timm's training step with and without the plugin, ResNet-50, compiled and not
tiny_imagenet  Tiny-ImageNet, the same methods at d = 50, 100 and 200

A step is left out if its record is complete in `benchmarks/results` or in FOLDER. None is begun that has no time left;
one that fails does not stop the next. Each writes its record at once, so that what has ended stays when this is killed.
A training ends in time with a checkpoint in FOLDER, and goes on from it if the next call is given the same FOLDER (or
has the checkpoint in `benchmarks/results`). Trainings run side by side, `--parallel` of them, by NVIDIA's MPS where it
is installed; nothing else does.

After each step and every half minute, FOLDER (or `--pack`) gets results.tar and checkpoints-0.tar, ...: everything in a
few files below 16 MiB, for a machine from which only a few come back. Take them over with `--unpack`.

Data: --arrays as for accuracy.py; --tiny-imagenet takes such a folder too (`pack_tiny_imagenet.py` makes one), or an
ImageFolder with train/ and validation/. The exit status is 1 if a step failed.
"""
import argparse
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from gpu_pack import pack, unpack
from gpu_sharing import shared_gpu
from gpu_steps import KINDS, all_steps, seconds_an_epoch
from gpu_work import Work
from results_file import RESULTS, environment


def _places(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the arguments of accuracy.py that say where the data are, for those that are there."""
    places = {}
    for need, folder in (('arrays', args.arrays), ('tiny_imagenet', args.tiny_imagenet)):
        if folder is not None and (folder / 'test.npz').exists():
            places[need] = ['--arrays', str(folder.resolve())]
        elif folder is not None and need == 'tiny_imagenet' and (folder / 'validation').is_dir():
            places[need] = ['--data-dir', str(folder.resolve())]
        elif folder is not None:
            print(f'{folder} holds no test.npz' + (', nor a folder validation' if need == 'tiny_imagenet' else ''),
                  flush=True)
    return places


def _bring_checkpoints(output: Path) -> None:
    """Copy checkpoints of `benchmarks/results` that the output does not have."""
    for file in RESULTS.glob('*/*.ckpt'):
        target = output / file.relative_to(RESULTS)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9.0, help='how long it may take in all (default: 9)')
    parser.add_argument('--output', type=Path, help='folder of records, logs and checkpoints')
    parser.add_argument('--pack', type=Path, metavar='FOLDER', help='where the tar files go (default: --output)')
    parser.add_argument('--arrays', type=Path, metavar='DIR', help='CIFAR-100, a folder of npz files')
    parser.add_argument('--tiny-imagenet', type=Path, metavar='DIR', help='a folder of npz files, or an ImageFolder')
    parser.add_argument('--steps', nargs='+', choices=KINDS, default=KINDS, help='only these')
    parser.add_argument('--parallel', type=int, default=4, help='trainings side by side (default: 4)')
    parser.add_argument('--dry-run', action='store_true', help='every step at toy size, on the CPU')
    parser.add_argument('--unpack', type=Path, nargs='+', metavar='FILE', help='take over what was packed, and end')
    args = parser.parse_args()
    if args.unpack:
        for path in unpack(args.unpack, RESULTS, args.output or RESULTS):
            print(path)
        return 0
    if args.output is None:
        parser.error('--output says where the records go.')
    device = 'cpu' if args.dry_run else 'cuda'
    found = environment()
    if device == 'cuda' and found['gpu'] is None:
        parser.error('PyTorch sees no CUDA device here. --dry-run tries every step on the CPU.')
    print(f'{found["gpu"] or found["cpu"]}, driver {found["driver"]}, torch {found["torch"]}, CUDA {found["cuda"]}',
          flush=True)
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    folders = [args.output] if args.dry_run else [RESULTS, args.output]
    if not args.dry_run:
        _bring_checkpoints(args.output)
    else:
        # Toys side by side on few cores: threads would wait for each other.
        os.environ.setdefault('OMP_NUM_THREADS', '1')
    packed = (args.pack or args.output).resolve()
    seconds = 60 * args.minutes

    def ended(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    steps = all_steps(device, seconds=seconds, parallel=args.parallel, epoch=seconds_an_epoch(folders),
                      dry_run=args.dry_run)
    steps = [step for step in steps if step.kind in args.steps]
    shared = device == 'cuda' and args.parallel > 1 and any(step.training and not step.done(*folders) for step in steps)
    with shared_gpu() if shared else nullcontext({}) as sharing:
        if shared:
            print('trainings share the GPU by MPS' if sharing else 'without MPS trainings take turns', flush=True)
        work = Work(args.output, seconds - (time.monotonic() - began), args.parallel, _places(args),
                    lambda: pack(args.output, packed), sharing)
        work.run(steps, *folders)
    for name in pack(args.output, packed):
        print(f'{name} found no room in the packed files, and stays in {args.output.name}', flush=True)
    print(f'{len(work.failed)} steps failed' + (f': {", ".join(work.failed)}' if work.failed else ''), flush=True)
    return 1 if work.failed else 0


if __name__ == '__main__':
    sys.exit(main())
