import numpy as np
import pytest
import torch

from tests.helpers import reference
from timm_dl2pa import make_prototypes, max_cosine_lower_bound, prototype_quality
from timm_dl2pa.prototypes import energy, quality


def test_against_the_plain_formulas(monkeypatch):
    points = make_prototypes(40, 6, method='cross_polytopes')[:37]
    monkeypatch.setattr(energy, '_BLOCK_ENTRIES', 37 * 5)
    found = prototype_quality(3 * points)
    cosines = (points.double() @ points.double().T).numpy()
    np.fill_diagonal(cosines, -2)
    assert found.max_cosine == pytest.approx(cosines.max(), abs=1e-6)
    assert found.mean_nearest_cosine == pytest.approx(cosines.max(axis=1).mean(), abs=1e-6)
    assert found.energy == pytest.approx(reference.uniformity(points.numpy()), abs=1e-6)
    assert found.bound == max_cosine_lower_bound(37, 6) and found.gap == pytest.approx(found.max_cosine - found.bound)
    assert found.mean_norm == pytest.approx(points.double().mean(dim=0).norm().item(), abs=1e-6)
    assert (found.num_prototypes, found.dim, found.sampled) == (37, 6, False)


def test_too_much_work_is_sampled_and_says_so(monkeypatch):
    points = make_prototypes(288, 16, method='kerdock')
    exact = prototype_quality(points)
    monkeypatch.setattr(quality, '_MAX_FLOAT64_WORK', 10)
    in_float32 = prototype_quality(points)
    sample = prototype_quality(points, max_work=288 * 16 * 200)
    assert not exact.sampled and not in_float32.sampled and sample.sampled and 10 < sample.sampled_rows <= 20
    for found in (in_float32, sample):  # in this code every point has the same distances to the others
        assert found.max_cosine == pytest.approx(exact.max_cosine, abs=1e-6)
        assert found.energy == pytest.approx(exact.energy, abs=1e-5)


@pytest.mark.parametrize('points, message', [
    (torch.ones(3), 'at least 2 rows'), (torch.eye(3, dtype=torch.int64), 'of floats'),
    (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 'row 1'), (torch.tensor([[float('nan'), 0.0], [0.0, 1.0]]), 'row 0')])
def test_bad_input(points, message):
    with pytest.raises(ValueError, match=message):
        prototype_quality(points)
