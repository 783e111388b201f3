"""Top-1 over d of the ResNet-14's runs in `results/accuracy`: `results/accuracy.png`.

    python benchmarks/accuracy_plot.py
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / 'results'
METHODS = {'softmax': ('linear classifier', 'tab:gray'), 'dl2pa': ('dl2pa', 'tab:blue'),
           'paper': ("the authors' rule", 'tab:orange'), 'static': ('static assignment (HPN)', 'tab:red')}


def main() -> None:
    points: dict[str, dict[int, list[float]]] = {}
    for file in sorted((RESULTS / 'accuracy').glob('*.json')):
        record = json.loads(file.read_text())
        recipe = record['recipe']
        loss = 'squared_cosine' if recipe['method'] in ('paper', 'static') else 'cross_entropy'
        balanced = recipe['classes'] == 'all' and not recipe['imbalance'] and not recipe['validation']
        plain = balanced and recipe['model'] == 'cifar_resnet14'
        if plain and recipe['loss'] == loss and recipe['dim'] and recipe['neck'] is None and not recipe['dl2pa']:
            points.setdefault(recipe['method'], {}).setdefault(recipe['dim'], []).append(record['results']['top1'])
    figure, axes = plt.subplots(figsize=(6, 3.6), layout='constrained')
    for method, (label, colour) in METHODS.items():
        dims = sorted(points.get(method, {}))
        means = [sum(points[method][dim]) / len(points[method][dim]) for dim in dims]
        axes.plot(dims, means, 'o-', color=colour, label=label)
        for dim in dims:
            axes.plot([dim] * len(points[method][dim]), points[method][dim], '.', color=colour, alpha=0.5)
    axes.set(xscale='log', xlabel='d, dimension of the embedding', ylabel='top-1 in percent', ylim=(0, None))
    axes.set_xticks([10, 50, 100], ['10', '50', '100'])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / 'accuracy.png', dpi=150)


if __name__ == '__main__':
    main()
