"""Do a head's scores tell images of unknown classes from those of known ones? Beside a linear classifier's.

    python benchmarks/unknown_classes.py --features FOLDER            # made by feature_data.py: cifar100 and digits
    python benchmarks/unknown_classes.py --features FOLDER --known embeddings --far other

A classifier is trained on frozen features of half of the classes of a set, drawn by the seed. Its scores are taken of
the test images of these classes (known), of the other half (near), and of a set of another kind (far). AUROC: how often
a known image has the higher score. FPR95: the share of unknown images that pass where 95 % of the known ones do.

linear      nn.Linear on the features: the maximum softmax probability, the largest logit, and the energy
cosine      the head's neck, cosines with learned class vectors, a learned scale
static      fixed prototypes, random assignment
even, placed    the recipes

Each run adds its row at once, and is not run again.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from feature_data import FeatureSet, load_feature_file, load_features
from feature_training import train_on_features
from results_file import Runs, add_output_argument
from suite import Setting as SuiteSetting
from suite import make_classifier
from tqdm import tqdm

from timm_dl2pa import DL2PAHead
from timm_dl2pa.evaluation import auroc, false_positive_rate, unknown_scores

NAME = 'unknown_classes'
METHODS = ('linear', 'cosine', 'static', 'even', 'placed')
_RATE, _STEPS, _BATCH = 1e-3, 840, 64


@dataclass(frozen=True)
class Setting:
    """All that decides a run. `dim` is None for the method without one."""
    known: str
    far: str
    method: str
    dim: int | None
    seed: int


@torch.no_grad()
def scores_of(classifier: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the predictions (N,) of features, and their scores, which are larger for what is known."""
    logits = classifier(x)
    if isinstance(classifier, nn.Linear):
        scores = {'probability': logits.softmax(1).amax(1), 'logit': logits.amax(1), 'energy': logits.logsumexp(1)}
    elif isinstance(classifier, DL2PAHead):
        scores = unknown_scores(classifier.embed(x), classifier.class_prototypes, classifier.current_scale())
    else:
        last = classifier[-1]
        scores = unknown_scores(F.normalize(classifier[:-1](x), dim=1), F.normalize(last.weight, dim=1),
                                last.log_scale.exp())
    return logits.argmax(1), scores


def run(setting: Setting, whole: FeatureSet, x_far: torch.Tensor) -> dict[str, Any]:
    """Train on half of the classes, and return what was measured, in percent."""
    torch.manual_seed(setting.seed)
    known, near = whole.halves(setting.seed)
    classifier = make_classifier(SuiteSetting('features', setting.method, setting.dim, 'adamw', setting.seed),
                                 known.x.shape[1], known.num_classes)
    train_on_features(classifier, nn.CrossEntropyLoss(), known.x, known.y, method=setting.method, seed=setting.seed,
                      rate=_RATE, steps=_STEPS, batch_size=_BATCH)
    predicted, own = scores_of(classifier, known.x_test)
    found: dict[str, Any] = {'top1': round(100 * (predicted == known.y_test).double().mean().item(), 2), 'scores': {}}
    others = {'near': scores_of(classifier, near.x_test)[1], 'far': scores_of(classifier, x_far)[1]}
    for name, values in own.items():
        found['scores'][name] = {
            f'{measure}_{kind}': round(100 * of(values, unknown[name]), 2)
            for kind, unknown in others.items() for measure, of in (('auroc', auroc), ('fpr95', false_positive_rate))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--features', type=Path, required=True, help='the folder of npz files')
    parser.add_argument('--known', default='cifar100', metavar='NAME', help='the set whose classes are halved')
    parser.add_argument('--far', default='digits', metavar='NAME', help='a set of another kind: its test file is read')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
    parser.add_argument('--dims', type=int, nargs='+', default=[16, 64])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add_output_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(NAME, Setting, args.output)
    whole = load_features(args.known, args.features)
    x_far, _ = load_feature_file(args.features / f'{args.far}_test.npz')
    settings = dict.fromkeys(Setting(args.known, args.far, method, None if method == 'linear' else dim, seed)
                             for seed in args.seeds for method in args.methods for dim in args.dims)
    for setting in tqdm([setting for setting in settings if setting not in runs], disable=None):
        runs.add(setting, run(setting, whole, x_far))


if __name__ == '__main__':
    main()
