"""The classes of a batch and a sample of the others: distinct, weighed so that sums over all classes are estimated."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.largest_output import LargestOutput
from timm_dl2pa.head import ClassSampler


@given(num_classes=st.integers(2, 60), num_sampled=st.integers(1, 80), seed=st.integers(0, 5), data=st.data())
@settings(max_examples=80, deadline=None)
def test_each_class_is_in_once_and_the_others_stand_for_all_others(num_classes, num_sampled, seed, data):
    labels = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), max_size=9)), dtype=torch.int64)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))),
                        dtype=torch.bool)
    sampler = ClassSampler(num_classes, num_sampled, seed)
    for _ in range(3):
        classes, log_weights, rows = sampler(labels, kept)
        drawn = classes[len(labels):].tolist()
        assert torch.equal(classes[:len(labels)][kept], labels[kept])
        assert len(drawn) == len(set(drawn)) == min(num_sampled, num_classes) and set(drawn) <= set(range(num_classes))
        weights = log_weights.exp()
        counted = classes[weights > 0].tolist()
        present = set(labels[kept].tolist())
        assert torch.equal(classes[rows], classes) and (weights[rows] > 0).all()
        assert weights[:len(labels)][weights[:len(labels)] > 0].eq(1).all()
        if set(drawn) - present:
            assert float(weights.sum()) == pytest.approx(num_classes, rel=1e-5)
        if num_sampled >= num_classes:
            assert sorted(counted) == list(range(num_classes)) and torch.allclose(weights[weights > 0], torch.ones(1))
    assert sampler.step == 3


def test_classes_are_sampled_equally_often_alone_and_in_pairs():
    sampler, counts, pairs = ClassSampler(20, 5), torch.zeros(20), torch.zeros(20, 20)
    for step in range(4000):
        drawn = sampler.classes_of(torch.tensor(step))
        counts[drawn] += 1
        pairs[drawn[0], drawn[1]] += 1
    assert (counts - 1000).abs().max() < 150
    assert (pairs > 0).sum() > 100  # neighbours in the order of classes are not sampled together


def test_the_sample_is_that_of_seed_and_step():
    """So it is on every rank, and after a resume; copies go on alone; no global random state."""
    labels, state = torch.tensor([3, 5, 3]), torch.get_rng_state()
    first, again, other = (ClassSampler(1000, 20, seed) for seed in (4, 4, 5))
    for _ in range(3):
        sample = first(labels)
        assert torch.equal(sample.classes, again(torch.tensor([7, 8, 9])).classes.index_copy(
            0, torch.arange(3), labels)) and not torch.equal(sample.classes, other(labels).classes)
    assert not torch.equal(first.classes_of(torch.tensor(0)), first.classes_of(torch.tensor(1)))
    resumed = ClassSampler(1000, 20, 4)
    resumed.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ['step'] and torch.equal(resumed(labels).classes, first(labels).classes)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_of_the_size_of_all_classes():
    with LargestOutput() as seen:
        sampler = ClassSampler(10 ** 7, 300)
        sampler(torch.randint(0, 10 ** 7, (32,)))
    assert seen.largest <= 1024


def test_a_sum_over_all_classes_is_estimated_without_bias():
    terms = torch.randn(200, generator=torch.Generator().manual_seed(0)).exp()
    labels, sampler = torch.tensor([5, 5, 9, 140]), ClassSampler(200, 20)
    sums = torch.stack([(log_weights.exp() * terms[classes]).sum()
                        for classes, log_weights, _ in (sampler(labels) for _ in range(4000))])
    error = sums.std() / math.sqrt(len(sums))
    assert sums.std() > 20 and abs(sums.mean() - terms.sum()) < 4 * error
