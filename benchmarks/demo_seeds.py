"""The demo over several seeds: top-1 of each head, each row one run of `timm-dl2pa demo`.

    python benchmarks/demo_seeds.py

The first seed's table and pictures are kept too: results/demo.json, demo.png (which prototypes lie side by side),
demo_sphere.png and demo_accuracy.png.
"""
import argparse
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from results_file import RESULTS, write_results

from timm_dl2pa.demo import run_demo

_KEPT = {'results.json': 'demo.json', 'neighbours.png': 'demo.png', 'sphere.png': 'demo_sphere.png',
         'accuracy.png': 'demo_accuracy.png'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            began, began_cpu = time.perf_counter(), time.process_time()
            runs = run_demo(seed=seed, device='cpu', output=folder)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
            if not results:
                for name, kept in _KEPT.items():
                    shutil.copyfile(Path(folder) / name, RESULTS / kept)
        # The top-1 of each head by its name; all that was measured in `runs`.
        results.append({'seed': seed, **{run.head: run.top1 for run in runs}, 'seconds': round(seconds, 1),
                        'cpu_seconds': round(cpu_seconds, 1), 'runs': [asdict(run) for run in runs]})
        print(write_results('demo_seeds', vars(args), results), flush=True)


if __name__ == '__main__':
    main()
