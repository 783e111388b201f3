"""SampledCrossEntropyLoss against the full cross-entropy: equal when all classes are sampled, close otherwise."""
import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.largest_output import LargestOutput
from timm_dl2pa import AssignmentScheduler, DL2PAHead, DotRegressionLoss, SampledCrossEntropyLoss, SquaredCosineLoss

B, C, D = 9, 40, 6
LABELS = torch.tensor([3, 3, 17, 0, 39, 3, 17, 8, 1])


def setting(seed=0, num_classes=C, train_output='embeddings', learn_scale=True, **options):
    generator = torch.Generator().manual_seed(seed)
    points = nn.functional.normalize(torch.randn(num_classes + 3, D, generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DL2PAHead(5, num_classes, D, neck='linear', prototypes=points, train_output=train_output,
                         learn_scale=learn_scale, **options)
    head.assign(torch.randperm(num_classes + 3, generator=generator)[:num_classes])
    return head, torch.randn(B, 5, generator=generator)


def gradients(head, loss):
    head.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in head.parameters()])


def full_loss(head, x, labels, **options):
    return nn.functional.cross_entropy(head.current_scale() * head.cosines(head.embed(x)), labels, **options)


@given(seed=st.integers(0, 100), num_sampled=st.sampled_from([C, C + 1, 5000]), recipe=st.sampled_from(
    ['placed', 'even', 'paper']), smoothing=st.sampled_from([0.0, 0.1]), weighted=st.booleans(),
    reduction=st.sampled_from(['mean', 'sum', 'none']), learn_scale=st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_the_full_cross_entropy_when_all_classes_are_sampled(
        seed, num_sampled, recipe, smoothing, weighted, reduction, learn_scale):
    head, x = setting(seed, recipe=recipe, learn_scale=learn_scale)
    weights = torch.rand(C, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    criterion = SampledCrossEntropyLoss(head, num_sampled, reduction, smoothing, weights)
    labels = torch.where(torch.arange(B) == 4, -100, LABELS)
    loss = criterion(head(x), labels)
    expected = full_loss(head, x, labels, weight=weights, label_smoothing=smoothing, reduction=reduction)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradients(head, loss.sum()), gradients(head, expected.sum()), rtol=1e-3, atol=1e-5)


def test_the_loss_and_its_gradients_bias_fall_with_the_sample():
    head, x = setting(num_classes=400)
    expected = full_loss(head, x, LABELS)
    gradient, bias = gradients(head, expected), {}
    for num_sampled in (10, 100):
        criterion, losses, total = SampledCrossEntropyLoss(head, num_sampled), [], 0
        for _ in range(300):
            loss = criterion(head(x), LABELS)
            losses.append(loss.item())
            total = total + gradients(head, loss)
        bias[num_sampled] = [abs(torch.tensor(losses).mean() - expected.item()) / expected.item(),
                             float((total / 300 - gradient).norm() / gradient.norm())]
    assert bias[100][0] < bias[10][0] < 0.1 and bias[100][1] < bias[10][1] / 2 and bias[100][1] < 0.02


@pytest.mark.parametrize('learn_scale', [False, True])
def test_logits_get_the_full_cross_entropy(learn_scale):
    head, x = setting(train_output='logits', learn_scale=learn_scale)
    criterion, soft = SampledCrossEntropyLoss(head, 3, label_smoothing=0.1), torch.randn(B, C).softmax(dim=1)
    for mode in (True, False):
        for targets in (LABELS, soft):
            expected = full_loss(head.train(mode), x, targets, label_smoothing=0.1)
            assert torch.allclose(criterion(head(x), targets), expected, atol=1e-5)
    head, x = setting(learn_scale=learn_scale)
    for output, targets in ((head(x), soft), (head.eval()(x), LABELS)):
        head.train(targets is soft)
        assert torch.allclose(SampledCrossEntropyLoss(head, 3)(output, targets), full_loss(head, x, targets), atol=1e-5)


@pytest.mark.parametrize('kind', [SampledCrossEntropyLoss, SquaredCosineLoss, DotRegressionLoss])
@pytest.mark.parametrize('warmup', ['none', 'rotated'])
@pytest.mark.filterwarnings('ignore:.*is the cross-entropy of the scaled cosines')
def test_nothing_of_the_size_of_all_classes(kind, warmup):
    """In a warm-up whose class vectors stand in too: B + n rows of them are read."""
    head, x = setting(num_classes=9000, learn_scale=False)
    head.scheduler = AssignmentScheduler(head, interval=100, warmup=warmup)
    criterion = kind(head)
    with LargestOutput() as seen:
        criterion(head(x), LABELS).backward()
    assert seen.largest < (9000 if kind is DotRegressionLoss and warmup == 'none' else 2100 * B) + 1
    assert criterion.state_dict().keys() == {'sampler.step'}


@pytest.mark.parametrize('warmup', ['placed', 'rotated'])
@pytest.mark.filterwarnings('ignore:.*is the cross-entropy of the scaled cosines')
def test_a_warmup_samples_its_own_class_vectors(monkeypatch, warmup):
    """The losses of distances too, where there are many classes; of few they take all."""
    monkeypatch.setattr('timm_dl2pa.losses.prototype_losses.MANY_CLASSES', C - 1)
    head, x = setting(learn_scale=False)
    scheduler = AssignmentScheduler(head, interval=100, warmup=warmup)
    for start in (0, C // 2):  # every class is seen
        head(torch.randn(C // 2, 5)), scheduler.step(torch.arange(start, start + C // 2))
    expected = full_loss(head, x, LABELS)
    for criterion in (SampledCrossEntropyLoss(head), SquaredCosineLoss(head), DotRegressionLoss(head)):
        assert criterion.sampler is not None
        assert torch.allclose(criterion(head(x), LABELS), expected, atol=1e-5)
        criterion.sampler.num_sampled = 4
        assert not torch.allclose(criterion(head(x), LABELS), expected, atol=1e-5)
    monkeypatch.setattr('timm_dl2pa.losses.prototype_losses.MANY_CLASSES', C)
    assert not SquaredCosineLoss(head).state_dict()


def test_in_float32_under_autocast():
    head, x = setting()
    output = head(x)
    first, second = SampledCrossEntropyLoss(head, 10), SampledCrossEntropyLoss(head, 10)
    with torch.autocast('cpu', torch.bfloat16):
        value = first(output, LABELS)
    assert value.dtype == torch.float32 and torch.allclose(value, second(output, LABELS), atol=1e-6)


def test_compiles_and_goes_on_to_new_samples():
    torch._dynamo.reset()
    head, x = setting()
    first, second = SampledCrossEntropyLoss(head, 10, label_smoothing=0.1), SampledCrossEntropyLoss(
        head, 10, label_smoothing=0.1)
    compiled = torch.compile(lambda x, y: first(head(x), y), fullgraph=True, backend='aot_eager')
    with torch._dynamo.config.patch(error_on_recompile=True):
        values = [compiled(x, LABELS) for _ in range(4)]
    assert torch.allclose(torch.stack(values), torch.stack([second(head(x), LABELS) for _ in range(4)]), atol=1e-6)
    assert len({value.item() for value in values}) == 4


def test_the_learned_scale_takes_part_in_the_forward():
    """DistributedDataParallel with find_unused_parameters=True refuses a parameter that the loss alone uses."""
    head, x = setting()
    output = head(x)
    assert torch.equal(output, head.embed(x))
    output.sum().backward()
    assert head.log_scale.grad.item() == 0


def test_it_resumes_and_is_copied_with_its_head():
    head, x = setting()
    criterion = SampledCrossEntropyLoss(head, 10)
    criterion(head(x), LABELS)
    resumed, copied = SampledCrossEntropyLoss(head, 10), copy.deepcopy((head, criterion))
    resumed.load_state_dict(criterion.state_dict())
    expected = criterion(head(x), LABELS)
    assert torch.equal(resumed(head(x), LABELS), expected) and not list(criterion.parameters())
    assert torch.equal(copied[1](copied[0](x), LABELS), expected)
    assert 'num_sampled=10' in repr(criterion)


def test_bad_labels_and_arguments():
    head, x = setting()
    for bad in (-1, C):
        with pytest.raises((IndexError, RuntimeError), match='out of'):
            SampledCrossEntropyLoss(head, 4)(head(x), torch.full((B,), bad))
    for arguments, message in ((dict(num_sampled=0), 'num_sampled must be at least 1, not 0'),
                               (dict(label_smoothing=2), 'label_smoothing must be from 0 to 1, not 2')):
        with pytest.raises(ValueError, match=message):
            SampledCrossEntropyLoss(head, **arguments)
    assert SampledCrossEntropyLoss(head, 4)(head(x)[:0], LABELS[:0]) == 0


def test_from_where_on_classes_are_sampled():
    """What the documentation says: beyond 8,192 classes, in losses and in the placement alike."""
    for classes, samples in ((8192, False), (8193, True)):
        prototypes = torch.nn.functional.normalize(torch.randn(classes, 2), dim=1)
        head = DL2PAHead(4, classes, 2, prototypes=prototypes, learn_scale=False, train_output='embeddings')
        assert (SquaredCosineLoss(head).sampler is not None) == samples
        warmup = AssignmentScheduler(head).warmup
        assert (warmup.placement._sampler is not None) == samples
