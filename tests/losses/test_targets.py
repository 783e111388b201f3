"""Every loss leaves out ignored samples, weighs classes as torch's cross-entropy does, and refuses odd targets."""
import math

import pytest
import torch
import torch.nn as nn

from timm_dl2pa import (
    AssignmentScheduler,
    BalancedSoftmaxLoss,
    DL2PAHead,
    DotRegressionLoss,
    SampledCrossEntropyLoss,
    SquaredCosineLoss,
    WeightedCrossEntropyLoss,
)

B, C, D = 8, 5, 3
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 0])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])

LOSSES = {
    'squared cosine': lambda head, **options: SquaredCosineLoss(head, **options),
    'dot regression': lambda head, **options: DotRegressionLoss(head, **options),
    'balanced softmax': lambda head, **options: BalancedSoftmaxLoss(C, torch.arange(1, C + 1), **options),
    'cross-entropy': lambda head, **options: WeightedCrossEntropyLoss(C, **{'class_weights': None, **options}),
    'sampled cross-entropy over cosines': lambda head, **options: SampledCrossEntropyLoss(head, **options),
    'squared cosine in a warm-up': lambda head, **options: in_warmup(head, SquaredCosineLoss(head, **options)),
}
every_loss = pytest.mark.parametrize('name', LOSSES)
pytestmark = pytest.mark.filterwarnings('ignore:.*is the cross-entropy of the scaled cosines')


def in_warmup(head, criterion):
    head.scheduler = AssignmentScheduler(head, interval=100)
    return criterion


def make(train_output='logits'):
    head = DL2PAHead(6, C, D, neck='linear', learn_scale=False, train_output=train_output)
    nn.init.orthogonal_(head.neck.weight)
    return head, torch.randn(B, 6, generator=torch.Generator().manual_seed(1))


def outputs(name):
    for train_output in ('logits', 'embeddings'):
        if train_output == 'logits' or 'cosine' in name or 'dot' in name:
            head, x = make(train_output)
            yield head, x


@every_loss
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_ignored_samples_are_left_out(name, reduction):
    for head, x in outputs(name):
        for ignored, options in ((-100, {}), (255, {'ignore_index': 255}), (-1, {'ignore_index': -1})):
            labels = torch.cat([LABELS, torch.full((3,), ignored)])
            criterion = LOSSES[name](head, reduction=reduction, **options)
            loss = criterion(head(torch.cat([x, torch.randn(3, 6)])), labels)
            expected = LOSSES[name](head, reduction=reduction)(head(x), LABELS)
            if reduction == 'none':
                assert loss.shape == (B + 3,) and not loss[B:].any()
                loss = loss[:B]
            assert torch.allclose(loss, expected, atol=1e-5)
        loss = LOSSES[name](head)(head(x), torch.full((B,), -100))
        assert float(loss) == 0
        loss.backward()
        assert not head.neck.weight.grad.any()


@every_loss
def test_class_weights_are_those_of_the_classes(name):
    """Not of positions in the batch, of which there may be as many: B == C here."""
    for head, x in outputs(name):
        x, labels = x[:C], torch.tensor([1, 1, 2, 3, 0])
        for weights in (WEIGHTS, WEIGHTS.tolist(), WEIGHTS.numpy()):
            each = LOSSES[name](head, reduction='none')(head(x), labels)
            found = LOSSES[name](head, reduction='none', class_weights=weights)(head(x), labels)
            assert torch.allclose(found, WEIGHTS[labels] * each, atol=1e-5)
            mean = LOSSES[name](head, class_weights=weights)(head(x), labels)
            assert torch.allclose(mean, (WEIGHTS[labels] * each).sum() / WEIGHTS[labels].sum(), atol=1e-5)


@every_loss
def test_one_hot_targets_weigh_as_hard_ones_do(name):
    soft = nn.functional.one_hot(LABELS, C).float()
    for head, x in outputs(name):
        criterion = LOSSES[name](head, class_weights=WEIGHTS)
        assert torch.allclose(criterion(head(x), soft), criterion(head(x), LABELS), atol=1e-5)


def test_hard_labels_give_torchs_weighted_cross_entropy():
    logits, labels = torch.randn(B, C), torch.cat([LABELS[:-1], torch.tensor([-100])])
    for smoothing in (0.0, 0.1):
        found = WeightedCrossEntropyLoss(C, WEIGHTS, label_smoothing=smoothing)(logits, labels)
        expected = nn.functional.cross_entropy(logits, labels, WEIGHTS, label_smoothing=smoothing)
        assert torch.allclose(found, expected, atol=1e-5)


@every_loss
@pytest.mark.parametrize('soft', [False, True])
def test_automatic_weights_follow_the_frequencies_so_far(name, soft):
    head, x = make()
    criterion = LOSSES[name](head, reduction='none', class_weights='auto')
    targets = nn.functional.one_hot(LABELS, C).float() if soft else LABELS
    with torch.no_grad():
        criterion(head(x), targets)
    assert criterion.class_weights.counts.tolist() == [1] * C
    criterion(head(x), targets)
    assert criterion.class_weights.counts.tolist() == [4, 3, 2, 2, 2]
    found = criterion(head(x), targets)
    counts = torch.tensor([7.0, 5, 3, 3, 3])
    plain = LOSSES[name](head, reduction='none')(head(x), targets)
    assert torch.allclose(found, counts.mean() / counts[LABELS] * plain, rtol=1e-4)
    again = LOSSES[name](head, class_weights='auto')
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again.class_weights.counts, counts)


@every_loss
def test_targets_that_are_not_finite_spoil_one_batch_alone(name):
    head, x = make()
    soft = nn.functional.one_hot(LABELS, C).float()
    criterion = LOSSES[name](head, class_weights='auto')
    broken = soft.clone()
    broken[2, 3] = math.nan
    criterion(head(x), broken)
    assert criterion.class_weights.counts.tolist() == [4, 3, 1, 2, 2]
    assert criterion(head(x), soft).isfinite()


def test_balanced_softmax_goes_on_after_targets_that_are_not_finite():
    criterion, soft = BalancedSoftmaxLoss(C), nn.functional.one_hot(LABELS, C).float()
    broken = soft.clone()
    broken[2, 3] = math.nan
    assert criterion(torch.zeros(B, C), broken).isnan()
    assert criterion.class_counts.tolist() == [4, 3, 1, 2, 2] and criterion(torch.zeros(B, C), soft).isfinite()
    criterion(torch.zeros(B, C), torch.full((B,), -100))
    assert criterion.class_counts.tolist() == [7, 5, 2, 3, 3]


@every_loss
@pytest.mark.parametrize('targets, message', [
    (torch.tensor([0.9, 1.7, 0, 0, 0, 0, 0, 0]), 'class indices .*not torch.float32'),
    (torch.tensor([True] * B), 'class indices .*not torch.bool'),
    (torch.full((B, C), 0.2, dtype=torch.cfloat), 'not torch.complex64'),
    (torch.tensor([[1.5, -0.5, 0, 0, 0]] * B), 'at least 0, not -0.5'), (torch.zeros(B, C, 1), 'shape')])
def test_odd_targets_are_refused(name, targets, message):
    head, x = make()
    criterion = LOSSES[name](head, class_weights='auto')
    with pytest.raises(ValueError, match=message):
        criterion(head(x), targets)
    assert criterion.class_weights.counts.tolist() == [1] * C


@every_loss
@pytest.mark.parametrize('weights', [
    torch.ones(C + 1), torch.tensor([1, 1, 1, 1, -1.0]), torch.tensor([1, 1, 1, 1, math.nan]), torch.zeros(C),
    'balanced', 3.0, [1, 2, 'three', 4, 5], torch.ones(C, 1)])
def test_odd_class_weights_are_refused(name, weights):
    with pytest.raises(ValueError, match=f'class_weights must be {C} finite numbers'):
        LOSSES[name](make()[0], class_weights=weights)


@pytest.mark.parametrize('weight', [torch.ones(C), [1.0] * C, 'auto', None, -1.0, math.nan, True])
def test_the_factor_on_the_loss_is_one_number(weight):
    with pytest.raises(ValueError, match=r'weight must be .*class_weights'):
        SquaredCosineLoss(make()[0], weight=weight)


@pytest.mark.parametrize('kind', [int, torch.int64])
def test_numbers_of_torch_are_taken(kind):
    weight = torch.tensor(2, dtype=kind) if kind is torch.int64 else 2
    assert SquaredCosineLoss(make()[0], weight=weight).weight == 2.0
