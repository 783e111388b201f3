"""Lists of accuracy runs, each run by its arguments, the most telling first."""
from typing import Any

from accuracy_recipe import SIZES
from dl2pa_recipes import RECIPES

__all__ = ['QUEUES', 'peers', 'queue']

QUEUES = ('short', 'paper', 'distiller_100', 'distiller', 'paper_peers')


def queue(name: str) -> list[list[str]]:
    """Return the arguments of each run of a list, the most telling first."""
    runs = []
    if name == 'short':
        # The paper's loss at the learning rate that it is made for: its sum over the batch.
        paper = ['--loss', 'squared_cosine', '--lr', '0.01', '--loss-weight', '128']
        methods = (['softmax'], ['dl2pa'], ['paper', *paper], ['static', *paper])

        def add(method: list[str], *arguments: Any) -> None:
            runs.append(['--size', 'short', '--method', *method, *map(str, arguments)])

        for seed in (3, 4, 5):
            for dim in (50, 10):
                for method in methods:
                    add(method, '--dim', dim, '--seed', seed)
            if seed == 3:
                # This library's head, its set kept even, its assignment left to chance, and by the paper's rule.
                for dim in (50, 10):
                    add(['dl2pa', '--dl2pa-recipe', 'even'], '--dim', dim, '--seed', seed)
                    add(['dl2pa', '--dl2pa', 'stop=0'], '--dim', dim, '--seed', seed)
                    add(['dl2pa', '--dl2pa', 'warmup=none'], '--dim', dim, '--seed', seed)
                for method in methods:
                    add(method, '--dim', 100, '--seed', seed)
                add(['dl2pa', '--dl2pa-recipe', 'even'], '--dim', 100, '--seed', seed)
                add(['softmax'], '--dim', 0, '--seed', seed)
            else:
                for method in methods[:2]:
                    add(method, '--dim', 100, '--seed', seed)
            # A backbone of half the classes, whose embeddings are tried on the others; then fine-tuned on those.
            add(['softmax'], '--dim', 0, '--classes', 'first_half', '--seed', seed)
            for method, dim in ((['softmax'], 50), (['softmax'], 0), (['dl2pa'], 50)):
                add(method, '--dim', dim, '--classes', 'second_half', '--start-from', 'first_half', '--epochs', 2,
                    '--seed', seed)
            balanced = ['--loss', 'balanced_softmax']
            for method in (['softmax'], ['dl2pa'], ['dl2pa', *balanced], ['softmax', *balanced], ['static']):
                add(method, '--dim', 64, '--imbalance', 0.01, '--epochs', 30, '--seed', seed)
        neck = ['softmax', '--neck', 'linear_bn']
        for dim in (50, 10):  # the head's parts alone
            for method in (['static'], ['cosine_softmax'], neck):
                add(method, '--dim', dim, '--seed', 3)
        add(neck, '--dim', 50, '--classes', 'second_half', '--start-from', 'first_half', '--epochs', 2, '--seed', 5)
        add([*neck, *balanced], '--dim', 64, '--imbalance', 0.01, '--epochs', 30, '--seed', 3)
        for method in (['softmax'], ['dl2pa']):
            add(method, '--dim', 50, '--classes', 'first_half', '--seed', 3)
        for method in methods:  # a longer training of a larger network, for want of a GPU
            add(method, '--dim', 50, '--model', 'cifar_resnet20', '--epochs', 25, '--seed', 3)
    elif name == 'paper':
        for size, losses in (('modern', []), ('paper', [])):
            for dim in (50, 10, 25, 100):
                for method in ('softmax', 'static', 'paper', 'dl2pa'):
                    extra = ['--loss', 'cross_entropy', '--lr', '0.1'] if method == 'softmax' else losses
                    runs.append(['--size', size, '--method', method, '--dim', str(dim), *extra])
        for imbalance in ('0.01', '0.02', '0.005'):
            for method in ('softmax', 'static', 'paper', 'dl2pa'):
                extra = ['--loss', 'cross_entropy'] if method == 'softmax' else []
                runs.append(['--size', 'paper_lt', '--method', method, '--dim', '128', '--imbalance', imbalance,
                             *extra])
    elif name in ('distiller_100', 'distiller', 'paper_peers'):
        size = 'paper' if name == 'paper_peers' else name
        for dim in (50, 10, 100):
            runs += peers(size, dim)
    else:
        raise ValueError(f'queue must be one of {", ".join(QUEUES)}, not {name!r}.')
    return runs


def peers(size: str, dim: int) -> list[list[str]]:
    """Return the arguments of each method's run at d = `dim` under one set of defaults, learned classifiers first.

    The authors' loss is its sum over the batch at the learning rate 0.01, which it is made for; cross-entropy has the
    recipe's rate, or 0.1 under the paper's.
    """
    fixed: list[str] = []
    learned = ['--loss', 'cross_entropy', '--lr', '0.1'] if size == 'paper' else []
    if size != 'paper':
        fixed = ['--loss', 'squared_cosine', '--lr', '0.01', '--loss-weight', str(SIZES[size]['batch_size'])]
    methods = [['softmax', *learned], ['softmax', '--neck', 'linear_bn', *learned],
               ['cosine_softmax', '--neck', 'linear_bn', '--learn-scale', *learned],
               ['static', *fixed], ['paper', *fixed],
               *(['dl2pa', '--dl2pa-recipe', recipe] for recipe in RECIPES)]
    return [['--size', size, '--method', *method, '--dim', str(dim)] for method in methods]
