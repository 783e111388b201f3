import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dl2pa import make_prototypes, max_cosine_lower_bound, prototype_quality

# (K, d): the maximal cosine of the code that attains Levenshtein's bound (Levenshtein 1998, table 9.1; Cohn & Kumar
# 2007, table 1).
SHARP = {
    (12, 3): 1 / math.sqrt(5), (16, 5): 1 / 5, (27, 6): 1 / 4, (56, 7): 1 / 3, (240, 8): 1 / 2, (112, 21): 1 / 9,
    (162, 21): 1 / 7, (100, 22): 1 / 11, (275, 22): 1 / 6, (891, 22): 1 / 4, (552, 23): 1 / 5, (4600, 23): 1 / 3,
    (196560, 24): 1 / 2, (22, 21): -1 / 21, (42, 21): 0, (5, 2): math.cos(2 * math.pi / 5),
}


@pytest.mark.parametrize('size', SHARP)
def test_sharp_configurations(size):
    assert max_cosine_lower_bound(*size) == pytest.approx(SHARP[size], abs=1e-12)


def test_four_dimensions_and_kerdock_are_not_sharp():
    """Codes that are proven optimal, or best known, by other means lie above the bound."""
    assert max_cosine_lower_bound(24, 4) < 0.5 and max_cosine_lower_bound(120, 4) < (1 + math.sqrt(5)) / 4
    for dim in (16, 64, 256, 1024):
        bound = max_cosine_lower_bound(dim * dim + 2 * dim, dim)
        assert 0.96 / math.sqrt(dim) < bound < 1 / math.sqrt(dim)


@given(dim=st.integers(2, 4096), num=st.integers(2, 10 ** 6))
@settings(max_examples=150, deadline=None)
def test_everywhere_finite_and_growing_with_the_points(dim, num):
    bound, more = max_cosine_lower_bound(num, dim), max_cosine_lower_bound(num + 1, dim)
    assert -1 <= bound <= more < 1 or (bound == more == 0)
    assert max_cosine_lower_bound(num, dim + 1) <= bound + 1e-12


@given(dim=st.integers(3, 8), num=st.integers(2, 60), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_points_beat_it(dim, num, seed):
    points = np.random.default_rng(seed).standard_normal((num, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosines = points @ points.T
    assert cosines[~np.eye(num, dtype=bool)].max() >= max_cosine_lower_bound(num, dim) - 1e-12


@pytest.mark.slow
def test_three_dimensions_agree_with_fejes_toth():
    """His bound for d = 3 (1943), from other mathematics: both lie below the best 100 points, close to one another."""
    area = math.pi * 100 / (6 * 98)
    fejes_toth = 1 - (4 - 1 / math.sin(area) ** 2) / 2
    bound = max_cosine_lower_bound(100, 3)
    assert abs(bound - fejes_toth) < 2e-3
    assert bound < prototype_quality(make_prototypes(100, 3, objective='separated', effort=0.05)).max_cosine < 0.936


@pytest.mark.parametrize('size, message', [
    ((1, 3), 'at least 2'), ((3, 0), 'dim must be at least 1'), ((3, 1), 'dim=1 has room')])
def test_bad_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        max_cosine_lower_bound(*size)
