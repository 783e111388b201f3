"""The demo over several seeds: each row is one run of `timm-dl2pa demo`.

    python benchmarks/demo_seeds.py
"""
import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from results_file import write_results

from timm_dl2pa.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--keep', type=Path, help='folder that keeps what the first seed writes')
    args = parser.parse_args()
    results = []
    for number, seed in enumerate(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs = run_demo(seed=seed, device='cpu', output=args.keep if args.keep and not number else folder)
        results.append({'seed': seed, **{run.head: run.top1 for run in runs},
                        'runs': [asdict(run) for run in runs]})
        print(write_results('demo_seeds', vars(args), results))


if __name__ == '__main__':
    main()
