"""ClassSampler: the classes of a batch and a sample of the others, whose number does not grow with that of all classes.
"""
import math
import random
from typing import NamedTuple

import torch
import torch.nn as nn

__all__ = ['MANY_CLASSES', 'NUM_SAMPLED', 'ClassSample', 'ClassSampler', 'first_of_each']

# Beyond so many classes nothing is done with all of them for each batch, but where it was asked for.
MANY_CLASSES = 8192
# Classes that are sampled for a batch, besides its own, where nobody says how many.
NUM_SAMPLED = 1024

# Numbers of multipliers and offsets. They have no common divisor, so that a million steps pass before a pair returns.
_MULTIPLIERS, _OFFSETS = 1021, 1024


def first_of_each(labels: torch.Tensor) -> torch.Tensor:
    """Return for each label (m,) int64 the place of the first equal one, (m,) int64, without waiting for the device.

    The first in the order of sorting: which of several equal labels it is, is not said.
    """
    ordered, order = labels.sort()
    return order[torch.searchsorted(ordered, labels)]


class ClassSample(NamedTuple):
    """Classes, and how many classes each of them stands for in a sum over all.

    Attributes:
        classes: (B + n,) int64, the labels of a batch of B samples, then the n sampled classes. The first of these
            stands in the place of labels that are left out.
        log_weights: (B + n,) float32, the logarithm of the number of classes that each stands for: 0 for the first
            occurrence of each label; -inf for every further one, for labels that are left out, and for sampled classes
            that are labels too; log w for the other sampled classes.
        rows: (B + n,) int64, for each entry the one of the same class whose weight is not zero.
    """
    classes: torch.Tensor
    log_weights: torch.Tensor
    rows: torch.Tensor


class ClassSampler(nn.Module):
    """Samples n distinct classes of C for each batch, and weighs them so that sums over all classes can be estimated.

    The classes of the batch are always in. Each of the sampled classes that are not of the batch stands for

        w = (number of classes that are not of the batch) / (number of sampled classes that are not of the batch)

    So a weighted sum of the terms of these classes estimates the sum over all classes, without a bias given the batch:
    the sampled softmax of Jean et al. 2015 ("On using very large target vocabulary for neural machine translation")
    with uniform sampling, whose positive classes are kept as in Partial FC (An et al. 2022). With n >= C all classes
    are in, and the sum is exact.

    The sample of a step is `(a i + b) mod C` for i = 0..n-1, where a, which has no divisor in common with C, and b are
    taken by the step's number from two short tables that the seed has filled. So it is the same in every process of a
    distributed run; no global random state, nothing of the size C and no waiting for the device is involved; and a
    recorded CUDA graph goes on to new samples. Time and memory are O((B + n) log B).

    Buffer, in the state dict: `step` () int64, the number of batches so far. A training that resumes with it goes on
    with the samples that an unbroken one would draw. Without it the samples begin again from the first.

    Args:
        num_classes: C.
        num_sampled: n, at least 1; of more than C, C.
        seed: Seed of the samples.

    Example:
        >>> sample = ClassSampler(num_classes=10 ** 6, num_sampled=4)(torch.tensor([7, 7]))
        >>> sample.classes.shape, sample.log_weights.exp()
        (torch.Size([6]), tensor([1.0000e+00, 0.0000e+00, 2.5000e+05, 2.5000e+05, 2.5000e+05, 2.5000e+05]))
    """

    step: torch.Tensor

    def __init__(self, num_classes: int, num_sampled: int, seed: int = 0):
        super().__init__()
        self.num_classes = num_classes
        self.num_sampled: int = min(num_sampled, num_classes)
        generator = random.Random(seed)
        coprime = (number for number in iter(lambda: generator.randrange(1, num_classes), None)
                   if math.gcd(number, num_classes) == 1)
        tables = {'multipliers': [next(coprime) for _ in range(_MULTIPLIERS)],
                  'offsets': [generator.randrange(num_classes) for _ in range(_OFFSETS)]}
        for name, numbers in tables.items():
            self.register_buffer(name, torch.tensor(numbers), persistent=False)
        self.register_buffer('step', torch.tensor(0))

    def forward(self, labels: torch.Tensor, kept: torch.Tensor | None = None) -> ClassSample:
        """Return the sample for the next batch, on the device of the labels.

        Args:
            labels: (B,) int64.
            kept: (B,) bool, False for labels that are left out. Default: all are kept.
        """
        if self.step.device != labels.device:
            self.to(labels.device)
        drawn = self.classes_of(self.step)
        self.step += 1
        known = labels
        if kept is not None:
            known, labels = labels.where(kept, self.num_classes), labels.where(kept, drawn[0])
        # A last one that is no class, so that there always is one that is not smaller.
        ordered, order = nn.functional.pad(known, (0, 1), value=self.num_classes).sort()
        classes = torch.cat([labels, drawn])
        places = torch.arange(len(classes), device=labels.device)
        first = torch.searchsorted(ordered, classes)
        # Of what is no label of the batch: a sampled class stands for itself, the first of them for what is left out.
        rows = torch.where(ordered[first] == classes, order[first], places.clamp_min(len(labels)))
        stands = rows == places
        of_batch, others = stands[:len(labels)].sum(), stands[len(labels):].sum()
        weight = (self.num_classes - of_batch) / others.clamp_min(1)
        log_weights = torch.where(places < len(labels), 0.0, weight.log())
        return ClassSample(classes, log_weights.masked_fill(~stands, -math.inf).float(), rows)

    def classes_of(self, step: torch.Tensor) -> torch.Tensor:
        """Return the classes (n,) int64 that are sampled at a step, () int64."""
        multiplier = self.multipliers.gather(0, (step % _MULTIPLIERS).view(1))
        offset = self.offsets.gather(0, (step % _OFFSETS).view(1))
        return (multiplier * torch.arange(self.num_sampled, device=offset.device) + offset) % self.num_classes

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, num_sampled={self.num_sampled}'
