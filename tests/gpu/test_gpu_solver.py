"""The solver and the prototypes where their heavy parts are computed on a device."""
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from timm_dl2pa import make_prototypes, prototype_quality, solve_assignment
from timm_dl2pa.prototypes.optimise import device_of_evaluations


def unit_rows(count, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize('spare', [0, 100])
@pytest.mark.parametrize('given', ['means', 'scores', 'float32 scores'])
def test_the_assignment_is_scipys(device, given, spare):
    prototypes, means = unit_rows(600 + spare, 16, 0), unit_rows(600, 16, 1)
    scores = means @ prototypes.T
    if given == 'float32 scores':
        scores = scores.astype(np.float32)
    if given == 'means':
        found = solve_assignment(class_means=torch.from_numpy(means).to(device),
                                 prototypes=torch.from_numpy(prototypes).to(device))
    else:
        found = solve_assignment(scores=torch.from_numpy(scores).to(device))
    scores = scores.astype(np.float64)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    assert found.exact and found.assignment.device.type == 'cpu'
    assert found.objective == pytest.approx(scores[rows, columns].sum(), abs=1e-9)
    chosen = scores[np.arange(600), found.assignment.numpy()]
    assert chosen.sum() == pytest.approx(found.objective, abs=1e-9) and len(set(found.assignment.tolist())) == 600
    # From its own answer one pass proves it.
    again = solve_assignment(scores=torch.from_numpy(scores).to(device), start=found)
    assert again.exact and again.moved == 0


@pytest.mark.parametrize('objective, energy, largest', [('uniform', -3.28, 0.75), ('separated', None, 0.62)])
def test_prototypes_by_descent(device, objective, energy, largest):
    assert device_of_evaluations(600, 10, device).type == device.type
    points = make_prototypes(600, 10, objective=objective, method='optimise', effort=0.02, device=str(device))
    quality = prototype_quality(points)
    assert points.device.type == 'cpu' and points.dtype == torch.float32
    assert torch.allclose(points.norm(dim=1), torch.ones(600), atol=1e-5)
    assert quality.max_cosine < largest and (energy is None or quality.energy < energy)
