"""The demo over several seeds: top-1 of the three heads on the digits, each row one run of `timm-dl2pa demo`.

    python benchmarks/demo_seeds.py
"""
import argparse
import tempfile

from results_file import write_results

from timm_dl2pa.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--dim', type=int, default=3)
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs = run_demo(seed=seed, dim=args.dim, device='cpu', output=folder)
        results.append({'seed': seed, **{run.head: run.top1 for run in runs}})
    print(write_results('demo_seeds', vars(args), results))


if __name__ == '__main__':
    main()
