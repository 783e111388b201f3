"""The classifiers that are compared at very many classes, each on the same features and with the same optimiser.

linear      nn.Linear(features, C)
linear_d    nn.Linear(features, d), nn.Linear(d, C)
linear_bn   the head's neck: nn.Linear(features, d) without bias and batch norm; then nn.Linear(d, C)
cosine      the neck, then cosines with learned class vectors, with a learned scale
sampled     cosine, trained by sampled softmax: a step takes the batch's classes and a sample of the others
static      this library's head with the neck and learned scale of its default recipe, whose labels never move
placed, even, paper     its recipes
placed_sampled          placed, by `SampledCrossEntropyLoss`: no step has all classes
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from accuracy_methods import CosineClassifier

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SampledCrossEntropyLoss, SquaredCosineLoss
from timm_dl2pa.recipes import RECIPES, find_recipe

__all__ = ['METHODS', 'PLACED', 'SampledCosineClassifier', 'embed', 'make_classifier', 'make_loss', 'make_scheduler']

METHODS = ('linear', 'linear_d', 'linear_bn', 'cosine', 'sampled', 'static', *RECIPES, 'placed_sampled')
# Those whose prototypes may be put elsewhere.
PLACED = ('placed', 'placed_sampled')
# Where a learned scale starts, as the head's does.
_LEARNED_SCALE_START = 4.0


class SampledCosineClassifier(nn.Module):
    """Learned class vectors and a learned scale; trained by sampled softmax, whose cost does not depend on C.

    A step takes the batch's classes, and of `num_sampled` draws from all classes those that are not among them. A class
    outside the batch is thus taken with the probability p = 1 - (1 - 1 / C)^n, and its exponentiated logit counts for
    1 / p of them: so the sum that softmax divides by is right on average (Jean et al. 2015, section 3.1; the correction
    by the probability of being taken is that of Bengio & Senecal 2008). The gradient of the vectors is sparse.

    Args:
        dim: d.
        num_classes: C.
        num_sampled: n, the number of draws.
    """

    def __init__(self, dim: int, num_classes: int, num_sampled: int):
        super().__init__()
        self.vectors = nn.Embedding(num_classes, dim, sparse=True)
        nn.init.normal_(self.vectors.weight, std=dim ** -0.5)
        self.log_scale = nn.Parameter(torch.tensor([math.log(_LEARNED_SCALE_START)]))
        self.num_sampled = num_sampled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of all classes (B, C)."""
        return self.log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(self.vectors.weight, dim=1).t()

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of rows (B, d) over the step's classes. Draws from the global generator."""
        count = self.vectors.num_embeddings
        own = labels.unique()
        drawn = torch.randint(count, (self.num_sampled,), device=labels.device).unique()
        others = drawn[~torch.isin(drawn, own)]
        vectors = self.vectors(torch.cat([own, others]))
        logits = self.log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(vectors, dim=1).t()
        probability = -math.expm1(self.num_sampled * math.log1p(-1 / count))
        logits = torch.cat([logits[:, :len(own)], logits[:, len(own):] - math.log(probability)], dim=1)
        return F.cross_entropy(logits, torch.searchsorted(own, labels))


def make_classifier(method: str, features: int, num_classes: int, dim: int | None, num_sampled: int | None,
                    seed: int) -> nn.Module:
    """Return the classifier of a method, on features (B, features). Draws from the global generator."""
    if method == 'linear':
        return nn.Linear(features, num_classes)
    if method == 'linear_d':
        return nn.Sequential(nn.Linear(features, dim), nn.Linear(dim, num_classes))
    if method == 'static':
        return DL2PAHead(features, num_classes, dim, seed=seed)
    if method == 'placed_sampled':
        return DL2PAHead(features, num_classes, dim, train_output='embeddings', learn_scale=True, seed=seed)
    if method in RECIPES:
        # The squared cosine of `paper` needs no logits.
        output = 'logits' if find_recipe(method).loss == 'criterion' else 'embeddings'
        return DL2PAHead(features, num_classes, dim, recipe=method, train_output=output, seed=seed)
    neck = nn.Linear(features, dim, bias=False), nn.BatchNorm1d(dim)
    if method == 'linear_bn':
        return nn.Sequential(*neck, nn.Linear(dim, num_classes))
    if method == 'cosine':
        return nn.Sequential(*neck, CosineClassifier(dim, num_classes, _LEARNED_SCALE_START, learn_scale=True))
    return nn.Sequential(*neck, SampledCosineClassifier(dim, num_classes, num_sampled))


def make_loss(method: str, classifier: nn.Module):
    """Return the loss of a method: a function of features (B, features) and labels (B,)."""
    if method == 'sampled':
        return lambda x, labels: classifier[-1].loss(classifier[:-1](x), labels)
    criterion: nn.Module = nn.CrossEntropyLoss()
    if method == 'placed_sampled':
        criterion = SampledCrossEntropyLoss(classifier)
    if method in RECIPES and find_recipe(method).loss != 'criterion':
        criterion = SquaredCosineLoss(classifier, **find_recipe(method).loss_arguments)
    return lambda x, labels: criterion(classifier(x), labels)


def make_scheduler(method: str, classifier: nn.Module, steps: int) -> AssignmentScheduler | None:
    """Return the scheduler of a recipe's training of so many batches; None for the other methods."""
    if method not in RECIPES and method != 'placed_sampled':
        return None
    return AssignmentScheduler(classifier, total=steps)


def embed(classifier: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (N, d) by whose cosines one searches: of a linear classifier, what its last layer gets."""
    if isinstance(classifier, DL2PAHead):
        return classifier.embed(features)
    return classifier[:-1](features) if isinstance(classifier, nn.Sequential) else features
