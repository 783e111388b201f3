"""Discriminant analysis in closed form: samples left out, shrinkage, directions, and what a pass leaves of features."""
import pytest
import torch
import torch.nn.functional as F

from timm_dl2pa import DL2PAHead
from timm_dl2pa.prototypes.energy import UNIFORMITY, pair_energy
from timm_dl2pa.scheduling import prime_fit
from timm_dl2pa.scheduling.discriminant import Moments, _left_out, best_scale, fit_discriminant
from timm_dl2pa.scheduling.feature_sums import FeatureSums

C, D, N = 6, 10, 60


def samples(seed=0, number=N, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(C, D, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(number) % C
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(8))
    return 3 + centres[labels] + spread * torch.randn(number, D, generator=generator) @ mix / 3, labels


def moments_of(x, labels):
    x = x.double()
    sums = torch.zeros(C, D, dtype=torch.float64).index_add_(0, labels, x)
    return Moments.of(torch.bincount(labels, minlength=C), sums, x.t() @ x)


@pytest.mark.parametrize('shrinkage', [0.1, 0.6])
def test_leaving_one_out_is_as_if_it_had_not_been_seen(shrinkage):
    x, labels = samples()
    moments = moments_of(x, labels)
    covariance = moments.shrunk(shrinkage)
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, (x.double() - moments.centre).t(), upper=False).t()
    means = torch.linalg.solve_triangular(factor, moments.means.t(), upper=False).t()
    scores, shifts, cosines = _left_out(whitened, means, labels, moments.counts.double(), shrinkage)
    sphere = shrinkage * moments.within.trace() / D * torch.eye(D, dtype=torch.float64)
    for row in (0, 17, 42):
        kept = torch.arange(N) != row
        without = moments_of(x[kept], labels[kept])
        # The same but for the number of samples and the centre, which one sample hardly changes.
        metric = (1 - shrinkage) * without.within * (N - 1) / N + sphere
        directions = without.means + without.centre - moments.centre
        sample = x[row].double() - moments.centre
        products = sample @ torch.linalg.solve(metric, directions.t())
        lengths = (directions * torch.linalg.solve(metric, directions.t()).t()).sum(1).sqrt()
        size = (sample @ torch.linalg.solve(metric, sample)).sqrt()
        assert torch.allclose(scores[row], products / lengths, atol=1e-8)
        assert torch.allclose(cosines[row], products / lengths / size, atol=1e-8)
        own = torch.linalg.solve_triangular(factor, directions[labels[row]].unsqueeze(1), upper=False).squeeze(1)
        moved = F.normalize(means, dim=1) @ (own / lengths[labels[row]] - F.normalize(means, dim=1)[labels[row]])
        assert torch.allclose(shifts[row], moved, atol=1e-8)
        plain = whitened[row] @ F.normalize(means, dim=1).t()
        assert (scores[row] - plain).abs().max() > 0.1  # leaving out matters


def test_the_shrinkage_follows_the_data():
    """Little where samples are many and directions matter, all of it where there is one to a class."""
    x, labels = samples(number=3000)
    assert fit_discriminant(moments_of(x, labels), x[:700], labels[:700]).shrinkage <= 0.15
    generator, wide = torch.Generator().manual_seed(0), torch.arange(300) % C
    x = torch.randn(C, 80, generator=generator)[wide] / 2 + torch.randn(300, 80, generator=generator)
    sums = torch.zeros(C, 80, dtype=torch.float64).index_add_(0, wide, x.double())
    round_moments = Moments.of(torch.bincount(wide), sums, x.t().double() @ x.double())
    assert fit_discriminant(round_moments, x, wide).shrinkage >= 0.7
    x, labels = samples(number=C)
    found = fit_discriminant(moments_of(x, labels), x, labels)
    assert len(found.labels) == 0 and found.rows.isfinite().all()
    nearest = F.normalize(moments_of(x, labels).means, dim=1)
    assert torch.allclose(F.normalize(found.rows, dim=1), nearest, atol=1e-6)


def test_directions_of_both_modes_serve_both():
    (x, labels), generator = samples(number=600), torch.Generator().manual_seed(5)
    other = x @ (torch.eye(D) + 0.6 * torch.randn(D, D, generator=generator) / D ** 0.5) + 2

    def right(found, features):
        centred = features.double() - features.double().mean(0)
        return float(((centred @ found.rows.t()).argmax(1) == labels).double().mean())

    one, two = moments_of(x, labels), moments_of(other, labels)
    alone, both = fit_discriminant(one, x, labels), fit_discriminant(one, x, labels, two)
    assert right(both, other) > right(alone, other) + 0.02 and right(both, x) > right(alone, x) - 0.06
    assert torch.equal(both.centre, alone.centre)


def test_the_scale_is_the_smallest_that_suits():
    cosines, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.2, 0.3]]), torch.tensor([0, 0, 1])
    scale, entropy = best_scale(cosines, labels)
    assert entropy == pytest.approx(min(F.cross_entropy(value * cosines, labels).item() for value in (
        4, 6, 9, 13, 19, 28, 40))) and scale == 40
    apart = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert best_scale(apart, torch.tensor([0, 1]))[0] == 4  # no larger than it need be


@pytest.mark.parametrize('split', [1, 7, 60])
def test_sums_do_not_depend_on_batches(split):
    head, (x, labels) = DL2PAHead(D, C, 3), samples()
    sums, soft = FeatureSums(head, -100), FeatureSums(head, -100)
    for rows, targets in zip(x.split(split), labels.split(split)):
        sums.add(rows, targets)
        soft.add(rows, F.one_hot(targets, C).float())
    moments, expected = Moments.of(sums.counts, sums.sums, sums.squares), moments_of(x, labels)
    assert torch.allclose(moments.within, expected.within) and torch.allclose(moments.means, expected.means)
    means = torch.stack([x[labels == label].double().mean(0) for label in range(C)])
    within = (x - means[labels]).t().double() @ (x - means[labels]).double() / N
    assert torch.allclose(moments.within, within) and torch.allclose(moments.centre, means.mean(0))
    assert torch.allclose(soft.squares, sums.squares) and torch.equal(soft.samples, sums.samples)


def test_the_sample_is_uniform_and_resumes():
    head = DL2PAHead(2, C, 2)
    found = torch.zeros(40)
    for start in range(0, 4000, 40):  # other numbers seen before, other draws
        sums = FeatureSums(head, -100)
        sums._capacity = 10
        sums.seen += start
        sums._keep(torch.zeros(10, 2), torch.zeros(10, dtype=torch.long))
        sums.seen.fill_(10)
        sums.samples, sums.labels = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
        sums.seen.zero_()
        order = torch.randperm(40, generator=torch.Generator().manual_seed(start))
        for rows in order.split(8):
            sums._keep(rows.float().unsqueeze(1).repeat(1, 2), rows % C)
        assert len(sums.labels) == 10 and torch.equal(sums.samples[:, 0].long() % C, sums.labels)
        found[sums.samples[:, 0].long()] += 1
    assert found.sum() == 1000 and found.min() > 8 and found.max() < 45  # 25 on average, with a deviation of 4.3
    again = FeatureSums(head, -100)
    again.load_state_dict(sums.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in sums.state_dict().items())


def test_projection_is_that_of_the_singular_vectors():
    rows = F.normalize(torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    rows = rows * torch.linspace(3, 0.1, 20, dtype=torch.float64)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    found = prime_fit._projected(rows, 5)
    expected = left[:, :5] * values[:5]
    assert torch.allclose(found @ found.t(), expected @ expected.t(), atol=1e-5)
    assert prime_fit._projected(rows[:4, :3], 5).shape == (4, 5)


def test_prototypes_are_spread_by_the_papers_energy():
    points = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    found = prime_fit._energy_gradient(points, torch.arange(30))
    assert torch.allclose(found, pair_energy(points.clone(), UNIFORMITY)[1], atol=1e-6)
    near = F.normalize(torch.ones(5) + 0.3 * points, dim=1).double()
    spread = prime_fit._spread(near)
    assert torch.pdist(spread).min() > 2 * torch.pdist(near).min()
    assert (spread * near).sum(1).mean() > 0.3  # near where they were


def test_the_map_needs_no_matrix_of_all_classes():
    """With more classes than features the same map comes from an (F, F) system."""
    directions = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    points = F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    found = prime_fit.Discriminant(None, directions, directions, 0.5, None, None, None)
    weight = prime_fit.embedding_map(found, prime_fit.Priming(torch.arange(30), points))
    expected = torch.linalg.solve(directions @ directions.t() + torch.eye(30, dtype=torch.float64), points.double()).t()
    assert torch.allclose(weight, expected, atol=1e-10)
