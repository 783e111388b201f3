"""Every number that people give: those of Python, numpy and torch are taken; all else is refused by its name."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_dl2pa import (
    AssignmentScheduler,
    BalancedSoftmaxLoss,
    ClassMeans,
    DL2PAHead,
    SampledCrossEntropyLoss,
    Schedule,
    SquaredCosineLoss,
    WeightedCrossEntropyLoss,
    default_scale,
    make_prototypes,
    max_cosine_lower_bound,
    prime,
    solve_assignment,
)
from timm_dl2pa.values import real_number, whole_number


def head(**options):
    plain = {'in_features': 12, 'num_classes': 7, 'dim': 4, 'neck': 'linear', 'learn_scale': False}
    return DL2PAHead(**{**plain, **options})


def scheduler(**options):
    return AssignmentScheduler(head(), **options)


def primed(max_batches):
    return prime(nn.Sequential(head()), [(torch.randn(9, 12), torch.arange(9) % 7)] * 4, max_batches=max_batches,
                 progress=False)


WHOLE = {
    'in_features': lambda v: head(in_features=v), 'num_classes': lambda v: head(num_classes=v),
    'dim': lambda v: head(dim=v), 'num_prototypes': lambda v: head(num_prototypes=v), 'seed': lambda v: head(seed=v),
    'start': lambda v: scheduler(start=v), 'stop': lambda v: scheduler(stop=v), 'lag': lambda v: scheduler(lag=v),
    'interval': lambda v: scheduler(interval=v), 'total': lambda v: scheduler(total=v),
    'warmup_length': lambda v: scheduler(warmup_length=v), 'ignore_index': lambda v: scheduler(ignore_index=v),
    'stages': lambda v: Schedule(((v, None),)), 'max_batches': primed,
    'num_classes of class means': lambda v: ClassMeans(v, 3), 'dim of class means': lambda v: ClassMeans(3, v),
    'num_prototypes of a set': lambda v: make_prototypes(v, 3), 'dim of a set': lambda v: make_prototypes(7, v),
    'num_prototypes of a bound': lambda v: max_cosine_lower_bound(v, 3),
    'dim of a bound': lambda v: max_cosine_lower_bound(9, v),
    'num_classes of a scale': default_scale, 'num_classes of a loss': WeightedCrossEntropyLoss,
    'num_classes of balanced softmax': BalancedSoftmaxLoss,
    'num_sampled': lambda v: SampledCrossEntropyLoss(head(), v),
    'ignore_index of a loss': lambda v: SquaredCosineLoss(head(), ignore_index=v),
}
REAL = {
    'scale': lambda v: head(scale=v), 'momentum': lambda v: scheduler(momentum=v),
    'min_gain': lambda v: scheduler(min_gain=v), 'evenness': lambda v: scheduler(evenness=v),
    'weight': lambda v: SquaredCosineLoss(head(), weight=v),
    'label_smoothing': lambda v: WeightedCrossEntropyLoss(3, label_smoothing=v),
}
MAY_BE_NONE = {'num_prototypes', 'stop', 'total', 'warmup_length', 'max_batches', 'scale', 'momentum', 'evenness'}


@pytest.mark.parametrize('name', WHOLE)
def test_whole_numbers(name):
    for value in (8, np.int64(8), torch.tensor(8)):
        WHOLE[name](value)
    for value in ('x', 8.5, math.nan, True, [8], torch.tensor([8, 9]), *(() if name in MAY_BE_NONE else (None,))):
        with pytest.raises(ValueError, match=f'^{name.split()[0]}'):
            WHOLE[name](value)


@pytest.mark.parametrize('name', REAL)
def test_real_numbers(name):
    for value in (0.5, np.float32(0.5), torch.tensor(0.5)):
        REAL[name](value)
    for value in ('x', math.nan, True, [0.5], -1, 10 ** 400, torch.ones(7), *(() if name in MAY_BE_NONE else (None,))):
        with pytest.raises(ValueError, match=f'^{name}'):
            REAL[name](value)


@pytest.mark.parametrize('name, value', [
    ('recipe', [3]), ('recipe', 3), ('warmup', [3]), ('warmup', 3), ('background', 'x'), ('background', 1)])
def test_words(name, value):
    with pytest.raises(ValueError, match=f'^{name} must be'):
        scheduler(**{name: value})


@pytest.mark.parametrize('assignment', ['abc', None, [0, 1, 2, 3, 4, 5, 6], np.arange(7)])
def test_assignments_are_tensors(assignment):
    with pytest.raises(ValueError, match=r'assignment must be a tensor \(7,\)'):
        head().assign(assignment)


def test_complex_means_are_refused():
    with pytest.raises(ValueError, match='class_means must be real'):
        solve_assignment(class_means=torch.randn(5, 4, dtype=torch.cfloat), prototypes=torch.randn(7, 4))


TARGETS = [[0, 1, 2], (0, 1, 2), np.array([0, 1, 2]), *(torch.tensor([0, 1, 2]).to(dtype) for dtype in (
    torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64))]
SHARES = [torch.eye(7)[:3].to(dtype) for dtype in (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64)]
CRITERIA = [SquaredCosineLoss(head()), SampledCrossEntropyLoss(head()), BalancedSoftmaxLoss(7),
            WeightedCrossEntropyLoss(7)]


@pytest.mark.parametrize('targets', [*TARGETS, *SHARES])
def test_targets_of_every_kind(targets):
    given = scheduler(interval=100)
    given.heads[0](torch.eye(12)[:3])
    given.step(targets)
    embeddings = given.heads[0].embed(torch.eye(12)[:3]).detach()
    expected = torch.zeros(7, 4).index_add_(0, torch.tensor([0, 1, 2]), embeddings)
    assert torch.allclose(given.class_means.sums, expected, atol=1e-6)
    logits = torch.randn(3, 7)
    for criterion in CRITERIA:
        with torch.no_grad():
            assert torch.allclose(criterion(logits, targets), criterion(logits, torch.tensor([0, 1, 2])), rtol=1e-5)


@pytest.mark.parametrize('targets', ['abc', None, [[0, 1], [2]], [0.5, 1.0, 2.0], {'labels': [0, 1, 2]}, 3])
def test_what_is_no_targets(targets):
    given = scheduler(interval=100)
    given.heads[0](torch.randn(3, 12))
    for take in (given.step, lambda targets: CRITERIA[0](torch.randn(3, 7), targets)):
        with pytest.raises(ValueError, match='targets'):
            take(targets)


def test_a_range_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r'^count must be from 1 to 3, not 4\. Take less\.$'):
        whole_number('count', 4, 1, 3, remedy='Take less.')
    with pytest.raises(ValueError, match=r'^share must be at most 0\.5, not 1\.'):
        real_number('share', 1, most=0.5)
    with pytest.raises(ValueError, match=r'^count must be at most 3, not a huge int'):
        whole_number('count', 10 ** 5000, most=3)
