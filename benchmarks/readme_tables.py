"""Write the README's tables from `benchmarks/results/*.json`, between its `<!-- NAME -->` and `<!-- /NAME -->` marks.

    python benchmarks/readme_tables.py            # writes them
    python benchmarks/readme_tables.py --check    # fails if the README has other figures
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def head_step(record: dict[str, Any]) -> str:
    header = ['C, d', '`nn.Linear`, cross-entropy', "the authors' step", 'ours, cross-entropy',
              'ours, `SquaredCosineLoss`', 'the neck alone', 'faster than `nn.Linear`', "faster than the authors'"]
    rows = [[f'{r["num_classes"]:,}, {r["dim"]}', *(f'{r[f"{name}_ms"]:.1f} ms' for name in
             ('linear', 'authors', 'logits', 'embeddings', 'neck')),
             f'{r["faster_than_linear"]:,.1f}x', f'{r["faster_than_authors"]:.1f}x'] for r in record['results']]
    return table(header, rows)


def train_step(record: dict[str, Any]) -> str:
    rows = [[f'{r["model"]}, {r["num_classes"]:,}, {r["dim"]}', *(f'{r[f"{name}_ms"]:,.0f} ms' for name in
             ('linear', 'criterion', 'squared_cosine')), f'{r["criterion_over_linear"]:.3f}',
             f'{r["squared_cosine_over_linear"]:.3f}', f'{100 * r["squared_cosine_tracking_share"]:.3f} %']
            for r in record['results']]
    return table(['model, C, d', 'linear', 'ours, cross-entropy', 'ours, `squared_cosine`', 'ratio, cross-entropy',
                  'ratio, `squared_cosine`', 'tracking'], rows)


def prototypes(record: dict[str, Any]) -> str:
    rows = [[f'{r["num_prototypes"]:,}, {r["dim"]}', f'{r["energy"]:.5f}', f'{r["published_energy"]:.5f}',
             f'{r["max_cosine"]:.3f}', f'{r["published_max_cosine"]:.3f}', f'{r["seconds_one_core"]:.1f} s']
            for r in record['results']]
    return table(['K, d', 'energy', "the authors' energy", 'largest cosine', "the authors' largest cosine", 'one core'],
                 rows)


def demo(record: dict[str, Any]) -> str:
    names = {'linear': 'linear classifier', 'static': 'fixed prototypes, static assignment', 'dl2pa': 'DL2PA'}
    rows = [[names[run['head']], f'{run["top1"]:.2f}', f'{run["head_parameters"]:,}', sum(run['moved']) or '-']
            for run in record['runs']]
    return table(['head', 'top-1', 'head parameters', 'labels moved, in all'], rows)


def demo_seeds(record: dict[str, Any]) -> str:
    rows = [[f'{r["seed"]}', *(f'{r[head]:.2f}' for head in ('linear', 'static', 'dl2pa'))] for r in record['results']]
    columns = ('linear', 'static', 'dl2pa')
    mean = [f'{sum(r[head] for r in record["results"]) / len(rows):.2f}' for head in columns]
    return table(['seed', 'linear classifier', 'static', 'DL2PA'], [*rows, ['mean', *mean]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args()
    readme = ROOT / 'README.md'
    old = new = readme.read_text()
    for make in (head_step, train_step, prototypes, demo, demo_seeds):
        name = make.__name__
        record = json.loads((ROOT / 'benchmarks' / 'results' / f'{name}.json').read_text())
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if not pattern.search(new):
            print(f'README.md has no marks for {name}', file=sys.stderr)
            return 1
        content = make(record)
        new = pattern.sub(lambda found, content=content: found[1] + content + '\n' + found[2], new)
    if args.check and new != old:
        print('README.md does not show the figures of benchmarks/results: run python benchmarks/readme_tables.py',
              file=sys.stderr)
        return 1
    if not args.check:
        readme.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main())
