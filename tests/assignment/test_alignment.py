import numpy as np
import pytest
import torch

from timm_dl2pa import align_prototypes, make_prototypes, solve_assignment
from timm_dl2pa.assignment import alignment


def rotation(dim, seed):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize('num_classes, num_prototypes, dim', [(6, 6, 3), (20, 20, 8), (8, 12, 4)])
def test_finds_a_hidden_rotation_and_permutation(num_classes, num_prototypes, dim):
    points = make_prototypes(num_prototypes, dim, seed=1)
    order = torch.randperm(num_prototypes, generator=torch.Generator().manual_seed(2))[:num_classes]
    means = points[order] @ rotation(dim, 3)
    found = align_prototypes(means, points, restarts=2000)
    assert found.objective == pytest.approx(num_classes, abs=1e-3)
    assert torch.allclose(found.prototypes[found.assignment], means, atol=1e-3)


def test_is_a_rotation_no_worse_than_matching_alone_and_what_it_says():
    generator = torch.Generator().manual_seed(0)
    means, points = torch.randn(15, 5, generator=generator), make_prototypes(18, 5)
    found = align_prototypes(means, points)
    assert torch.allclose(found.prototypes @ found.prototypes.t(), points @ points.t(), atol=1e-5)
    assert found.objective == pytest.approx(float((means * found.prototypes[found.assignment]).sum()), rel=1e-5)
    assert len(set(found.assignment.tolist())) == 15
    matched = solve_assignment(class_means=means, prototypes=points)
    one = align_prototypes(means, points, restarts=1)
    assert matched.objective < one.objective <= found.objective
    # At its end neither turn improves it.
    again = solve_assignment(class_means=means, prototypes=found.prototypes, start=found.assignment)
    assert again.objective == pytest.approx(found.objective, rel=1e-5)
    singular = np.linalg.svd((means.t() @ found.prototypes[found.assignment]).numpy(), compute_uv=False)
    assert singular.sum() == pytest.approx(found.objective, rel=1e-5)


def test_touches_no_random_state_and_repeats():
    means, points = torch.randn(9, 4), make_prototypes(9, 4)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = align_prototypes(means, points, seed=5), align_prototypes(means, points, seed=5)
    assert torch.equal(one.prototypes, two.prototypes) and torch.equal(one.assignment, two.assignment)
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == before_numpy).all()


@pytest.mark.parametrize('means, points, arguments, message', [
    (torch.zeros(3, 4), torch.eye(5), {}, 'same dimension, not 4 and 5'),
    (torch.zeros(6, 5), torch.eye(5), {}, '6 classes need as many prototypes'),
    (torch.full((3, 5), float('nan')), torch.eye(5), {}, 'class_means must be finite: row 0'),
    (torch.zeros(3, 5), torch.eye(5), dict(restarts=0), 'restarts must be at least 1, not 0')])
def test_bad_arguments(means, points, arguments, message):
    with pytest.raises(ValueError, match=message):
        align_prototypes(means, points, **arguments)


def test_restarts_near_the_best_end_find_more_than_restarts_anywhere(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    families = torch.randn(12, 8, generator=generator).repeat(5, 1)
    means, points = torch.randn(60, 8, generator=generator) + 2 * families, make_prototypes(60, 8)
    found = [align_prototypes(means, points, restarts=200, seed=seed).objective for seed in range(3)]
    monkeypatch.setattr(alignment, '_RANDOM_SHARE', 1.0)
    anywhere = [align_prototypes(means, points, restarts=200, seed=seed).objective for seed in range(3)]
    assert min(found) > max(anywhere)
