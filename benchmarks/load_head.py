"""What a trained head costs to load, and to put on a backbone: nothing is computed, the prototypes are in the file.

A head of C = 21,841 classes in d = 128 dimensions is saved to a folder, and then, several times, medians taken:

- read: the bytes of both files are read and the sha256 of the weights is computed; what loading cannot go below;
- load: `load_head(folder)`;
- wrap: `wrap_dl2pa(backbone, head=folder)`, which loads and wraps; the backbone is made before;
- make: how long the prototypes took to make, once, for comparison.

Calls of `make_prototypes` during loading and wrapping are counted: there must be none.

    python benchmarks/load_head.py
"""
import argparse
import hashlib
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import timm
import torch
from results_file import write_results
from tqdm import tqdm

import timm_dl2pa.head.module
import timm_dl2pa.models.wrapping
from timm_dl2pa import DL2PAHead, load_head, make_prototypes, wrap_dl2pa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--num-classes', type=int, default=21841)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    began = time.perf_counter()
    prototypes = make_prototypes(args.num_classes, args.dim, seed=args.seed, cache=False)
    made = time.perf_counter() - began
    backbone = timm.create_model(args.model)
    head = DL2PAHead(backbone.num_features, args.num_classes, args.dim, prototypes=prototypes, neck='linear_bn')
    head.assign(torch.randperm(args.num_classes))

    times: dict[str, list[float]] = {'read': [], 'load': [], 'wrap': []}
    with TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        files = sorted(Path(folder).iterdir())
        with patch.object(timm_dl2pa.head.config, 'make_prototypes', wraps=make_prototypes) as counted:
            for number in tqdm(range(args.rounds + 1), unit='round', disable=None):
                backbone = timm.create_model(args.model)
                took = {}
                for name, action in {
                    'read': lambda: [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
                    'load': lambda: load_head(folder),
                    'wrap': lambda model=backbone: wrap_dl2pa(model, head=folder),
                }.items():
                    began = time.perf_counter()
                    action()
                    took[name] = time.perf_counter() - began
                if number:  # the first round warms up
                    for name, seconds in took.items():
                        times[name].append(seconds)
            calls = counted.call_count
        megabytes = sum(path.stat().st_size for path in files) / 1e6
    assert torch.equal(backbone.get_classifier().class_prototypes, head.class_prototypes)
    seconds = {name: median(values) for name, values in times.items()}
    results = {
        'num_classes': args.num_classes, 'dim': args.dim, 'megabytes': round(megabytes, 1),
        **{f'{name}_ms': round(1000 * value, 1) for name, value in seconds.items()},
        'wrap_beyond_reading_ms': round(1000 * (seconds['wrap'] - seconds['read']), 1),
        'slowest_wrap_ms': round(1000 * max(times['wrap']), 1),
        'calls_of_make_prototypes': calls,
        'making_the_prototypes_ms': round(1000 * made, 1),
    }
    print(results)
    print(write_results('load_head', vars(args), [results]))


if __name__ == '__main__':
    main()
