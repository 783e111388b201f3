"""Do a new model's queries find the embeddings that an old model left in a gallery? Recall@1 of old and new together.

    python benchmarks/compatible.py --arrays CIFAR100 --weights LITE0 --new-weights LITE1   # all that is not there yet

Backbones are EfficientNet-Lite0 and Lite1, pretrained on ImageNet and frozen; features of CIFAR-100. The old model's
neck is trained on 20 images of each of the classes 0-79, the new one's on 100. Recall@1, of test images: of the 80
classes that were trained, and of the 20 that were not. A query's own image is left out of the gallery. `new_old` has
the new model's queries and the old one's gallery; Shen et al. (CVPR 2020) call models compatible where that exceeds
`old_old`, so that the gallery need not be computed again.

inherited       wrap_dl2pa(new, head=old): the old model's prototypes and assignment, pinned
simplex         both models with the same fixed simplex, pinned, as d-Simplex has it (Biondi et al. 2023)
independent     each model trained alone, with the recipe `placed`
linear          each trained alone: linear neck with batch norm to the same d, nn.Linear
"""
import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_metrics as metrics
import timm
import torch
import torch.nn as nn
from finetune_data import CACHE, Features
from finetune_methods import embed
from new_classes import fit, load_features
from results_file import Runs, add_output_argument

from timm_dl2pa import wrap_dl2pa

NAME = 'compatible'
METHODS = ('inherited', 'simplex', 'independent', 'linear')
# Backbones and sides of images, in pixels.
PAIRS = {'lite0:64 lite0:96': (('lite0', 64), ('lite0', 96)), 'lite0:64 lite1:96': (('lite0', 64), ('lite1', 96))}
TRAINED, OLD_IMAGES, DIM = 80, 20, 128
_OLD_EPOCHS, _EPOCHS = 40, 15


@dataclass(frozen=True)
class Setting:
    """All that decides a run. `pair` are the old and the new backbone."""
    pair: str
    method: str
    seed: int


def make_models(method: str, old: str, new: str, seed: int) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Return the old model, and a function that makes the new one of the old one when that is trained."""
    def backbone(name: str) -> nn.Module:
        return timm.create_model(f'tf_efficientnet_{name}', num_classes=TRAINED)

    if method == 'linear':
        def wrapped(model: nn.Module) -> nn.Module:
            neck = nn.Linear(model.num_features, DIM, bias=False), nn.BatchNorm1d(DIM)
            model.classifier = nn.Sequential(*neck, nn.Linear(DIM, TRAINED))
            return model
        return wrapped(backbone(old)), lambda first: wrapped(backbone(new))
    if method == 'inherited':
        return wrap_dl2pa(backbone(old), DIM, seed=seed), lambda first: wrap_dl2pa(backbone(new), head=first)
    simplex = dict(recipe='even', pinned=True) if method == 'simplex' else {}
    return wrap_dl2pa(backbone(old), DIM, seed=seed, **simplex), lambda first: wrap_dl2pa(
        backbone(new), DIM, seed=seed, **simplex)


def run(setting: Setting, old: Features, new: Features) -> dict[str, Any]:
    """Train both models, and return recall@1 of each pair of query and gallery."""
    began = time.process_time()
    torch.manual_seed(setting.seed)
    (old_name, _), (new_name, _) = PAIRS[setting.pair]
    old_model, make_new = make_models(setting.method, old_name, new_name, setting.seed)
    y = old.y_train
    order = torch.randperm(len(y))
    few = torch.cat([order[y[order] == label][:OLD_IMAGES] for label in range(TRAINED)])
    fit(old_model.classifier, old.passes[0][few], y[few], epochs=_OLD_EPOCHS)
    new_model = make_new(old_model)
    fit(new_model.classifier, new.passes[0][y < TRAINED], y[y < TRAINED], epochs=_EPOCHS)
    found: dict[str, Any] = {}
    with torch.no_grad():
        old_z, new_z = embed(old_model.classifier, old.test), embed(new_model.classifier, new.test)
    trained = old.y_test < TRAINED
    for group, rows in (('trained', trained), ('left_out', ~trained)):
        labels = old.y_test[rows]
        found |= {f'{group}_old_old': metrics.recall_at_1(old_z[rows], labels),
                  f'{group}_new_old': metrics.recall_at_1(new_z[rows], labels, old_z[rows]),
                  f'{group}_new_new': metrics.recall_at_1(new_z[rows], labels)}
    return {**{name: round(value, 2) for name, value in found.items()},
            'cpu_seconds': round(time.process_time() - began, 1)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arrays', help="the folder with CIFAR-100's npz files")
    parser.add_argument('--weights', type=Path, help='of EfficientNet-Lite0')
    parser.add_argument('--new-weights', type=Path, help='of EfficientNet-Lite1')
    parser.add_argument('--pairs', nargs='+', choices=PAIRS, default=list(PAIRS))
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--cache', type=Path, default=CACHE, help='folder of features')
    add_output_argument(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    runs = Runs(NAME, Setting, args.output)
    weights = {'lite0': args.weights, 'lite1': args.new_weights}
    places = dict.fromkeys(itertools.chain.from_iterable(PAIRS[pair] for pair in args.pairs))
    features = {(name, size): load_features(args.arrays, weights[name], args.cache, f'tf_efficientnet_{name}', size)
                for name, size in places}
    for seed, pair, method in itertools.product(args.seeds, args.pairs, args.methods):
        setting = Setting(pair, method, seed)
        if setting in runs:
            continue
        found = run(setting, *(features[place] for place in PAIRS[pair]))
        runs.add(setting, found)
        print(f'{setting}: {found}', flush=True)


if __name__ == '__main__':
    main()
