import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import reference
from timm_dl2pa import make_prototypes, prototype_quality, uniformity
from timm_dl2pa.prototypes import check_prototypes
from timm_dl2pa.prototypes.energy import pair_energy

# (K, d): the energy of the prototypes that the authors published, measured from their files.
PUBLISHED = {(100, 10): -3.45516, (100, 16): -3.71449, (100, 32): -3.92139, (200, 50): -3.92839,
             (100, 84): -4.02941, (200, 100): -4.00481, (100, 3): -2.15313, (100, 5): -2.79586}


def cosines_off_diagonal(points: torch.Tensor) -> torch.Tensor:
    points = points.double()
    cosines = points @ points.T
    return cosines[~torch.eye(len(points), dtype=torch.bool)]


@given(dim=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_simplex_where_it_fits(dim, data):
    num = data.draw(st.integers(2, dim + 1))
    points = make_prototypes(num, dim, seed=data.draw(st.integers(0, 5)))
    assert torch.allclose(cosines_off_diagonal(points), torch.tensor(-1 / (num - 1), dtype=torch.double), atol=1e-6)
    assert points.norm(dim=1).sub(1).abs().max() < 1e-6


def test_polygon_in_the_plane():
    points = make_prototypes(7, 2, seed=3)
    cosines = (points.double() @ points.double().T).sort(dim=1).values
    assert torch.allclose(cosines[:, -2], torch.tensor(np.cos(2 * np.pi / 7)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('size', PUBLISHED)
@pytest.mark.parametrize('seed', [0, 1])
def test_energy_at_most_the_published(size, seed):
    points = make_prototypes(*size, seed=seed)
    assert points.dtype == torch.float32 and points.shape == size
    assert reference.uniformity(points.numpy()) <= PUBLISHED[size]


@pytest.mark.parametrize('size', [(6, 4), (10, 8), (50, 40), (100, 84), (12, 6)])
def test_simplices_are_the_best_with_no_positive_cosine(size):
    num, dim = size
    points, info = make_prototypes(*size, objective='separated', seed=3, return_info=True)
    assert info.method == 'simplices' and info.theorem == 0
    assert abs(cosines_off_diagonal(points).max()) < 1e-6 and points.double().mean(dim=0).norm() < 1e-7
    # Among orthogonal sums of K - d simplices: no other partition of the points has less energy.
    def energy(sizes):
        return sum(k * (k - 1) / 2 * (np.exp(-4 / (k - 1)) - 1) for k in sizes)
    parts = num - dim
    mine = energy([2] * (parts - 1) + [num - 2 * (parts - 1)])
    generator = np.random.default_rng(0)
    for _ in range(50):
        others = 2 + np.bincount(generator.integers(0, parts, num - 2 * parts), minlength=parts)
        assert mine <= energy(others) + 1e-12
    pairs = num * (num - 1) / 2
    assert uniformity(points) == pytest.approx(np.log(np.exp(-4) * (1 + mine / pairs)), abs=1e-6)
    assert prototype_quality(make_prototypes(*size)).energy <= uniformity(points) + 1e-6


@pytest.mark.parametrize('size', [(30, 6), (100, 84)])
def test_is_a_minimum(size):
    """A random small move of all points never lowers the energy by more than second order allows."""
    points = make_prototypes(*size).double().numpy()
    energy = uniformity(points)
    generator = np.random.default_rng(0)
    for _ in range(20):
        moved = points + 1e-3 * generator.standard_normal(points.shape)
        assert uniformity(moved / np.linalg.norm(moved, axis=1, keepdims=True)) > energy - 1e-7


@given(num=st.integers(2, 12), dim=st.integers(2, 6), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_uniformity_is_the_papers(num, dim, seed):
    points = np.random.default_rng(seed).standard_normal((num, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    assert uniformity(points) == pytest.approx(reference.uniformity(points), rel=1e-9, abs=1e-12)


def test_blocks_give_the_same_energy(monkeypatch):
    points = make_prototypes(57, 5).numpy()
    whole = uniformity(points)
    monkeypatch.setattr('timm_dl2pa.prototypes.energy._BLOCK_ENTRIES', 57 * 10)
    assert uniformity(points) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize('size', [(5, 8), (9, 2), (40, 7)])
def test_deterministic_by_seed_and_host_untouched(size):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = make_prototypes(*size, seed=4), make_prototypes(*size, seed=4), make_prototypes(*size, seed=5)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_ignores_default_dtype_and_device():
    expected = make_prototypes(20, 5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'):
            assert torch.equal(make_prototypes(20, 5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_many_points_in_seconds():
    """Far beyond what is optimised: unit, distinct, balanced, and no (K, K) matrix (which would be 80 GB)."""
    points, info = make_prototypes(100_000, 16, return_info=True)
    assert info.method == 'cross_polytopes'
    assert points.norm(dim=1).sub(1).abs().max() < 1e-6
    assert points.mean(dim=0).abs().max() < 1e-3
    assert len(torch.unique(points, dim=0)) == 100_000


@pytest.mark.parametrize('arguments, message', [
    ((0, 3), 'num_prototypes and dim'), ((3, 0), 'num_prototypes and dim'), ((3, 1), 'dim=1 has room for 2')])
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prototypes(*arguments)


@pytest.mark.parametrize('options, message', [
    (dict(objective='even'), "objective must be one of uniform, separated, not 'even'"),
    (dict(method='lattice'), "method must be one of auto, .*not 'lattice'"),
    (dict(method='simplex'), "method='simplex' needs num_prototypes <= dim \\+ 1, not num_prototypes=50 in dim=4"),
    (dict(method='polygon'), 'needs dim=2'),
    (dict(method='simplices'), 'needs dim \\+ 2 <='),
    (dict(method='kerdock'), "method='kerdock' has no code with num_prototypes=50 in dim=4"),
    (dict(effort=0), 'effort must be positive'),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_prototypes(50, 4, **options)


def test_check_prototypes_names_the_row():
    points = make_prototypes(6, 4)
    check_prototypes(points, 6)
    check_prototypes(points.bfloat16(), 6)
    long = points.clone()
    long[4] *= 1.01
    with pytest.raises(ValueError, match=r'row 4 has length 1\.01'):
        check_prototypes(long)
    broken = points.clone()
    broken[2, 1] = float('nan')
    with pytest.raises(ValueError, match='row 2'):
        check_prototypes(broken)
    with pytest.raises(ValueError, match='7 classes need'):
        check_prototypes(points, 7)
    with pytest.raises(ValueError, match=r'shape \(K, d\)'):
        check_prototypes(points[0])


# --- 'quick': what a head begins with


@pytest.fixture
def small_budget(monkeypatch):
    """A work budget that sizes of some hundred points exceed, as those of a thousand exceed the real one."""
    monkeypatch.setattr('timm_dl2pa.prototypes.optimise._WORK_BUDGET', 2 * 10 ** 9)


@pytest.fixture
def evaluations(monkeypatch):
    calls = []
    monkeypatch.setattr('timm_dl2pa.prototypes.optimise.pair_energy',
                        lambda points, *rest: calls.append(points.shape) or pair_energy(points, *rest))
    return calls


@pytest.mark.parametrize('size', [(5, 8), (7, 2), (12, 8), (30, 6), (60, 7)])
def test_quick_is_the_best_there_is_where_little_work_is_enough(size):
    assert torch.equal(make_prototypes(*size, method='quick', seed=3), make_prototypes(*size, seed=3))


def test_quick_keeps_to_a_sixteenth_of_the_work(small_budget, evaluations):
    quick, info = make_prototypes(200, 12, method='quick', return_info=True)
    # 2 K^2 (d + 30) + 3e5 + 1200 K d multiply-adds each; a few more to end a line search and to choose the best.
    assert 10 <= len(evaluations) <= 2e9 / 16 / (2 * 200 ** 2 * 42 + 3e5 + 1200 * 200 * 12) + 5
    assert info.method == 'optimise' and torch.equal(quick, make_prototypes(200, 12, method='quick'))
    assert not torch.equal(quick, make_prototypes(200, 12, method='quick', seed=1))
    evaluations.clear()
    better = make_prototypes(200, 12, method='quick', effort=3.0)
    assert len(evaluations) > 50 and uniformity(better) < uniformity(quick)
    assert uniformity(make_prototypes(200, 12)) < uniformity(quick) < uniformity(make_prototypes(200, 12)) + 1e-2


def test_quick_optimises_nothing_that_would_stay_uneven(small_budget, evaluations):
    """So few evaluations leave random points less even than a code."""
    points, info = make_prototypes(500, 16, method='quick', return_info=True)
    assert info.method == 'bch' and not evaluations
    assert uniformity(points) < uniformity(make_prototypes(500, 16, method='cross_polytopes'))


def test_cross_polytopes_do_not_depend_on_how_many_bases_are_drawn_at_once(monkeypatch):
    sizes = [(1, 3), (6, 3), (7, 3), (100, 4), (1001, 5)]
    expected = [make_prototypes(*size, method='cross_polytopes') for size in sizes]
    for entries in (1, 100):
        monkeypatch.setattr('timm_dl2pa.prototypes.optimise._FRAME_ENTRIES', entries)
        assert all(torch.equal(make_prototypes(*size, method='cross_polytopes'), points)
                   for size, points in zip(sizes, expected))
