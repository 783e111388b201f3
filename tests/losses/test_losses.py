import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import reference
from tests.helpers.largest_output import LargestOutput
from timm_dl2pa import BalancedSoftmaxLoss, DL2PAHead, DotRegressionLoss, SquaredCosineLoss

B, C, D = 9, 6, 4


def setting(seed, train_output='logits'):
    head = DL2PAHead(5, C, D, num_prototypes=8, neck='linear', learn_scale=False, train_output=train_output)
    generator = torch.Generator().manual_seed(seed)
    head.assign(torch.randperm(8, generator=generator)[:C])
    x, labels = torch.randn(B, 5, generator=generator), torch.randint(0, C, (B,), generator=generator)
    arguments = head.embed(x).detach().numpy(), head.prototypes.numpy(), head.assignment.tolist()
    return head, x, labels, arguments


@given(seed=st.integers(0, 200), train_output=st.sampled_from(['logits', 'embeddings']), training=st.booleans())
@settings(max_examples=40, deadline=None)
def test_squared_cosine_is_the_papers(seed, train_output, training):
    head, x, labels, (embeddings, prototypes, assignment) = setting(seed, train_output)
    output = head.train(training)(x)
    expected = reference.squared_cosine_loss(embeddings, labels.numpy(), prototypes, assignment)
    paper = SquaredCosineLoss(head, reduction='sum', weight=1.0)
    assert paper(output, labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert SquaredCosineLoss(head)(output, labels).item() == pytest.approx(30 * expected / B, rel=1e-4, abs=1e-5)
    each = SquaredCosineLoss(head, reduction='none', weight=1.0)(output, labels)
    assert each.shape == (B,) and each.sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    soft = torch.rand(B, C, generator=torch.Generator().manual_seed(seed))
    expected = reference.squared_cosine_loss(embeddings, soft.numpy(), prototypes, assignment)
    assert paper(output, soft).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(seed=st.integers(0, 200), train_output=st.sampled_from(['logits', 'embeddings']), lam=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_dot_regression_is_the_papers(seed, train_output, lam):
    head, x, labels, (embeddings, prototypes, assignment) = setting(seed, train_output)
    output, criterion = head(x), DotRegressionLoss(head)
    expected = reference.dot_regression_loss(embeddings, labels.numpy(), prototypes, assignment)
    assert criterion(output, labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # timm mixes a batch with its own reverse; smoothing is taken out.
    one_hot = torch.nn.functional.one_hot(labels, C).float()
    mixed = lam * one_hot + (1 - lam) * one_hot.flip(0)
    expected = reference.mixed_dot_regression_loss(
        embeddings, labels.numpy(), labels.flip(0).numpy(), lam, prototypes, assignment)
    for smoothing in (0.0, 0.1):
        soft = mixed * (1 - smoothing) + smoothing / C
        assert criterion(output, soft).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_each_class_present_weighs_the_same_in_dot_regression():
    head, x, _, _ = setting(0)
    labels = torch.tensor([0] * 7 + [1, 2])
    each = DotRegressionLoss(head, reduction='none')(head(x), labels)
    cosines = head.cosines(head.embed(x)).gather(1, labels.view(-1, 1)).squeeze(1)
    weights = each / (0.5 * (1 - cosines) ** 2)
    assert torch.allclose(weights, torch.tensor([B / 3 / 7] * 7 + [B / 3] * 2), rtol=1e-3)


@pytest.mark.parametrize('loss', [SquaredCosineLoss, DotRegressionLoss])
@pytest.mark.parametrize('soft', [False, True])
def test_logits_and_embeddings_give_the_same_gradients(loss, soft):
    gradients = []
    for train_output in ('logits', 'embeddings'):
        torch.manual_seed(0)
        head, x, labels, _ = setting(3, train_output)
        targets = torch.nn.functional.one_hot(labels, C).float() * 0.6 + 0.4 / C if soft else labels
        loss(head)(head(x), targets).backward()
        gradients.append(head.neck.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-5)


def test_output_is_never_guessed_from_its_shape():
    """d = C: only the head's setting and mode tell embeddings from logits."""
    for train_output in ('logits', 'embeddings'):
        torch.manual_seed(0)
        head = DL2PAHead(5, 6, 6, neck='linear', train_output=train_output, scale=3.0)
        x, labels = torch.randn(4, 5), torch.arange(4)
        values = [SquaredCosineLoss(head.train(training))(head(x), labels) for training in (True, False)]
        assert torch.allclose(*values, atol=1e-5)


@pytest.mark.parametrize('loss', [SquaredCosineLoss, DotRegressionLoss])
def test_in_float32_under_autocast(loss):
    head, x, labels, _ = setting(1, 'embeddings')
    output = head(x)
    soft = torch.nn.functional.one_hot(labels, C).float()
    for targets in (labels, soft, soft.half()):
        with torch.autocast('cpu', torch.bfloat16):
            value = loss(head)(output, targets)
        assert value.dtype == torch.float32
        assert torch.allclose(value, loss(head)(output, labels if targets is labels else soft), atol=1e-6)


def test_hard_targets_cost_nothing_over_all_classes():
    head = DL2PAHead(5, 5000, 4, train_output='embeddings',
                     prototypes=torch.nn.functional.normalize(torch.randn(5000, 4)))
    x, labels, criterion = torch.randn(8, 5), torch.randint(0, 5000, (8,)), SquaredCosineLoss(head)
    with LargestOutput() as seen:
        criterion(head(x), labels).backward()
    assert seen.largest <= 8 * 5


def test_compiles():
    torch._dynamo.reset()
    head, x, labels, _ = setting(2, 'embeddings')
    for criterion in (SquaredCosineLoss(head), DotRegressionLoss(head)):
        compiled = torch.compile(lambda x, y, c=criterion: c(head(x), y), fullgraph=True, backend='aot_eager')
        assert torch.allclose(compiled(x, labels), criterion(head(x), labels))


def test_the_head_is_not_a_part_of_the_loss():
    head, x, labels, _ = setting(2)
    criterion = SquaredCosineLoss(head)
    assert not list(criterion.parameters()) and not criterion.state_dict()
    both = copy.deepcopy((head, criterion))
    both[0].assign(both[0].assignment.flip(0))
    assert torch.allclose(both[1](both[0](x), labels), SquaredCosineLoss(both[0])(both[0](x), labels))
    assert 'weight=30' in repr(criterion)


def test_errors():
    head, x, labels, _ = setting(0)
    with pytest.raises(TypeError, match=r'head must be a DL2PAHead, not Linear.*get_classifier'):
        SquaredCosineLoss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no gradient: make the head with learn_scale=False'):
        DotRegressionLoss(DL2PAHead(5, C, D, learn_scale=True))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, not 'max'"):
        SquaredCosineLoss(head, reduction='max')
    criterion = SquaredCosineLoss(head)
    with pytest.raises(ValueError, match=rf'logits \(B, {C}\) that the head returns now, not \({B}, {D}\)'):
        criterion(head.embed(x), labels)
    with pytest.raises(ValueError, match='not tuple'):
        criterion((head(x), head(x)), labels)
    with pytest.raises(ValueError, match='must be class indices'):
        criterion(head(x), labels.float())
    for train_output in ('logits', 'embeddings'):
        head, x, labels, _ = setting(0, train_output)
        for loss in (SquaredCosineLoss, DotRegressionLoss):
            assert torch.equal(loss(head)(head(x), labels.to(torch.uint8)), loss(head)(head(x), labels))
            for bad in (-1, C):
                with pytest.raises((IndexError, RuntimeError), match='out of'):
                    loss(head)(head(x), labels.clone().fill_(bad))
    head, x, labels, _ = setting(0)
    with pytest.raises(ValueError, match=rf'class indices \({B},\)'):
        criterion(head(x), labels[:-1])


@pytest.mark.timm
def test_any_timm_criterion_trains():
    import timm.loss
    torch.manual_seed(0)
    hard, soft = torch.randint(0, C, (B,)), torch.softmax(torch.randn(B, C), 1)
    cases = [(timm.loss.LabelSmoothingCrossEntropy(0.1), hard), (timm.loss.BinaryCrossEntropy(), hard),
             (timm.loss.SoftTargetCrossEntropy(), soft), (torch.nn.CrossEntropyLoss(), soft)]
    for criterion, targets in cases:
        head, x, _, _ = setting(0)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
        values = []
        for _ in range(3):
            value = criterion(head(x), targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[2] < values[0] and np.isfinite(values).all(), criterion


@pytest.mark.parametrize('soft', [False, True])
def test_balanced_softmax_adds_the_logarithm_of_the_counts(soft):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(B, C, generator=generator), torch.randint(0, C, (B,), generator=generator)
    targets = torch.rand(B, C, generator=generator).softmax(dim=1) if soft else labels
    counts = torch.tensor([90, 30, 10, 3, 2, 1])
    weighted = counts * logits.exp()
    log_shares = (weighted / weighted.sum(dim=1, keepdim=True)).log()
    each = -(targets * log_shares).sum(dim=1) if soft else -log_shares[torch.arange(B), labels]
    assert torch.allclose(BalancedSoftmaxLoss(C, counts, reduction='none')(logits, targets), each, atol=1e-5)
    assert BalancedSoftmaxLoss(C, counts)(logits.half(), targets).item() == pytest.approx(each.mean().item(), rel=1e-2)
    equal = torch.nn.functional.cross_entropy(logits, targets)
    assert BalancedSoftmaxLoss(C, torch.full((C,), 7))(logits, targets).item() == pytest.approx(equal.item(), rel=1e-5)


def test_balanced_softmax_counts_in_training_alone():
    criterion, logits = BalancedSoftmaxLoss(3), torch.zeros(4, 3)
    criterion(logits, torch.tensor([0, 0, 0, 1]))
    assert criterion.class_counts.tolist() == [4, 2, 1]
    with torch.no_grad():
        criterion(logits, torch.tensor([2, 2, 2, 2]))
    criterion(logits, torch.tensor([[0.25, 0.75, 0.0]]).repeat(4, 1))
    assert criterion.class_counts.tolist() == [5, 5, 1]
    again = BalancedSoftmaxLoss(3)
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again.class_counts, criterion.class_counts)
    given_counts = BalancedSoftmaxLoss(3, torch.tensor([2, 1, 1]))
    given_counts(logits, torch.tensor([2, 2, 2, 2]))
    assert given_counts.class_counts.tolist() == [2, 1, 1]


@pytest.mark.parametrize('counts', [[1, 2], [1, 0, 2], [1, float('nan'), 2]])
def test_balanced_softmax_refuses_counts(counts):
    with pytest.raises(ValueError, match='class_counts must be 3 positive numbers'):
        BalancedSoftmaxLoss(3, torch.tensor(counts))


def test_balanced_softmax_refuses_shapes():
    for logits, targets, message in ((torch.zeros(2, 4), torch.zeros(2), 'logits must be'),
                                     (torch.zeros(2, 3), torch.zeros(3), 'targets must be')):
        with pytest.raises(ValueError, match=message):
            BalancedSoftmaxLoss(3)(logits, targets.long())
    with pytest.raises(ValueError, match='reduction must be one of'):
        BalancedSoftmaxLoss(3, reduction='sums')


@pytest.mark.parametrize('kind', [SquaredCosineLoss, DotRegressionLoss, BalancedSoftmaxLoss])
@pytest.mark.parametrize('soft', [False, True])
def test_outputs_and_targets_of_different_subclasses(make_head, generator, kind, soft):
    """As fastai's TensorImage and TensorCategory."""
    class Image(torch.Tensor):
        pass

    class Category(torch.Tensor):
        pass

    head = make_head()
    criterion = kind(7) if kind is BalancedSoftmaxLoss else kind(head)
    output, labels = head(torch.randn(5, 12, generator=generator)), torch.arange(5)
    targets = torch.nn.functional.one_hot(labels, 7).float() if soft else labels
    loss = criterion(output.as_subclass(Image), targets.as_subclass(Category))
    criterion = kind(7) if kind is BalancedSoftmaxLoss else criterion
    assert type(loss) is torch.Tensor and torch.equal(loss, criterion(output, targets))
