import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dl2pa import make_prototypes, prototype_quality
from timm_dl2pa.prototypes import energy, optimise

# (K, d): the maximal cosine of codes that are proven optimal, or the best known: the icosahedron, the snub cube (its
# cosine is the root of 7 s^3 + s^2 - 3 s - 1 near 0.72), the 24-cell, and the sharp ones of Levenshtein.
OPTIMAL = {(12, 3): 5 ** -0.5, (24, 3): 0.7230784968, (24, 4): 0.5, (16, 5): 0.2, (27, 6): 0.25, (56, 7): 1 / 3,
           (240, 8): 0.5}


@pytest.mark.slow
@pytest.mark.parametrize('size', OPTIMAL)
def test_finds_optimal_codes(size):
    # The roots of E8 are found in one of many starts, and the search ends there; the others are found at once.
    points = make_prototypes(*size, objective='separated', effort=0.3 if size == (240, 8) else 0.05)
    assert prototype_quality(points).max_cosine == pytest.approx(OPTIMAL[size], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('size, most', [
    ((100, 5), 0.6875), ((100, 10), 0.3406), ((100, 16), 0.2000001), ((100, 32), 0.078)])
def test_well_separated_in_seconds(size, most):
    """Already with a twentieth of the work, below what a single careful descent by hand reaches."""
    assert prototype_quality(make_prototypes(*size, objective='separated', effort=0.05)).max_cosine <= most


def numeric_gradient(function, points, step=1e-6):
    gradient = np.zeros_like(points)
    for index in np.ndindex(points.shape):
        moved = points.copy()
        moved[index] += step
        up = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (up - function(moved)) / (2 * step)
    return gradient


@given(num=st.integers(2, 9), dim=st.integers(2, 4), beta=st.floats(0.5, 30), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_energy_and_gradient(num, dim, beta, seed):
    points = np.random.default_rng(seed).standard_normal((num, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)

    def plain(points):
        first, second = np.triu_indices(num, 1)
        return np.log(np.mean(np.exp(beta * (np.sum(points[first] * points[second], axis=1) - 1))))

    found, gradient = energy.pair_energy(torch.from_numpy(points), beta)
    assert found == pytest.approx(plain(points), rel=1e-9, abs=1e-9)
    assert np.allclose(gradient.numpy(), numeric_gradient(plain, points), atol=1e-5 * beta)


def test_high_temperatures_do_not_underflow_and_blocks_agree(monkeypatch):
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 5)))
    points /= points.norm(dim=1, keepdim=True)
    whole = energy.pair_energy(points, 1e6)
    monkeypatch.setattr(energy, '_BLOCK_ENTRIES', 40 * 7)
    value, gradient = energy.pair_energy(points, 1e6)
    assert np.isfinite(value) and value == pytest.approx(whole[0], rel=1e-12)
    assert torch.allclose(gradient, whole[1], rtol=1e-10)
    cosines = points @ points.T
    assert 1 + value / 1e6 == pytest.approx(cosines.fill_diagonal_(-1).max().item(), abs=1e-4)


@pytest.mark.parametrize('num, dim', [(20, 6), (21, 6), (21, 7), (50, 12)])
def test_symmetric_starts_are_orbits_and_their_gradient_is_the_whole_sets(num, dim):
    generator = np.random.default_rng(3)
    for _ in range(8):
        start = optimise._random_start(num, dim, generator, symmetric=True)
        assert start.powers is not None
        unit = start.representatives / np.linalg.norm(start.representatives, axis=1, keepdims=True)
        start = optimise._Orbits(unit, start.powers, start.fixed)
        points = start.points()
        assert points.shape == (num, dim) and np.allclose(np.linalg.norm(points, axis=1), 1)
        # The rotation moves the set onto itself.
        distances = np.linalg.norm((points @ start.powers[1])[:, None] - points[None], axis=2)
        assert distances.min(axis=1).max() < 1e-9
        value, gradient = energy.pair_energy(torch.from_numpy(points), 7.0)
        short, part = energy.pair_energy(torch.from_numpy(points), 7.0, torch.from_numpy(start.sizes))
        assert short == pytest.approx(value, rel=1e-12)
        rows = gradient[:len(unit)] * torch.from_numpy(start.sizes).unsqueeze(1)
        assert torch.allclose(part, rows, atol=1e-12)


def test_a_given_start_is_never_made_worse():
    code = make_prototypes(24, 4, method='kerdock').double().numpy()
    found = optimise.optimise(24, 4, 'separated', 0, starts=[code], effort=1e-4)
    cosines = found @ found.T
    np.fill_diagonal(cosines, -1)
    assert cosines.max() <= 0.5 + 1e-7


def test_sgd_is_the_recipe():
    """Against autograd and torch's own SGD."""
    x = torch.from_numpy(np.random.default_rng(2).uniform(-1, 1, (12, 3))).float()
    x = torch.nn.Parameter(x / x.norm(dim=1, keepdim=True))
    sgd = torch.optim.SGD([x], lr=0.1)
    for _ in range(30):
        sgd.zero_grad()
        torch.pdist(torch.nn.functional.normalize(x)).pow(2).mul(-2).exp().mean().log().backward()
        sgd.step()
    expected = torch.nn.functional.normalize(x.detach())
    assert torch.allclose(torch.from_numpy(optimise.sgd_recipe(12, 3, 2, epochs=30)), expected, atol=1e-4)


def test_a_gpu_does_no_more_than_it_can_in_its_time():
    """An evaluation takes it a millisecond whatever the size: small sets are left to the CPU, as none is there."""
    affordable = optimise.affordable_evaluations
    assert optimise.device_of_evaluations(100, 10, 'cuda').type == 'cpu'
    assert affordable(100, 10, device='cuda') == affordable(100, 10)
    assert optimise.device_of_evaluations(1000, 50, 'cuda').type == 'cuda'
    assert affordable(1000, 50, device='cuda') * 5e8 < 100 * 2e11  # half a minute, of a millisecond each
    assert affordable(20_000, 128, device='cuda') > 90 * affordable(20_000, 128)
    points = make_prototypes(12, 3, objective='separated', method='optimise', device='cuda', effort=0.01)
    assert prototype_quality(points).max_cosine < 0.45
