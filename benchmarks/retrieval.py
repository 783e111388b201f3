"""Retrieval of classes that were not trained: this package beside the losses of pytorch-metric-learning.

    pip install pytorch-metric-learning
    python benchmarks/retrieval.py --features FOLDER            # made by feature_data.py: cifar100 and grocery

A linear layer to d with batch norm, the head's neck, is trained on frozen features of half of the classes of a set,
drawn by the seed, with the same number of batches for every method. All images of the other half are then searched
among one another: recall@1 and mAP@R (see timm_dl2pa.evaluation). Each method is trained at each learning rate; of
these, the table takes the one with the best recall@1 on the test images of the classes that were trained.

features    the frozen features themselves, without a training
pca         their d largest principal components
cosine      cosines with learned class vectors, a learned scale, cross-entropy
arcface     ArcFaceLoss of pytorch-metric-learning, as it comes (margin 28.6 degrees, scale 64)
proxy_anchor    ProxyAnchorLoss, as it comes (margin 0.1, alpha 32); its proxies at 100 times the learning rate, as its
            authors have it
even, placed    the recipes, cross-entropy

Each run adds its row at once, and is not run again.
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from feature_data import FeatureSet, load_features
from feature_training import train_on_features
from results_file import Runs, add_output_argument
from suite import Setting as SuiteSetting
from suite import make_classifier
from tqdm import tqdm

from timm_dl2pa import DL2PAHead
from timm_dl2pa.evaluation import retrieval_metrics

NAME = 'retrieval'
UNTRAINED = ('features', 'pca')
METHODS = (*UNTRAINED, 'cosine', 'arcface', 'proxy_anchor', 'even', 'placed')
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_STEPS, _BATCH = 400, 128
# Of the proxies, over that of the neck.
_OWN_RATES = {'arcface': 1.0, 'proxy_anchor': 100.0}


@dataclass(frozen=True)
class Setting:
    """All that decides a run. `dim` is None for the features themselves, `rate` for what is not trained."""
    data: str
    method: str
    dim: int | None
    rate: float | None
    seed: int


def embedder(setting: Setting, trained: FeatureSet) -> Callable[[torch.Tensor], torch.Tensor]:
    """Train, and return what makes embeddings of features."""
    features, method = trained.x.shape[1], setting.method
    if method == 'features':
        return lambda x: x
    if method == 'pca':
        mean = trained.x.mean(dim=0)
        axes = torch.linalg.svd(trained.x - mean, full_matrices=False).Vh[:setting.dim]
        return lambda x: (x - mean) @ axes.T
    arguments = dict(method=method, seed=setting.seed, rate=setting.rate, steps=_STEPS, batch_size=_BATCH)
    if method in _OWN_RATES:
        from pytorch_metric_learning import losses
        neck = nn.Sequential(nn.Linear(features, setting.dim, bias=False), nn.BatchNorm1d(setting.dim))
        kind = losses.ArcFaceLoss if method == 'arcface' else losses.ProxyAnchorLoss
        loss = kind(num_classes=trained.num_classes, embedding_size=setting.dim)
        train_on_features(neck, loss, trained.x, trained.y, **arguments, own=loss.parameters(),
                          own_rate=setting.rate * _OWN_RATES[method])
        return neck
    classifier = make_classifier(SuiteSetting('features', method, setting.dim, 'adamw', setting.seed), features,
                                 trained.num_classes)
    train_on_features(classifier, nn.CrossEntropyLoss(), trained.x, trained.y, **arguments)
    return classifier.embed if isinstance(classifier, DL2PAHead) else classifier[:-1]


def run(setting: Setting, whole: FeatureSet) -> dict[str, Any]:
    """Train on half of the classes, and return what was measured, in percent."""
    torch.manual_seed(setting.seed)
    trained, others = whole.halves(setting.seed)
    embed = embedder(setting, trained)
    found = {}
    for name, x, y in (('trained', trained.x_test, trained.y_test),
                       ('new', torch.cat([others.x, others.x_test]), torch.cat([others.y, others.y_test]))):
        with torch.no_grad():
            measures = retrieval_metrics(F.normalize(embed(x), dim=1), y, ks=[1])
        found[f'recall_at_1_{name}'] = round(100 * measures.recall[1], 2)
        found[f'map_at_r_{name}'] = round(100 * measures.map_at_r, 2)
        found[f'images_{name}'] = measures.queries
    return found


def settings_of(data: list[str], methods: list[str], dims: list[int], rates: list[float], seeds: list[int]
                ) -> list[Setting]:
    """Return all runs, each once."""
    return list(dict.fromkeys(
        Setting(name, method, None if method == 'features' else dim, None if method in UNTRAINED else rate, seed)
        for seed in seeds for name in data for method in methods for dim in dims for rate in rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--features', type=Path, required=True, help='the folder of npz files')
    parser.add_argument('--data', nargs='+', default=['cifar100', 'grocery'], metavar='NAME')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--dims', type=int, nargs='+', default=[16, 64])
    parser.add_argument('--rates', type=float, nargs='+', default=RATES)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add_output_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(NAME, Setting, args.output)
    settings = settings_of(args.data, args.methods, args.dims, args.rates, args.seeds)
    sets = {name: load_features(name, args.features) for name in args.data}
    for setting in tqdm([setting for setting in settings if setting not in runs], disable=None):
        runs.add(setting, run(setting, sets[setting.data]))


if __name__ == '__main__':
    main()
