"""Prototypes by every method, beside the proven bound, the authors' recipe and their published files.

    python benchmarks/prototypes.py                      # the table of small sizes, one core
    python benchmarks/prototypes.py --large              # thousands to a million points, all cores
    python benchmarks/prototypes.py --device cuda        # descent at (21841, 128) and (21841, 256)
"""
import argparse
import time

import torch
from results_file import add_output_argument, read_results, result_name, write_results
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from timm_dl2pa import make_prototypes, prototype_quality

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
    (100, 128): (-4.04040, -0.0101),
    (100, 200): (-4.04040, -0.0101),
    (200, 200): (-4.02010, -0.0046),
}
OPTIMAL = [(12, 3), (24, 3), (24, 4), (16, 5), (27, 6), (56, 7), (240, 8)]
ON_A_GPU = [(21841, 128), (21841, 256)]
LARGE = [(4224, 64), (66048, 256), (21841, 128), (21841, 384), (21841, 512), (100_000, 512), (1_000_000, 1024)]


def measure(num: int, dim: int, **options) -> dict:
    """One row: what was made, how good it is, what it took."""
    began = time.perf_counter()
    points, info = make_prototypes(num, dim, return_info=True, cache=False, **options)
    seconds = time.perf_counter() - began
    # Beyond 10^13 operations a sample is measured.
    quality = prototype_quality(points, max_work=5e12)
    row = {
        'num_prototypes': num, 'dim': dim, **options, 'made_by': info.method, 'theorem': info.theorem,
        'max_cosine': round(quality.max_cosine, 8), 'sampled_rows': quality.sampled_rows if quality.sampled else None,
        'mean_nearest_cosine': round(quality.mean_nearest_cosine, 6), 'energy': round(quality.energy, 6),
        'bound': round(quality.bound, 8), 'mean_norm': float(f'{quality.mean_norm:.1e}'), 'seconds': round(seconds, 2)}
    if (num, dim) in PUBLISHED:
        row['published_energy'], row['published_max_cosine'] = PUBLISHED[num, dim]
    return row


def descents(sizes: list[tuple[int, int]], device: str, effort: float) -> list[tuple]:
    return [(*size, dict(objective=objective, method='optimise', device=device, effort=effort))
            for size in sizes for objective in ('uniform', 'separated')]


def plan(large: bool) -> list[tuple]:
    if large:
        options = [dict(objective=objective) for objective in ('uniform', 'separated')]
        options.append(dict(objective='uniform', method='cross_polytopes'))
        return [(*size, each) for size in LARGE for each in options
                if size[0] < 10 ** 6 or each.get('method') is None]
    rows = [(*size, dict(objective=objective)) for size in PUBLISHED for objective in ('uniform', 'separated')]
    rows += [(*size, dict(objective='uniform', method='sgd')) for size in PUBLISHED]
    rows += [(*size, dict(objective='separated')) for size in OPTIMAL]
    return rows


def size_of(text: str) -> tuple[int, int]:
    """Return the pair (K, d) of the text 'K,d'."""
    num, dim = map(int, text.split(','))
    return num, dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--large', action='store_true')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--sizes', type=size_of, nargs='+', metavar='K,d', help='descents of these sizes alone')
    parser.add_argument('--effort', type=float, default=1.0, help='of such descents')
    parser.add_argument('--resume', action='store_true', help='keep the rows that are in the results already')
    add_output_argument(parser)
    args = parser.parse_args()
    gpu = args.device != 'cpu'
    threads = torch.get_num_threads() if args.large or gpu else 1
    torch.set_num_threads(threads)
    name = result_name('prototypes' + ('_large' if args.large else ''), args.device)
    results = read_results(name, args.output) if args.resume else []
    path = None
    done = [(r['num_prototypes'], r['dim'], r['objective'], r.get('method')) for r in results]
    rows = descents(args.sizes or ON_A_GPU, args.device, args.effort) if args.sizes or gpu else plan(args.large)
    with threadpool_limits(threads):
        for num, dim, options in tqdm(rows, unit='set', disable=None):
            if (num, dim, options['objective'], options.get('method')) in done:
                continue
            results.append(measure(num, dim, seed=args.seed, **options))
            tqdm.write(str(results[-1]))
            path = write_results(name, vars(args), results, args.output)
    print(path)


if __name__ == '__main__':
    main()
