import math

import numpy as np
import pytest
import torch

from timm_dl2pa import make_prototypes, prototype_quality
from timm_dl2pa.prototypes.codes import CODES, best_code, code_points, find_code


def max_cosine(points: np.ndarray) -> float:
    cosines = points.astype(np.float64) @ points.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    return cosines.max()


@pytest.mark.parametrize('method', CODES)
@pytest.mark.parametrize('dim', [7, 8, 15, 16, 19, 22, 31, 32, 63, 64])
@pytest.mark.parametrize('num', [90, 577, 2000])
def test_theorem_holds_and_points_are_balanced(method, dim, num):
    code = find_code(num, dim, method)
    if code is None:
        pytest.skip('no code of this size in the family')
    points = code_points(code, num, dim, seed=1, dtype=np.float64)
    assert points.shape == (num, dim)
    assert np.abs(np.linalg.norm(points, axis=1) - 1).max() < 1e-12
    assert max_cosine(points) <= code.max_cosine + 1e-12 < 1
    # Pairs and whole bases cancel; what is left over is at most one basis without its negatives.
    left_over = num % 2 if code.signed else num % code.basis_size
    assert np.linalg.norm(points.sum(axis=0)) <= math.sqrt(left_over * (1 + left_over * code.max_cosine)) + 1e-9


@pytest.mark.parametrize('num, dim, method, cosine', [
    (288, 16, 'kerdock', 1 / 4), (24, 4, 'kerdock', 1 / 2), (4224, 64, 'kerdock', 1 / 8), (128, 15, 'kerdock', 1 / 5),
    (2048, 63, 'kerdock', 1 / 9), (2112, 32, 'bch', 1 / 4), (1024, 31, 'bch', 7 / 31),
    (528, 22, 'weil', 1 / math.sqrt(11)),
])
def test_whole_codes_attain_their_theorems(num, dim, method, cosine):
    points, info = make_prototypes(num, dim, method=method, return_info=True)
    quality = prototype_quality(points)
    assert info.method == method and info.theorem == pytest.approx(cosine, abs=1e-15)
    assert quality.max_cosine == pytest.approx(cosine, abs=1e-6)
    assert quality.mean_norm < 1e-7
    assert len(torch.unique(points, dim=0)) == num


@pytest.mark.parametrize('num, dim, method, cosine', [
    (66048, 256, 'kerdock', 1 / 16), (1_050_624, 1024, 'kerdock', 1 / 32), (21841, 128, 'bch', math.sqrt(2 / 128)),
    (100_000, 512, 'bch', 31 / 511), (21841, 512, 'kerdock', 15 / 255), (100_000, 768, 'weil', 1 / math.sqrt(383)),
    (10_000, 31, 'bch', 15 / 31),
])
def test_choice_at_scale(num, dim, method, cosine):
    code = best_code(num, dim)
    assert (code.method, code.max_cosine) == (method, pytest.approx(cosine)) and code.size >= num


def test_uniform_prefers_all_dimensions():
    assert best_code(21841, 512, 'uniform').dim == 512 and best_code(100_000, 768, 'uniform').dim == 766
    _, info = make_prototypes(6000, 90, return_info=True)
    assert set(info.tried) == {'weil', 'cross_polytopes'} and info.method == min(info.tried, key=info.tried.get)


def test_auto_at_21841_is_the_code():
    points, info = make_prototypes(21841, 128, return_info=True)
    assert info.method == 'bch' and info.theorem == pytest.approx(0.125) and 'BCH' in info.description
    rows = points[::500].double() @ points.double().T
    assert torch.sort(rows, dim=1).values[:, -2].max() <= 0.125 + 1e-6
    assert points.double().mean(dim=0).norm() < 1.01 / 21841


def test_seeds_choose_other_points():
    first, again, other = (make_prototypes(200, 16, method='kerdock', seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert prototype_quality(other).max_cosine <= 0.25 + 1e-6
