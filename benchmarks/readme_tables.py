"""Write the tables of the documentation from `benchmarks/results`, each between `<!-- NAME -->` and `<!-- /NAME -->`.

    python benchmarks/readme_tables.py            # writes them
    python benchmarks/readme_tables.py --check    # fails if a page has other figures

`gpu` is all tables of a GPU's figures; where there are no results, a sentence says so.
"""
import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from timm_dl2pa.options import PREFIX, PluginOptions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
# What stands in the place of a table of a GPU until there are results.
NOT_YET = 'Nothing was measured on a GPU yet.'


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


_HEAD_STEPS = {
    'neck': 'the neck alone', 'linear': '`nn.Linear`, cross-entropy', 'partial_fc': 'Partial FC, 10 %',
    'authors': "the authors' step", 'logits': 'ours, cross-entropy', 'logits_placed': 'in the warm-up, `placed`',
    'logits_even': 'in the warm-up, `even`', 'sampled': 'ours, `SampledCrossEntropyLoss`',
    'sampled_placed': 'in the warm-up, `placed`', 'sampled_even': 'in the warm-up, `even`',
    'embeddings': 'ours, `SquaredCosineLoss`', 'embeddings_placed': 'in the warm-up, `placed`',
    'embeddings_even': 'in the warm-up, `even`', 'embeddings_paper': "with the paper's moving average",
}


def head_step(record: dict[str, Any]) -> str:
    """The head's step in milliseconds and, on a card, those that its kernels take and the peak of its memory."""
    def cell(row: dict[str, Any], name: str) -> str:
        if f'{name}_ms' not in row:
            failed = row.get(f'{name}_failed', '-')
            return 'refused' if 'too many' in failed else failed
        busy = row.get(f'{name}_busy_ms')
        return ''.join([f'{row[f"{name}_ms"]:,.2f} ms', f' ({busy:,.2f})' if busy is not None else '',
                        f', {row[f"{name}_mb"]:,} MB' if f'{name}_mb' in row else ''])

    rows = [[title, *cells] for name, title in _HEAD_STEPS.items()
            if set(cells := [cell(row, name) for row in record['results']]) != {'-'}]
    return table(['C, d', *(f'{row["num_classes"]:,}, {row["dim"]}' for row in record['results'])], rows)


def train_step(record: dict[str, Any]) -> str:
    rows = [[f'{r["model"]}, {r["num_classes"]:,}, {r["dim"]}', *(f'{r[f"{name}_ms"]:,.0f} ms' for name in
             ('linear', 'criterion', 'squared_cosine')), f'{r["criterion_over_linear"]:.3f}',
             f'{r["squared_cosine_over_linear"]:.3f}', f'{100 * r["squared_cosine_tracking_share"]:.3f} %']
            for r in record['results']]
    return table(['model, C, d', 'linear', 'ours, cross-entropy', 'ours, `squared_cosine`', 'ratio, cross-entropy',
                  'ratio, `squared_cosine`', 'tracking'], rows)


def prototypes(record: dict[str, Any]) -> str:
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for r in record['results']:
        name = r.get('method') or r['objective']
        best = found.setdefault((r['num_prototypes'], r['dim']), {})
        if name not in best or r['max_cosine'] < best[name]['max_cosine']:  # the larger effort, where there is one
            best[name] = r
    rows = []
    for (num, dim), by in found.items():
        separated, uniform, sgd = by['separated'], by.get('uniform'), by.get('sgd')
        energies = [f'{uniform["energy"]:.5f}', f'{sgd["energy"]:.5f}', f'{uniform["published_energy"]:.5f}',
                    f'{uniform["max_cosine"]:.4f}', f'{sgd["max_cosine"]:.4f}',
                    f'{uniform["published_max_cosine"]:.4f}'] if uniform else ['-'] * 6
        rows.append([f'{num:,}, {dim}', *energies, f'{separated["max_cosine"]:.4f} ({separated["made_by"]})',
                     f'{separated["bound"]:.4f}', f'{separated["seconds"]:.1f} s'])
    return table(['K, d', "energy: 'uniform'", 'their recipe', 'their file', "largest cosine: 'uniform'",
                  'their recipe', 'their file', "'separated'", 'bound', "'separated' took"], rows)


def prototypes_large(record: dict[str, Any]) -> str:
    rows = [[f'{r["num_prototypes"]:,}, {r["dim"]}', r.get('method') or f"auto, '{r['objective']}'", r['made_by'],
             f'{r["max_cosine"]:.4f}' + (' (sample)' if r['sampled_rows'] else ''),
             '-' if r['theorem'] is None else f'{r["theorem"]:.4f}', f'{r["bound"]:.4f}', f'{r["energy"]:.5f}',
             f'{r["seconds"]:.1f} s'] for r in record['results']]
    return table(['K, d', 'method', 'made by', 'largest cosine', 'by theorem', 'bound', 'energy', 'seconds'], rows)


def assignment(record: dict[str, Any]) -> str:
    results = sorted(record['results'], key=lambda row: (row['num_classes'], row['dim']))
    others = [key.removeprefix('faster than ') for key in dict.fromkeys(key for row in results for key in row)
              if key.startswith('faster than ')]

    def cells(row: dict[str, Any], name: str) -> list[str]:
        if f'{name} seconds' not in row:
            return ['-', '-']
        seconds = row[f'{name} seconds']
        return [f'{1000 * seconds:.1f} ms' if seconds < 0.1 else f'{seconds:.2f} s', f'{row[f"{name} peak_mb"]:,} MB']

    rows = [[f'{r["num_classes"]:,}, {r["dim"]}', r['case'], *(cell for name in ('ours', *others) for cell in
             cells(r, name)), *(f'{r[f"faster than {name}"]:.2g}x' if f'faster than {name}' in r else '-'
                                for name in others)] for r in results]
    return table(['C, d', 'start', *(cell for name in ('ours', *others) for cell in (name, 'memory')),
                  *(f'faster than {name}' for name in others)], rows)


def assignment_large(record: dict[str, Any]) -> str:
    return assignment(record)


_DEMO = {'linear': 'linear classifier', 'linear_neck': 'linear classifier after the neck',
         'static': 'static prototypes', 'paper': "the paper's rule", 'dl2pa': 'DL2PA, the default'}


def demo(record: dict[str, Any]) -> str:
    rows = [[_DEMO[run['head']], f'{run["top1"]:.2f}', f'{run["head_parameters"]:,}', sum(run['moved']) or '-']
            for run in record['runs']]
    return table(['head', 'top-1', 'head parameters', 'labels moved, in all'], rows)


def demo_seeds(record: dict[str, Any]) -> str:
    rows = [[f'{r["seed"]}', *(f'{r[head]:.2f}' for head in _DEMO)] for r in record['results']]
    means = [f'{mean(r[head] for r in record["results"]):.2f}' for head in _DEMO]
    return table(['seed', *_DEMO.values()], [*rows, ['mean', *means]])


# Methods as the tables name them: by the recipe's method, loss, neck and the scheduler's options.
_METHODS = {
    'softmax': '`softmax`: `nn.Linear` after a linear layer to d',
    'softmax balanced_softmax': '`softmax`, balanced softmax',
    'softmax linear_bn': 'the same, with batch norm between, as `dl2pa` has it',
    'softmax balanced_softmax linear_bn': 'the same, with batch norm between',
    'cosine_softmax': '`cosine_softmax`: both normalised, scale fixed',
    'cosine_softmax linear_bn learn_scale': '`cosine_softmax` with batch norm between and a learned scale',
    'static squared_cosine': '`static` (HPN), squared cosine',
    'static': '`static`, cross-entropy, scale fixed',
    'paper squared_cosine': "`paper`: the authors' rule, squared cosine",
    'dl2pa': '**`dl2pa`**, cross-entropy',
    'dl2pa balanced_softmax': '**`dl2pa`**, balanced softmax',
    'dl2pa even': 'the same head, recipe `even`: the even set, rotated as a whole',
    'dl2pa balanced_softmax even': '`dl2pa`, recipe `even`, balanced softmax',
    'dl2pa stop=0': 'the same head, `stop=0`: assignment left to chance',
    'dl2pa warmup=none': 'the same head, `warmup=none`: matched from the start',
    'dl2pa placed': '**`dl2pa`**, recipe `placed`, cross-entropy',
    'dl2pa paper': "the same head, recipe `paper`: its class means, no warm-up",
    'dl2pa squared_cosine placed': '**`dl2pa`**, recipe `placed`, squared cosine',
    'dl2pa squared_cosine even': '`dl2pa`, recipe `even`, squared cosine',
    'dl2pa squared_cosine paper': "`dl2pa`, recipe `paper`, squared cosine",
}


def _runs(folder: str = 'accuracy') -> list[dict[str, Any]]:
    files = sorted((RESULTS / folder).glob('*.json'))
    return [record for record in map(json.loads, (file.read_text() for file in files))
            if not record['recipe']['validation']]


def _method(recipe: dict[str, Any]) -> str:
    if recipe['method'] == 'softmax' and recipe['dim'] == 0:
        return '`nn.Linear` on all 64 features'
    words = [recipe['method'], '' if recipe['loss'] == 'cross_entropy' else recipe['loss'], recipe['neck'] or '',
             'learn_scale' if recipe.get('learn_scale') else '', recipe.get('dl2pa_recipe') or '',
             *(f'{name}={value}' for name, value in recipe['dl2pa'].items())]
    key = ' '.join(filter(None, words))
    return _METHODS.get(key, key)


def _spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f'{mean:.2f}'
    return f'{mean:.2f} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.2f}'


def _grouped(chosen: Callable[[dict[str, Any]], bool], metrics: dict[str, Callable[[dict[str, Any]], Any]],
             model: str = 'cifar_resnet14', runs: list[dict[str, Any]] | None = None) -> list[list[Any]]:
    """Return a row for each d and method of that model's runs: mean and standard deviation over the seeds, and how
    many there are."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in _runs() if runs is None else runs:
        if record['recipe']['model'] == model and chosen(record['recipe']):
            groups.setdefault((record['recipe']['dim'], _method(record['recipe'])), []).append(record)
    order = list(_METHODS.values())
    rows = []
    for (dim, method), records in sorted(
            groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]) if item[0][1] in order else 99)):
        cells = [[metric(record) for record in records] for metric in metrics.values()]
        rows.append([method, dim or '-', *('-' if None in values else _spread(values) for values in cells),
                     len(records)])
    return rows


_METRICS = {
    'top-1': lambda r: r['results']['top1'],
    'top-5': lambda r: r['results']['top5'],
    'calibration error': lambda r: r['results']['calibration_error'],
    'smallest angle': lambda r: r['results']['angular_separation']['smallest'],
    'near classes': lambda r: r['results'].get('superclass_agreement'),
    'recall@1': lambda r: r['results']['recall_at_1'],
}


def accuracy() -> str:
    return table(['method', 'd', *_METRICS, 'seeds'],
                 _grouped(lambda r: r['classes'] == 'all' and not r['imbalance'], _METRICS))


def accuracy_longer() -> str:
    return table(['method', 'd', *_METRICS, 'seeds'],
                 _grouped(lambda r: r['epochs'] == 25, _METRICS, model='cifar_resnet20'))


def accuracy_tail() -> str:
    shares = {name: lambda r, name=name: r['results'].get(f'top1_{name}') for name in ('head', 'medium', 'tail')}
    metrics = {'top-1': _METRICS['top-1'], **shares, 'calibration error': _METRICS['calibration error']}
    return table(['method', 'd', *metrics, 'seeds'], _grouped(lambda r: bool(r['imbalance']), metrics))


# --- what was measured on a GPU


def _record(name: str) -> dict[str, Any] | None:
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def _on(table_: str, record: dict[str, Any]) -> str:
    """Return a table with the machine that its figures are of."""
    found = record['environment']
    return f'{table_}\n\n({found["gpu"]}, driver {found["driver"]}, PyTorch {found["torch"]}.)'


def head_step_gpu() -> str:
    """The head's step in milliseconds, and the peak of the card's memory."""
    record = _record('head_step_cuda')
    if record is None:
        return NOT_YET
    return 'Milliseconds, in brackets those that the kernels take, and the peak of the card\'s memory.\n\n' + _on(
        head_step(record), record)


def tests_gpu() -> str:
    """What became of the tests that need a card."""
    record = _record('gpu_tests_cuda')
    if record is None:
        return NOT_YET
    found = record['results']
    unfinished = [name.rpartition('::')[2] for name in found.get('running', {})]
    words = [f'{found["passed"]} passed, {found["failed"]} failed',
             *([f'{len(unfinished)} not finished in time: {", ".join(f"`{name}`" for name in unfinished)}']
               if unfinished else [])]
    return _on('; '.join(words) + '.', record)


def assignment_gpu() -> str:
    """The assignment with the passes over the pairs on the card, beside the same on its machine's CPU."""
    record = _record('assignment_cuda')
    if record is None:
        return NOT_YET
    rows = [[f'{r["num_classes"]:,}, {r["dim"]}', r['case'], f'{r["ours seconds"]:.2f} s',
             f'{r["ours on cuda seconds"]:.2f} s', f'{r["ours seconds"] / r["ours on cuda seconds"]:.2g}x']
            for r in record['results']]
    return _on(table(['C, d', 'start', 'CPU', 'GPU', 'faster'], rows), record)


def prototypes_gpu() -> str:
    """Prototypes by descent on the card."""
    record = _record('prototypes_cuda')
    return NOT_YET if record is None else _on(prototypes_large(record), record)


def train_step_gpu() -> str:
    """timm's training step in images a second."""
    records = [record for record in map(_record, ('train_step_cuda', 'train_step_compiled_cuda')) if record]
    if not records:
        return NOT_YET
    rows = []
    for record in records:
        for row in record['results']:
            cells = [f'{row[f"{name}_images_a_second"]:,.0f}' if f'{name}_ms' in row else 'failed'
                     for name in ('linear', 'criterion', 'squared_cosine')]
            ratios = [f'{row[f"{name}_over_linear"]:.3f}' if f'{name}_over_linear' in row else '-'
                      for name in ('criterion', 'squared_cosine')]
            rows.append([f'{row["model"]}, {row["num_classes"]:,}, {row["dim"]}' + (
                ', compiled' if row['compiled'] else ''), *cells, *ratios])
    return _on(table(['model, C, d', 'linear, images a second', 'ours, cross-entropy', 'ours, `squared_cosine`',
                      'time over linear, cross-entropy', 'time over linear, `squared_cosine`'], rows), records[0])


def _accuracy_gpu(folder: str) -> str:
    runs = [record for record in _runs(folder) if record['environment']['gpu']]
    rows = []
    for schedule, title in (('distiller', "RepDistiller's"), ('paper', "the paper's")):
        for epochs in sorted({record['recipe']['epochs'] for record in runs}, reverse=True):
            some = _grouped(lambda r, schedule=schedule, epochs=epochs: (r['schedule'], r['epochs']) == (
                schedule, epochs) and not r['imbalance'], _METRICS, 'cifar_resnet32', runs)
            rows += [[f'{title}, {epochs} epochs', *row] for row in some]
    return _on(table(['schedule', 'method', 'd', *_METRICS, 'seeds'], rows), runs[0]) if rows else NOT_YET


def accuracy_gpu() -> str:
    """CIFAR-100, ResNet-32."""
    return _accuracy_gpu('accuracy')


def tiny_imagenet_gpu() -> str:
    """Tiny-ImageNet, ResNet-32."""
    return _accuracy_gpu('tiny_imagenet')


_GPU_TABLES = {
    'The tests that need one': tests_gpu,
    "What a head costs a step": head_step_gpu,
    'The assignment': assignment_gpu,
    'Prototypes by descent': prototypes_gpu,
    "timm's training step": train_step_gpu,
    'CIFAR-100, ResNet-32': accuracy_gpu,
    'Tiny-ImageNet, ResNet-32': tiny_imagenet_gpu,
}


def gpu() -> str:
    """Return the tables of a GPU's figures that there are."""
    parts = [f'**{title}**\n\n{content}' for title, make in _GPU_TABLES.items() if (content := make()) != NOT_YET]
    return '\n\n'.join(parts) or NOT_YET


# Those that are made from the folder `results/accuracy`.
_FOLDER_TABLES = (accuracy, accuracy_longer, accuracy_tail)


def options() -> str:
    """Return the plugin's options, from the package's own table."""
    rows = []
    for spec in fields(PluginOptions):
        default = '' if spec.default is None else f' (default: {spec.default})'
        rows.append([f'`{PREFIX}{spec.name}`', spec.metadata['help'] + default])
    # Text, which is not set to the right.
    return table(['option', ''], rows).replace('---:', '---', 1)


# --- fine-tuning

_FINETUNED = {
    'nearest_mean': 'nearest class mean', 'logistic': 'logistic regression, its best C',
    'logistic_lda': 'logistic regression after LDA', 'linear': '`nn.Linear`',
    'linear_bn': 'linear, batch norm, linear', 'cosine': 'cosine softmax, the same neck',
    'placed': "ours, 'placed', not primed", 'placed_primed': "ours, 'placed', primed",
    'even_primed': "ours, 'even', primed",
}


def _mean_and_spread(values: list[float]) -> str:
    return f'{mean(values):.1f} ± {stdev(values):.1f}' if len(values) > 1 else f'{values[0]:.1f}' if values else '-'


def _finetuned(columns: dict[str, Callable[[dict[str, Any]], Any]], is_row: Callable[[dict[str, Any]], bool]) -> str:
    """Return top-1 by method and d; each column picks its value of the rows that it is about, or None."""
    results = [row for row in _record('finetune')['results'] if is_row(row)]
    lines = []
    order = list(_FINETUNED)
    for method, dim in sorted({(row['method'], row['dim'] or 0) for row in results},
                              key=lambda pair: (order.index(pair[0]), pair[1])):
        mine = [row for row in results if (row['method'], row['dim'] or 0) == (method, dim)]
        cells = [_mean_and_spread([value for row in mine if (value := pick(row)) is not None])
                 for pick in columns.values()]
        lines.append([_FINETUNED[method], dim or '-', *cells, len({row['seed'] for row in mine})])
    return table(['classifier', 'd', *columns, 'seeds'], lines)


def _after(epochs: int, rate: str) -> Callable[[dict[str, Any]], float | None]:
    def pick(row: dict[str, Any]) -> float | None:
        return row['top1'] if (row['epochs'], f'{row["optimizer"]}:{row["lr"]}') == (epochs, rate) else None
    return pick


def _before(row: dict[str, Any]) -> float | None:
    return row['before']['top1'] if row['epochs'] == 1 else row['top1'] if not row['epochs'] else None


def _frozen(data: str, model: str = 'tf_efficientnet_lite0') -> str:
    rates = {'AdamW 1e-3': 'adamw:0.001', 'SGD 0.01': 'sgd:0.01'}
    columns = {'before training': _before, **{f'{epochs} epoch{"s" * (epochs > 1)}, {name}': _after(epochs, rate)
                                              for epochs in (1, 20) for name, rate in rates.items()}}
    return _finetuned(columns, lambda row: (row['backbone'], row['data'], row['model'], row['augmented']) == (
        'frozen', data, model, False))


def finetune_frozen() -> str:
    """Top-1 on frozen features, 20 images a class."""
    return _frozen('cifar100:20')


def finetune_frozen_100() -> str:
    """Top-1 on frozen features, 100 images a class."""
    return _frozen('cifar100:100')


def finetune_grocery() -> str:
    """Top-1 on frozen features of photographs."""
    return _frozen('grocery')


def finetune_second() -> str:
    """Top-1 on frozen features of a second backbone."""
    return '\n\n'.join(f'{title}:\n\n{_frozen(data, "tf_efficientnet_lite1")}' for title, data in (
        ('CIFAR-100, 20 images a class', 'cifar100:20'), ('GroceryStore', 'grocery')))


_RATES = {'AdamW 1e-4': ('adamw', 1e-4), '1e-3': ('adamw', 1e-3), '3e-3': ('adamw', 3e-3), 'SGD 0.01': ('sgd', 1e-2),
          '0.1': ('sgd', 1e-1)}


def finetune_rates() -> str:
    """Of primed heads and `nn.Linear`, top-1 before training and after it, at each learning rate."""
    results = [row for row in _record('finetune')['results'] if row['backbone'] == 'frozen' and not row['augmented']
               and row['model'] == 'tf_efficientnet_lite0']
    lines = []
    for data, title in (('cifar100:20', 'CIFAR-100 x 20'), ('cifar100:100', 'x 100'), ('grocery', 'GroceryStore')):
        for method, dim in (('placed_primed', 32), ('placed_primed', 128), ('linear', None)):
            for epochs in (1, 5, 20):
                mine = [row for row in results if (row['data'], row['method'], row['dim'], row['epochs']) == (
                    data, method, dim, epochs)]
                cells = [_mean_and_spread([row['top1'] for row in mine if (row['optimizer'], row['lr']) == rate])
                         for rate in _RATES.values()]
                before = mean(row['before']['top1'] for row in mine) if mine else math.nan
                lines.append([title, _FINETUNED[method], dim or '-', epochs, f'{before:.1f}', *cells])
    return table(['data', 'classifier', 'd', 'epochs', 'before', *_RATES], lines)


def finetune_trained() -> str:
    """Top-1 of full fine-tuning, with and without the batch norms' statistics."""
    def column(epochs: int, rate: str, backbone: str = 'trained_but_batch_norm') -> Callable[
            [dict[str, Any]], float | None]:
        return lambda row: _after(epochs, rate)(row) if row['backbone'] == backbone else None
    return _finetuned({'before': lambda row: row['before']['top1'],
                       '1 epoch, 1e-4': column(1, 'adamw:0.0001'), '3e-4': column(1, 'adamw:0.0003'),
                       '1e-3': column(1, 'adamw:0.001'), '5 epochs, 3e-4': column(5, 'adamw:0.0003'),
                       '5 epochs, 1e-3': column(5, 'adamw:0.001'), '20 epochs, 3e-4': column(20, 'adamw:0.0003'),
                       'statistics trained, 1 epoch, 1e-4': column(1, 'adamw:0.0001', 'trained')},
                      lambda row: row['backbone'] != 'frozen' and row['data'] == 'cifar100:20')


_FINETUNE_TABLES = (finetune_frozen, finetune_frozen_100, finetune_grocery, finetune_second, finetune_rates,
                    finetune_trained)

# --- many kinds of data, many classes

def suite(record: dict[str, Any]) -> str:
    """Top-1 on eight data sets, and how far the default is from the better of the learned classifiers on the same d."""
    methods = {'linear': 'linear, all features', 'linear_bn': 'linear with the neck', 'cosine': 'cosine softmax',
               'placed': '`placed`', 'even': '`even`', 'static': 'static', 'matched': 'matched', 'paper': '`paper`'}
    results, lines, ahead = record['results'], [], []
    keys = sorted({(row['data'], row['training'], row['dim']) for row in results if row['dim']},
                  key=lambda key: (list(dict.fromkeys(row['data'] for row in results)).index(key[0]), key[2], key[1]))
    for data, training, dim in keys:
        found = {method: [row['top1'] for row in results if (row['data'], row['training'], row['method']) ==
                          (data, training, method) and row['dim'] in (dim, None)] for method in methods}
        if found['placed'] and found['linear_bn'] and found['cosine']:
            ahead.append(mean(found['placed']) - max(mean(found['linear_bn']), mean(found['cosine'])))
        lines.append([data, dim, {'sgd': 'SGD', 'adamw': 'AdamW'}[training],
                      *(f'{mean(values):.1f}' if values else '-' for values in found.values()), len(found['placed'])])
    return (table(['data', 'd', 'training', *methods.values(), 'seeds of `placed`'], lines)
            + f'\n\n`placed` less the better of the two learned classifiers on the same d: {mean(ahead):+.1f} points '
              f'in the mean over {len(ahead)} rows, at worst {min(ahead):+.1f}, at best {max(ahead):+.1f}; it is more '
              f'than half a point behind in {sum(value < -0.5 for value in ahead)}.')


def suite_parts() -> str:
    """Top-1 of each method with the neck's batch norm and the learned scale, and without both; seed 0."""
    methods = {'linear_bn': 'linear', 'cosine': 'cosine softmax', 'static': 'static', 'matched': 'matched',
               'placed': '`placed`'}
    found = {(row['data'], row['dim'], row['method']): row['top1'] for row in _record('suite')['results']
             if row['training'] == 'sgd' and row['seed'] == 0}
    keys = dict.fromkeys((data, dim) for data, dim, method in found if method.endswith('_plain'))

    def cell(key: tuple) -> str:
        return f'{found[key]:.1f}' if key in found else '-'

    lines = [[*key, *(f'{cell((*key, method))} / {cell((*key, f"{method}_plain"))}' for method in methods)]
             for key in keys]
    return table(['data', 'd', *methods.values()], lines)


def suite_tail() -> str:
    """The long tail by cross-entropy and by balanced softmax."""
    names = {'linear': 'linear, all features', 'linear_bn': 'linear with the neck', 'cosine': 'cosine softmax',
             'placed': '`placed`'}
    metrics = {'top-1': 'top1', 'top-1, rare classes': 'top1_of_rare', 'calibration error': 'calibration_error',
               'recall@1': 'recall_at_1'}
    lines = []
    for end, loss in (('', 'cross-entropy'), ('_balanced', 'balanced softmax')):
        for method, name in names.items():
            own = [row for row in _record('suite')['results'] if (row['data'], row['method'], row['training']) ==
                   ('long_tail', method + end, 'sgd') and row['dim'] in (50, None)]
            if own:
                lines.append([name, loss, own[0]['dim'] or '-',
                              *(_mean_and_spread([row[key] for row in own]) for key in metrics.values()), len(own)])
    return table(['classifier', 'loss', 'd', *metrics, 'seeds'], lines)


def many_classes(record: dict[str, Any]) -> str:
    """Accuracy, time and memory on glyphs."""
    names = {'linear': 'linear, all features', 'linear_d': 'linear, linear', 'linear_bn': 'linear with the neck',
             'cosine': 'cosine softmax', 'sampled': 'cosine softmax, sampled', 'static': 'static',
             'placed_sampled': '`placed`, `SampledCrossEntropyLoss`'}
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in record['results']:
        found.setdefault((row['classes'], row['epochs'], row['dim'], row['method']), []).append(row)

    def of(rows: list[dict[str, Any]], name: str) -> str:
        values = [row[name] for row in rows if name in row]
        return _mean_and_spread(values) if values else '-'

    lines = [[f'{classes:,}', epochs, dim or '-', names.get(method, f'`{method}`'),
              *(of(rows, name) for name in ('top1', 'top5', 'top1_by_class_means', 'top1_primed', 'recall_at_1')),
              f'{mean(row["head_ms_a_step"] for row in rows):.1f}',
              f'{mean(row["peak_memory_mb"] - row["memory_before_mb"] for row in rows):.0f}', len(rows)]
             for (classes, epochs, dim, method), rows in found.items()]
    return table(['classes', 'epochs', 'd', 'classifier', 'top-1', 'top-5', 'by class means', '`prime` at the end',
                  'recall@1, new classes', 'head, CPU ms a step', 'MiB beside data and backbone', 'seeds'], lines)


def million(record: dict[str, Any]) -> str:
    """The jobs of a head at a million classes."""
    lines = [[row['job'], row['dim'], '-' if row['seconds'] is None else f'{row["seconds"]:.3g}', row['peak_mb'] or '-',
              row['said'].partition(',')[0]] for row in record['results']]
    return table(['job', 'd', 'seconds', 'peak MiB', ''], lines)


def wire(record: dict[str, Any]) -> str:
    """What each of several processes sends in a step."""
    found: dict[tuple[int, int, int, int], dict[str, float]] = {}
    for row in record['results']:
        key = row['classes'], row['dim'], row['processes'], row['batch_size']
        found.setdefault(key, {})[row['phase']] = row['bytes_a_step']
    phases = ('linear', 'warm-up', 'after it')
    lines = [[f'{classes:,}', dim, processes, batch, *(f'{row[phase] / 1e6:.2f}' for phase in phases)]
             for (classes, dim, processes, batch), row in found.items()]
    return table(['classes', 'd', 'processes', 'batch of each', 'linear classifier, MB', '`placed`, warm-up, MB',
                  '`placed`, after it, MB'], lines)


# --- unknown classes, and classes left out

_FROZEN = {'features': 'the features themselves', 'pca': 'their principal components', 'linear': '`nn.Linear`',
           'cosine': 'cosine softmax', 'arcface': 'ArcFace', 'proxy_anchor': 'ProxyAnchor', 'static': 'static',
           'even': '`even`', 'placed': '`placed`'}
_SCORES = {'probability': 'maximum probability', 'logit': 'largest logit', 'energy': 'energy',
           'cosine': 'largest cosine', 'gap': 'gap to the second'}


def unknown_classes(record: dict[str, Any]) -> str:
    """AUROC and FPR95 of each score, near and far."""
    rows, lines = record['results'], []
    order = list(_FROZEN)
    for method, dim in sorted({(row['method'], row['dim'] or 0) for row in rows},
                              key=lambda pair: (order.index(pair[0]), pair[1])):
        mine = [row for row in rows if (row['method'], row['dim'] or 0) == (method, dim)]
        for score in mine[0]['scores']:
            cells = [_mean_and_spread([row['scores'][score][column] for row in mine])
                     for column in ('auroc_near', 'fpr95_near', 'auroc_far', 'fpr95_far')]
            lines.append([f'{_FROZEN[method]}, {_SCORES[score]}', dim or '-', *cells,
                          _mean_and_spread([row['top1'] for row in mine]), len(mine)])
    return table(['classifier and score', 'd', 'AUROC, near', 'FPR95, near', 'AUROC, far', 'FPR95, far',
                  'top-1, known', 'seeds'], lines)


def retrieval(record: dict[str, Any]) -> str:
    """Recall@1 and mAP@R of classes left out, at the learning rate that is best for the classes that were trained."""
    rows, lines = record['results'], []
    order = list(_FROZEN)
    for data, dim, method in sorted({(row['data'], row['dim'] or 0, row['method']) for row in rows},
                                    key=lambda key: (key[0], key[1], order.index(key[2]))):
        mine = [row for row in rows if (row['data'], row['dim'] or 0, row['method']) == (data, dim, method)]

        def trained(rate: float | None, mine: list[dict[str, Any]] = mine) -> float:
            return mean(row['recall_at_1_trained'] for row in mine if row['rate'] == rate)

        rate = max({row['rate'] for row in mine}, key=trained)
        best = [row for row in mine if row['rate'] == rate]
        lines.append([f'{data}, {_FROZEN[method]}', dim or '-', *(
            _mean_and_spread([row[column] for row in best])
            for column in ('recall_at_1_new', 'map_at_r_new', 'recall_at_1_trained')), rate or '-', len(best)])
    return table(['data and method', 'd', 'recall@1, new classes', 'mAP@R, new classes', 'recall@1, trained classes',
                  'learning rate', 'seeds'], lines)


def new_classes(record: dict[str, Any]) -> str:
    """Top-1 over all classes so far, after sessions of five classes, and of base and new classes after the last."""
    names = {'nearest_mean': 'nearest class mean, all features', 'nearest_cosine': 'the same, by the centred cosine',
             'neck_mean': 'nearest class mean, embeddings', 'simplex': 'fixed simplex, random labels, tuned'}
    lines, sessions = [], (0, 2, 4, 6, 8)
    for dim, method in sorted({(row['dim'] or 0, row['method']): None for row in record['results']},
                              key=lambda key: key[0]):
        own = [row for row in record['results'] if (row['dim'] or 0, row['method']) == (dim, method)]
        recipe, place, *tuned = f'{method}__'.split('_')[:3]
        name = names.get(method) or f'`{recipe}`, `{place}`' + (', tuned' if tuned[0] else '')
        lines.append([name, dim or '-', *(f'{mean(row["top1"][session] for row in own):.1f}' for session in sessions),
                      *(f'{mean(row[part] for row in own):.1f}' if part in own[0] else '-'
                        for part in ('top1_of_base', 'top1_of_new'))])
    return table(['classifier', 'd', *(f'{60 + 5 * session} classes' for session in sessions), 'base', 'new'], lines)


def compatible(record: dict[str, Any]) -> str:
    """Recall@1 of queries of the old or new model in a gallery of either."""
    parts = [f'{group}_{pair}' for group in ('trained', 'left_out') for pair in ('old_old', 'new_old', 'new_new')]
    names = {'inherited': "`head=old`", 'simplex': 'the same fixed simplex', 'independent': 'trained alone, `placed`',
             'linear': 'trained alone, linear'}
    lines = []
    for pair, method in {(row['pair'], row['method']): None for row in record['results']}:
        own = [row for row in record['results'] if (row['pair'], row['method']) == (pair, method)]
        lines.append([pair.replace(':', ' at ').replace(' lite', ' px, Lite').replace('lite', 'Lite') + ' px',
                      names[method], *(f'{mean(row[part] for row in own):.1f}' for part in parts)])
    return table(['old, new', 'head', *(f'{group}, {pair}' for group in ('trained', 'left out')
                                        for pair in ('old/old', 'new/old', 'new/new'))], lines)


# Those that are made from something else than a file of their own name.
_OTHER_TABLES = (*_FOLDER_TABLES, *_FINETUNE_TABLES, suite_parts, suite_tail, options, gpu)

# The pages of docs/, and their tables.
_PAGES: dict[str, tuple[Callable[..., str], ...]] = {
    'benchmarks.md': (*_FOLDER_TABLES, demo, demo_seeds, head_step, train_step, prototypes, prototypes_large,
                      assignment, assignment_large, gpu, suite, suite_parts, suite_tail, many_classes),
    'many-classes.md': (wire, million),
    'embeddings.md': (retrieval, unknown_classes),
    'fine-tune.md': _FINETUNE_TABLES,
    'options.md': (options,),
    'new-classes.md': (new_classes,),
    'compatible-embeddings.md': (compatible,),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args()
    return max(_write(ROOT / 'docs' / page, makers, args.check) for page, makers in _PAGES.items())


def _write(page: Path, makers: tuple[Callable[..., str], ...], check: bool) -> int:
    """Write the tables of a page, or check them; return 1 if there are no marks for one, or the check fails."""
    old = new = page.read_text()
    for make in makers:
        name = make.__name__
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if not pattern.search(new):
            print(f'{page.name} has no marks for {name}', file=sys.stderr)
            return 1
        content = make() if make in _OTHER_TABLES else make(_record(name))
        new = pattern.sub(lambda found, content=content: found[1] + content + '\n' + found[2], new)
    if check and new != old:
        print(f'{page.name} does not show the figures of benchmarks/results: run python benchmarks/readme_tables.py',
              file=sys.stderr)
        return 1
    if not check:
        page.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main())
