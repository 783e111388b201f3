"""Prototypes beside the authors' published ones: uniformity energy, largest cosine, seconds on one core.

    python benchmarks/prototypes.py
"""
import argparse
import time

import torch
from results_file import write_results
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from timm_dl2pa import make_prototypes, uniformity

# (K, d): energy and largest cosine of the authors' files, as measured from them.
PUBLISHED = {
    (100, 3): (-2.15313, 0.9998),
    (100, 5): (-2.79586, 0.7635),
    (100, 10): (-3.45516, 0.4573),
    (100, 16): (-3.71449, 0.3262),
    (100, 32): (-3.92139, 0.2465),
    (100, 84): (-4.02941, 0.0189),
    (200, 50): (-3.92839, 0.2050),
    (200, 100): (-4.00481, 0.1995),
    (1000, 512): (-3.99300, 0.1564),
}


def max_cosine(points: torch.Tensor) -> float:
    cosines = points.double() @ points.double().t()
    return cosines.fill_diagonal_(-1).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    results = []
    for (num, dim), (energy, cosine) in tqdm(PUBLISHED.items(), unit='size'):
        with threadpool_limits(1):
            began = time.perf_counter()
            points = make_prototypes(num, dim, seed=args.seed)
            seconds = time.perf_counter() - began
        results.append({
            'num_prototypes': num, 'dim': dim, 'energy': round(uniformity(points), 6),
            'max_cosine': round(max_cosine(points), 4), 'seconds_one_core': round(seconds, 2),
            'published_energy': energy, 'published_max_cosine': cosine})
    for result in results:
        print(result)
    print(write_results('prototypes', vars(args), results))


if __name__ == '__main__':
    main()
