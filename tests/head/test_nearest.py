"""The nearest classes are those of the full (N, C) cosines, which are never made."""
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.largest_output import LargestOutput
from timm_dl2pa import AssignmentScheduler, DL2PAHead
from timm_dl2pa.head import nearest

D = 5


def head_of(num_classes, spare=3):
    generator = torch.Generator().manual_seed(num_classes)
    points = nn.functional.normalize(torch.randn(num_classes + spare, D, generator=generator))
    with torch.random.fork_rng(devices=[]):
        head = DL2PAHead(6, num_classes, D, neck='linear', prototypes=points)
    head.assign(torch.randperm(num_classes + spare, generator=generator)[:num_classes])
    return head.eval()


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])), dim=-1)


@pytest.fixture(scope='module')
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, '_ROWS', 4)
        patch.setattr(nearest, '_CLASSES', 7)
        yield


@given(num_classes=st.sampled_from([2, 6, 7, 8, 14, 40]), rows=st.integers(0, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_they_are_those_of_all_cosines(small_blocks, num_classes, rows, data):
    k = data.draw(st.integers(1, num_classes))
    head, embeddings = head_of(num_classes), unit(rows, D)
    expected, classes = head.cosines(embeddings).topk(k, dim=1)
    found = head.nearest(embeddings, k)
    assert found[0].dtype == torch.float32 and torch.allclose(found[0], expected, atol=1e-6)
    assert torch.equal(found[1], classes) and found[1].shape == (rows, k)


def test_no_matrix_of_all(small_blocks):
    head, embeddings = head_of(3000), unit(200, D)
    with LargestOutput() as seen:
        head.nearest(embeddings, 3)
    assert seen.largest <= 200 * D


def test_in_float32_and_without_gradients():
    head, embeddings = head_of(40), unit(6, D).requires_grad_()
    expected = head.nearest(embeddings, 4)
    with torch.autocast('cpu', torch.bfloat16):
        found = head.nearest(embeddings, 4)
    assert torch.equal(found[0], expected[0]) and not found[0].requires_grad
    assert head.nearest(embeddings.bfloat16(), 4)[0].dtype == torch.float32


def test_in_training_mode_a_warmup_stands_in_as_in_the_cosines():
    head = head_of(7).train()
    head.scheduler = AssignmentScheduler(head, interval=9, warmup='rotated')
    head(torch.randn(7, 6)), head.scheduler.step(torch.arange(7))
    embeddings = unit(9, D)
    assert torch.equal(head.nearest(embeddings)[1].squeeze(1), head.cosines(embeddings).argmax(dim=1))
    in_training = head.nearest(embeddings, 7)[0]
    in_evaluation = head.eval().nearest(embeddings, 7)[0]
    assert torch.allclose(in_evaluation, head.cosines(embeddings).sort(dim=1, descending=True)[0])
    assert not torch.allclose(in_evaluation, in_training)


def test_an_average_of_heads_is_settled_first():
    head = head_of(8)
    expected = head.nearest(unit(5, D), 2)
    head.prototypes.mul_(0.5)
    assert torch.allclose(head.nearest(unit(5, D), 2)[0], expected[0], atol=1e-6)


@pytest.mark.parametrize('embeddings, k, message', [
    (unit(3, D + 1), 1, r'embeddings must be floats \(N, 5\), as embed returns them, not .* of the shape \(3, 6'),
    (unit(D), 1, 'embeddings must be floats'), ([[1.0] * D], 1, 'not list'),
    (torch.ones(3, D, dtype=torch.int64), 1, 'not torch.int64'), (unit(3, D), 0, 'k must be from 1 to 7, not 0'),
    (unit(3, D), 8, 'k must be from 1 to 7, not 8'), (unit(3, D), 2.0, 'k must be a whole number')])
def test_what_is_refused(embeddings, k, message):
    with pytest.raises(ValueError, match=message):
        head_of(7).nearest(embeddings, k)
