import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from tests.helpers import reference
from timm_dl2pa import align_prototypes, make_prototypes, solve_assignment
from timm_dl2pa.assignment import check_assignment


@st.composite
def score_matrices(draw, most=12):
    num_classes = draw(st.integers(1, most))
    shape = (num_classes, num_classes + draw(st.integers(0, 3)))
    # Integers make ties, equal rows and zero rows common.
    elements = draw(st.sampled_from([st.integers(-3, 3), st.floats(-1e6, 1e6), st.floats(-1e-6, 1e-6)]))
    return draw(arrays(np.float64, shape, elements=elements))


@given(scores=score_matrices(), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_equals_scipys_optimum_from_any_start(scores, seed):
    start = np.random.default_rng(seed).permutation(scores.shape[1])[:len(scores)]
    result = solve_assignment(scores, start=start)
    check_assignment(result.assignment, *scores.shape)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    optimum = scores[rows, columns].sum()
    tolerance = 2e-12 * np.abs(scores[rows, columns]).sum()
    assert abs(result.objective - optimum) <= tolerance + 1e-12 * np.abs(scores).max()
    assert result.objective == pytest.approx(scores[rows, result.assignment.numpy()].sum(), rel=1e-12, abs=1e-300)
    assert result.objective_before == pytest.approx(scores[rows, start].sum(), rel=1e-12, abs=1e-300)
    assert result.objective >= result.objective_before
    assert result.moved == int((result.assignment.numpy() != start).sum())


@given(scores=score_matrices(most=5))
@settings(max_examples=30, deadline=None)
def test_equals_trying_all(scores):
    best = reference.best_objective(scores)
    assert solve_assignment(scores).objective == pytest.approx(best, rel=1e-8, abs=1e-12)


def test_small_gains_on_large_scores_count():
    assert solve_assignment([[1e6, 1e6 + 5e-4], [1e6 + 5e-4, 1e6]]).assignment.tolist() == [1, 0]


def test_the_smallest_numbers_count():
    assert solve_assignment([[0.0, 5e-324]]).assignment.tolist() == [1]


def test_means_and_prototypes_are_scores():
    prototypes = make_prototypes(30, 8)
    means = torch.randn(25, 8, generator=torch.Generator().manual_seed(0))
    by_means = solve_assignment(class_means=means, prototypes=prototypes)
    by_scores = solve_assignment(means.double() @ prototypes.double().T)
    assert torch.equal(by_means.assignment, by_scores.assignment)
    assert by_means.objective == pytest.approx(by_scores.objective)


def test_recovers_a_planted_assignment():
    prototypes = make_prototypes(50, 10)
    planted = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    noise = 0.05 * torch.randn(50, 10, generator=torch.Generator().manual_seed(2))
    result = solve_assignment(class_means=prototypes[planted] + noise, prototypes=prototypes)
    assert torch.equal(result.assignment, planted)


def test_optimal_start_moves_nothing_despite_ties():
    scores = np.ones((6, 6)) + np.eye(6)
    scores[2] = scores[3]  # both want prototype 3
    start = solve_assignment(scores).assignment
    swapped = start.clone()
    swapped[[2, 3]] = start[[3, 2]]
    for assignment in (start, swapped):
        assert solve_assignment(scores, start=assignment).moved == 0
    assert solve_assignment(np.zeros((6, 6)), start=start.flip(0)).moved == 0


def test_unseen_classes_keep_their_prototypes_unless_taken():
    prototypes = make_prototypes(8, 7)
    means = torch.zeros(8, 7)
    means[0] = prototypes[3]      # wants what class 3 has, which was not seen
    means[1] = prototypes[1]
    result = solve_assignment(class_means=means, prototypes=prototypes)
    assert result.assignment.tolist() == [3, 1, 2, 0, 4, 5, 6, 7]
    assert result.objective == pytest.approx(2)
    # With a spare prototype class 3 goes there or to the one that class 0 left; nobody else moves.
    spare = solve_assignment(class_means=means, prototypes=make_prototypes(9, 8)[:, :7])
    assert spare.assignment[[2, 4, 5, 6, 7]].tolist() == [2, 4, 5, 6, 7]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs(dtype):
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = solve_assignment(scores.double())
    assert torch.equal(solve_assignment(scores).assignment, expected.assignment)


@pytest.mark.parametrize('arguments, message', [
    (dict(), 'either scores'),
    (dict(scores=torch.zeros(2, 2), class_means=torch.zeros(2, 2)), 'either scores'),
    (dict(class_means=torch.zeros(2, 2)), 'either scores'),
    (dict(scores=torch.zeros(3, 2)), '3 classes need as many prototypes'),
    (dict(scores=torch.zeros(4)), 'scores must have two dimensions'),
    (dict(scores=torch.tensor([[1., 2.], [float('nan'), 0.]])), 'scores must be finite: row 1'),
    (dict(class_means=torch.zeros(2, 3), prototypes=torch.zeros(2, 4)), 'same dimension'),
    (dict(scores=torch.zeros(2, 2), start=[0, 0]), 'classes 0 and 1 share the prototype 0'),
    (dict(scores=torch.zeros(2, 2), start=[0, 2]), 'class 1 the prototype 2, outside 0..1'),
    (dict(scores=torch.zeros(2, 2), start=[0]), 'shape'),
    (dict(scores=torch.zeros(2, 2), start=[0.0, 1.0]), 'whole numbers'),
])
def test_errors_name_the_trouble(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_assignment(**arguments)


def test_a_rotation_of_too_many_is_refused_before_allocating():
    means, prototypes = torch.zeros(100_000, 2), torch.ones(100_000, 2)
    with pytest.raises(ValueError, match=r"75 GiB of scores.*warmup='none'"):
        align_prototypes(means, prototypes)
