import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import reference
from tests.helpers.largest_output import LargestOutput
from timm_dl2pa import ClassMeans
from timm_dl2pa.scheduling.class_means import MovingClassMeans

C, D = 6, 4


def unit(rows, seed=0):
    points = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=1, keepdim=True)


def mixup(labels_a, labels_b, lam, smoothing=0.0):
    """What timm.data.mixup.mixup_target makes: (B, C) float32."""
    off = smoothing / C
    on = 1 - smoothing + off
    one_hot = [torch.full((len(labels), C), off).scatter_(1, labels.view(-1, 1), on) for labels in (labels_a, labels_b)]
    return one_hot[0] * lam + one_hot[1] * (1 - lam)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_under_any_split_into_batches(data):
    rows = data.draw(st.integers(1, 40))
    soft = data.draw(st.booleans())
    labels = torch.tensor(data.draw(st.lists(st.integers(0, C - 1), min_size=rows, max_size=rows)))
    targets = mixup(labels, labels.flip(0), data.draw(st.sampled_from([0.5, 0.3, 1.0]))) if soft else labels
    embeddings = unit(rows)
    cuts = sorted(data.draw(st.sets(st.integers(0, rows), max_size=5)))
    means = ClassMeans(C, D)
    for part, share in zip(torch.tensor_split(embeddings, cuts), torch.tensor_split(targets, cuts)):
        means.add(part, share)
    means.check()
    shares = targets if soft else torch.nn.functional.one_hot(labels, C)
    expected = reference.class_means([(embeddings.numpy(), shares.numpy())], C, D)
    lengths = np.linalg.norm(shares.numpy().T @ embeddings.double().numpy(), axis=1)
    well_defined = (lengths > 1e-3) | (lengths == 0)  # sums that cancel have a direction of rounding alone
    np.testing.assert_allclose(means.directions().numpy()[well_defined], expected[well_defined], atol=1e-3)


def test_momentum_multiplies_once_a_resolve():
    labels = [torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]), torch.tensor([0, 0, 1])]
    batches = [(unit(3, seed), torch.nn.functional.one_hot(y, C)) for seed, y in enumerate(labels)]
    means = ClassMeans(C, D)
    for number, ((embeddings, _), y) in enumerate(zip(batches, labels), start=1):
        means.add(embeddings, y)
        if number == 2:
            means.decay(0.25)
    expected = reference.class_means(batches, C, D, momentum=0.25, resolve_after={2})
    np.testing.assert_allclose(means.directions().numpy(), expected, atol=1e-6)
    assert not np.allclose(expected, reference.class_means(batches, C, D))


@pytest.mark.parametrize('smoothing', [0.1, 0.5])
def test_label_smoothing_moves_nothing(smoothing):
    a, b, embeddings = torch.randint(0, C, (50,)), torch.randint(0, C, (50,)), unit(50)
    plain, smoothed = ClassMeans(C, D), ClassMeans(C, D)
    plain.add(embeddings, mixup(a, b, 0.7))
    smoothed.add(embeddings, mixup(a, b, 0.7, smoothing))
    assert torch.allclose(plain.sums, smoothed.sums, atol=1e-5)
    hard = ClassMeans(C, D)
    hard.add(embeddings, a)
    smoothed = ClassMeans(C, D)
    smoothed.add(embeddings, mixup(a, a, 1.0, smoothing))
    assert torch.allclose(hard.sums, smoothed.sums, atol=1e-5)
    nothing = ClassMeans(C, D)
    nothing.add(embeddings, torch.full((50, C), 1 / C))
    assert torch.equal(nothing.sums, torch.zeros(C, D))


def test_real_timm_mixup():
    timm_data = pytest.importorskip('timm.data')
    labels = torch.arange(8) % C
    _, soft = timm_data.Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=C)(torch.rand(8, 3, 4, 4), labels)
    means, embeddings = ClassMeans(C, D), unit(8)
    means.add(embeddings, soft)
    # All weight is on a sample's two classes, and in all it is 1.
    shares = (soft - soft.amin(1, keepdim=True)) / 0.9
    assert torch.allclose(means.sums, shares.T @ embeddings, atol=1e-5)


def test_dtypes_of_targets():
    embeddings = unit(3)
    expected = ClassMeans(C, D)
    expected.add(embeddings, torch.tensor([0, 1, 2]))
    for targets in (torch.tensor([0, 1, 2], dtype=torch.int32), torch.eye(C)[:3].half(), torch.eye(C)[:3].bfloat16(),
                    torch.eye(C, dtype=torch.long)[:3]):
        means = ClassMeans(C, D)
        means.add(embeddings, targets)
        assert torch.equal(means.sums, expected.sums)


@pytest.mark.parametrize('bad', [-1, C, -99, 10 ** 9])
def test_labels_out_of_range_are_named(bad):
    means = ClassMeans(C, D)
    means.add(unit(3), torch.tensor([0, bad, 2]))
    with pytest.raises(ValueError, match=rf'class {bad}, outside 0\.\.{C - 1}'):
        means.check()


@pytest.mark.parametrize('poison', [float('nan'), float('inf')])
def test_values_not_finite_are_named_by_class(poison):
    embeddings = unit(3)
    embeddings[1, 2] = poison
    means = ClassMeans(C, D)
    means.add(embeddings, torch.tensor([0, 4, 2]))
    with pytest.raises(ValueError, match='class 4 were not finite'):
        means.check()
    soft = ClassMeans(C, D)
    soft.add(embeddings, mixup(torch.tensor([0, 4, 2]), torch.tensor([0, 4, 2]), 1.0))
    with pytest.raises(ValueError, match='class 4 were not finite'):
        soft.check()
    targets = torch.eye(C)[:3]
    targets[2, 2] = float('nan')
    soft = ClassMeans(C, D)
    soft.add(unit(3), targets)
    with pytest.raises(ValueError, match='not finite'):
        soft.check()


@pytest.mark.parametrize('targets, message', [
    (torch.zeros(2, dtype=torch.long), 'for 2 samples, but there are 3'),
    (torch.zeros(3), 'class indices'),
    (torch.zeros(3, C + 1), rf'soft targets \(B, {C}\)'),
    (torch.zeros(3, C, 1), 'not of the shape'),
])
def test_shapes_that_do_not_fit(targets, message):
    means = ClassMeans(C, D)
    with pytest.raises(ValueError, match=message):
        means.add(unit(3), targets)
    assert not means.sums.any()


def test_state_round_trip_to_the_bit():
    means, again = ClassMeans(C, D), ClassMeans(C, D)
    means.add(unit(9), torch.arange(9) % C)
    state = means.state_dict()
    again.load_state_dict(state)
    means.add(unit(9), torch.arange(9) % C)  # the state is a copy
    again.add(unit(9), torch.arange(9) % C)
    assert torch.equal(means.sums, again.sums)
    with pytest.raises(ValueError, match=r'shape \(6, 4\), not \(6, 5\)'):
        ClassMeans(C, D + 1).load_state_dict(state)


def test_no_work_over_all_classes_with_hard_labels():
    means = ClassMeans(100_000, D)
    embeddings, labels = unit(8), torch.randint(0, 100_000, (8,))
    with LargestOutput() as seen:
        means.add(embeddings, labels)
    assert seen.largest <= 8 * D
    soft = ClassMeans(1000, D)
    targets = torch.rand(8, 1000)
    with LargestOutput() as seen:
        soft.add(embeddings, targets)
    assert seen.largest <= 8 * 1000


@pytest.mark.parametrize('soft', [False, True])
def test_never_waits_for_the_device(soft):
    """On the meta device there are no values: anything that reads one raises."""
    means = ClassMeans(C, D, device='meta')
    targets = torch.empty(8, C, device='meta') if soft else torch.empty(8, dtype=torch.long, device='meta')
    means.add(torch.empty(8, D, device='meta'), targets)
    with pytest.raises(Exception):  # noqa: B017 - the test of the test: reading does raise
        means.check()


# --- running means


def test_running_means_forget_by_samples_and_are_seen_from_their_centre():
    running = MovingClassMeans(3, 2, memory=0.5)
    running.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
    running.add(torch.tensor([[0.6, 0.8]]), torch.tensor([0]))
    # Class 0: half of the old sample and one new one. Class 1 had none, and stays.
    means = torch.tensor([[(0.5 + 0.6) / 1.5, 0.8 / 1.5], [0.0, 1.0]])
    expected = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    found = running.centred_directions()
    assert torch.allclose(found[:2], expected, atol=1e-6) and not found[2].any()
    assert running.counts.tolist() == [1.5, 2.0, 0.0]


def test_running_means_of_soft_targets_and_of_a_saved_state():
    x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
    hard, soft = MovingClassMeans(3, 4), MovingClassMeans(3, 4)
    hard.add(x, labels)
    soft.add(x, torch.nn.functional.one_hot(labels, 3).float())
    assert torch.allclose(hard.centred_directions(), soft.centred_directions(), atol=1e-6)
    mixed = MovingClassMeans(3, 4)
    mixed.add(x[:1], torch.tensor([[0.75, 0.25, 0.0]]))
    assert torch.allclose(mixed.sums, torch.tensor([[0.75], [0.25], [0.0]]) * x[:1])
    state = hard.state_dict()
    after = MovingClassMeans(3, 4)
    after.load_state_dict(state)
    hard.add(x, labels)
    assert torch.equal(state['sums'], after.sums) and not torch.equal(state['sums'], hard.sums)


def test_embeddings_that_are_not_pooled_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 9, 2\), not one for each sample: .*global_pool than ''"):
        ClassMeans(3, 2).add(torch.zeros(4, 9, 2), torch.zeros(4, dtype=torch.long))
