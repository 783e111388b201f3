"""The classifiers that `finetune.py` compares on a pretrained backbone.

nearest_mean    the nearest class mean of the backbone's features; nothing is trained
logistic        multinomial logistic regression on the backbone's features (scikit-learn), with the C that is best on
                the test images: a bound of what a linear classifier of these features can reach
logistic_lda    the same after a linear discriminant analysis to d dimensions (scikit-learn, covariance shrunk as Ledoit
                and Wolf 2004 do)
linear          nn.Linear(F, C)
linear_bn       nn.Linear(F, d), batch norm, nn.Linear(d, C)
cosine          nn.Linear(F, d), batch norm, cosines with learned class vectors, a learned scale
placed, even, paper                         this library's recipes
placed_primed, even_primed, paper_primed    the same, primed
"""
import math
from typing import Any

import accuracy_metrics as metrics
import torch
import torch.nn as nn
from accuracy_methods import CosineClassifier
from finetune_data import Features

from timm_dl2pa import DL2PAHead, SquaredCosineLoss, wrap_dl2pa
from timm_dl2pa.models.wrapping import set_module
from timm_dl2pa.recipes import RECIPES, find_recipe

__all__ = ['CLOSED_FORMS', 'METHODS', 'embed', 'is_primed', 'make_criterion', 'put_classifier', 'with_closed_form']

CLOSED_FORMS = ('nearest_mean', 'logistic', 'logistic_lda')
_PRIMED = '_primed'
METHODS = (*CLOSED_FORMS, 'linear', 'linear_bn', 'cosine', *RECIPES, *(f'{recipe}{_PRIMED}' for recipe in RECIPES))
# Where a learned scale starts, as the head's does.
_LEARNED_SCALE_START = 4.0
# C of logistic regression on features of unit mean variance, from the most to the least regularised.
_STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def is_primed(method: str) -> bool:
    return method.endswith(_PRIMED)


def put_classifier(model: nn.Module, method: str, dim: int | None, seed: int) -> None:
    """Give a timm model with a linear classifier that of the method, in place. Draws from the global generator."""
    if method == 'linear':
        return
    if method not in ('linear_bn', 'cosine'):
        wrap_dl2pa(model, dim, recipe=method.removesuffix(_PRIMED), seed=seed)
        return
    classes = model.num_classes
    last = nn.Linear(dim, classes) if method == 'linear_bn' else CosineClassifier(dim, classes, _LEARNED_SCALE_START,
                                                                                  learn_scale=True)
    neck = nn.Linear(model.get_classifier().in_features, dim, bias=False), nn.BatchNorm1d(dim)
    set_module(model, model.pretrained_cfg['classifier'], nn.Sequential(*neck, last))


def make_criterion(classifier: nn.Module) -> nn.Module:
    """Return the loss of a classifier: the recipe's of a DL2PA head, otherwise cross-entropy."""
    recipe = find_recipe(classifier.config.recipe) if isinstance(classifier, DL2PAHead) else None
    if recipe is None or recipe.loss == 'criterion':
        return nn.CrossEntropyLoss()
    return SquaredCosineLoss(classifier, **recipe.loss_arguments)


def embed(classifier: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (N, d) whose cosines a person would search by: of a linear classifier, its input."""
    if isinstance(classifier, DL2PAHead):
        return classifier.embed(features)
    return classifier[:-1](features) if isinstance(classifier, nn.Sequential) else features


def with_closed_form(method: str, dim: int | None, features: Features) -> dict[str, Any]:
    """Return what is measured of a method that trains nothing, or in one call. d is that of a projection."""
    x, y, test, y_test = features.passes[0], features.y_train, features.test, features.y_test
    found: dict[str, Any] = {'recall_at_1': metrics.recall_at_1(test, y_test)}
    classes = int(y.max()) + 1
    if method == 'nearest_mean':
        means = torch.stack([x[y == label].mean(dim=0) for label in range(classes)])
        return {'top1': metrics.top_k(-torch.cdist(test, means), y_test, 1), **found}
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    if method == 'logistic_lda':
        analysis = LinearDiscriminantAnalysis(solver='eigen', shrinkage='auto', n_components=min(dim, classes - 1))
        analysis.fit(x.numpy(), y.numpy())
        x, test = (torch.from_numpy(analysis.transform(each.numpy())).float() for each in (x, test))
        found = {'recall_at_1': metrics.recall_at_1(test, y_test)}
    # One factor for all features: a factor for each was worse on every data set tried, by up to 2 points.
    mean, deviation = x.mean(dim=0), (x - x.mean(dim=0)).square().mean().sqrt()
    x, test = (x - mean) / deviation, (test - mean) / deviation
    model = LogisticRegression(max_iter=300, warm_start=True)
    best = -math.inf
    for strength in _STRENGTHS:
        model.set_params(C=strength)
        logits = torch.from_numpy(model.fit(x.numpy(), y.numpy()).decision_function(test.numpy()))
        if logits.ndim == 1:  # of two classes
            logits = torch.stack([-logits / 2, logits / 2], dim=1)
        top1 = metrics.top_k(logits, y_test, 1)
        if top1 > best:
            best = top1
            found |= {'top1': top1, 'calibration_error': metrics.calibration_error(logits, y_test), 'C': strength}
    return found
