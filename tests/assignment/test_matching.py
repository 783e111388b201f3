"""The solver against scipy's dense one, and its certificate; blocks, candidates and rounds on small problems too."""
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from timm_dl2pa import AssignmentResult, solve_assignment
from timm_dl2pa.assignment import check_assignment
from timm_dl2pa.assignment.matching import Products, best_matching, generation, sources, sparse
from timm_dl2pa.assignment.matching import sweep as sweep_module
from timm_dl2pa.assignment.matching.greedy import match_greedily


@contextmanager
def small_steps(width=1):
    """No problem is small enough to be solved at once; a block is a few rows, a pass adds a pair or so for a class."""
    with mock.patch.multiple(generation, _SMALL_PAIRS=0, _MAX_DENSE_PAIRS=0, _PAIRS_PER_CLASS=width), \
            mock.patch.multiple(sources, _BLOCK_SCORES=8, _MIN_BLOCK_ROWS=2, _PAIRS_AT_A_TIME=5):
        yield


@contextmanager
def counted_passes():
    """Yields a list that gets an entry for each pass over all pairs. No problem is small enough to need none."""
    passes = []

    def counting(*args, **kwargs):
        passes.append(1)
        return sweep_module.sweep(*args, **kwargs)

    with mock.patch.multiple(generation, sweep=counting, _SMALL_PAIRS=0, _MAX_DENSE_PAIRS=0):
        yield passes


def unit_rows(count, dim, seed):
    points = np.random.default_rng(seed).standard_normal((count, dim))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def optimum(scores, start, pinned):
    """The best sum that keeps the pinned classes' prototypes, by scipy."""
    free = np.setdiff1d(np.arange(scores.shape[1]), start[pinned])
    rest = scores[~pinned][:, free]
    rows, columns = linear_sum_assignment(rest, maximize=True)
    return scores[pinned, start[pinned]].sum() + rest[rows, columns].sum()


def bound_of(prices, scores, start, pinned, no_preference):
    """The dual bound by its definition: weak duality makes it one, whatever the prices."""
    matched = ~pinned & ~no_preference
    free = np.setdiff1d(np.arange(scores.shape[1]), start[pinned])
    bound = scores[pinned, start[pinned]].sum() + scores[no_preference, 0].sum()
    if matched.any():
        bound += (scores[matched][:, free] - prices[free]).max(axis=1).sum()
        bound += np.sort(prices[free])[len(free) - matched.sum():].sum()
    return bound


def exchanges(start, assignment):
    """Yields the classes of each cycle or chain in which two assignments differ."""
    holder = {prototype: label for label, prototype in enumerate(start)}
    taker = {prototype: label for label, prototype in enumerate(assignment)}
    left = set(np.flatnonzero(start != assignment).tolist())
    while left:
        group, queue = set(), [min(left)]
        while queue:
            label = queue.pop()
            if label in group or label not in left:
                continue
            group.add(label)
            queue += [other for other in (holder.get(assignment[label]), taker.get(start[label])) if other is not None]
        left -= group
        yield sorted(group)


def check(result, scores, start, pinned=None, *, exact=True):
    """Everything that holds of any answer."""
    num_classes = len(scores)
    classes = np.arange(num_classes)
    pinned = np.zeros(num_classes, bool) if pinned is None else np.asarray(pinned)
    check_assignment(result.assignment, *scores.shape)
    assignment = result.assignment.numpy()
    assert (assignment[pinned] == start[pinned]).all()
    assert result.moved == (assignment != start).sum()
    tolerance = 1e-11 * max(np.abs(scores).max(), 1e-300)
    best = optimum(scores, start, pinned)
    assert abs(result.objective - scores[classes, assignment].sum()) <= tolerance
    assert abs(result.objective_before - scores[classes, start].sum()) <= tolerance
    assert result.objective >= result.objective_before
    assert result.bound >= max(best - tolerance, result.objective)
    no_preference = (scores == scores[:, :1]).all(axis=1) & ~pinned
    proven = bound_of(result.prices.numpy(), scores, start, pinned, no_preference)
    assert proven <= result.bound + tolerance
    assert result.gap >= 0
    if exact:
        assert result.exact and result.gap == 0
        assert abs(result.objective - best) <= tolerance and abs(result.bound - best) <= tolerance
    own = scores[classes, assignment] - scores[classes, start]
    for group in exchanges(start, assignment):
        # Somebody gains, or a class that has no preference made room.
        assert own[group].sum() > 0


@st.composite
def score_problems(draw):
    num_classes = draw(st.integers(1, 10))
    shape = (num_classes, num_classes + draw(st.integers(0, 3)))
    elements = draw(st.sampled_from([st.integers(-2, 2), st.floats(-1, 1), st.floats(-1e30, 1e30),
                                     st.floats(-1e-30, 1e-30), st.sampled_from([0.0, 1.0, 1.0 + 2 ** -30])]))
    scores = draw(arrays(np.float64, shape, elements=elements))
    for label in draw(st.lists(st.integers(1, num_classes), max_size=3)):
        scores[label - 1] = scores[label // 2]
    start = np.array(draw(st.permutations(range(shape[1]))))[:num_classes]
    pinned = draw(st.none() | arrays(bool, num_classes))
    return scores, start, pinned


@given(problem=score_problems(), width=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_scores(problem, width):
    scores, start, pinned = problem
    check(solve_assignment(scores, start=start, pinned=pinned), scores, start, pinned)
    with small_steps(width):
        result = solve_assignment(scores, start=start, pinned=pinned)
        check(result, scores, start, pinned)
        again = solve_assignment(scores, start=result, pinned=pinned)
    assert again.moved == 0 and torch.equal(again.assignment, result.assignment)


@st.composite
def mean_problems(draw):
    """Class means and prototypes with few bits, so that products of them are exact in float64, in any order."""
    num_classes, dim = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    num_prototypes = num_classes + draw(st.integers(0, 3))
    elements = st.integers(-3, 3) if draw(st.booleans()) else st.integers(-2 ** 20, 2 ** 20)
    means = draw(arrays(np.float64, (num_classes, dim), elements=elements))
    prototypes = draw(arrays(np.float64, (num_prototypes, dim), elements=elements))
    means[draw(arrays(bool, num_classes, elements=st.sampled_from([False, False, True])))] = 0
    start = np.array(draw(st.permutations(range(num_prototypes))))[:num_classes]
    pinned = draw(st.none() | arrays(bool, num_classes))
    exponents = draw(st.tuples(st.integers(-150, 150), st.integers(-150, 150)))
    return np.ldexp(means, exponents[0]), np.ldexp(prototypes, exponents[1]), start, pinned


@given(problem=mean_problems(), width=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_class_means(problem, width):
    means, prototypes, start, pinned = problem
    scores = means @ prototypes.T
    with small_steps(width):
        result = solve_assignment(class_means=means, prototypes=prototypes, start=start, pinned=pinned)
        again = solve_assignment(class_means=means, prototypes=prototypes, start=result, pinned=pinned)
    check(result, scores, start, pinned)
    assert again.moved == 0
    # Classes that were never seen move only if another took what they had.
    unseen = ~means.any(axis=1)
    assignment = result.assignment.numpy()
    taken = set(assignment[~unseen])
    for label in np.flatnonzero(unseen & (assignment != start)):
        assert start[label] in taken


@pytest.mark.parametrize('count, spares, dim, pull', [
    (300, 0, 8, 0.0), (300, 20, 8, 0.3), (300, 0, 64, 1.0), (400, 0, 2, 0.3), (200, 100, 2, 0.0), (400, 1, 3, 0.3)])
def test_hundreds_of_classes(count, spares, dim, pull):
    """d = 2 brings near ties all along the circle, on which scipy's sparse solver alone takes minutes."""
    prototypes = unit_rows(count + spares, dim, 0)
    means = pull * prototypes[:count] + unit_rows(count, dim, 1)
    start = np.random.default_rng(2).permutation(count + spares)[:count]
    result = solve_assignment(class_means=means, prototypes=prototypes, start=start)
    check(result, means @ prototypes.T, start)
    table = solve_assignment(means @ prototypes.T, start=start)
    check(table, means @ prototypes.T, start)


def test_an_optimum_is_proven_in_one_pass():
    """Without prices where training has pulled each class to its prototype; with those of the result anywhere."""
    prototypes = unit_rows(300, 64, 0)
    attached = prototypes + unit_rows(300, 64, 1)
    loose = unit_rows(300, 64, 1)
    with counted_passes() as passes:
        assert solve_assignment(class_means=attached, prototypes=prototypes).moved == 0
        assert len(passes) == 1
        found = solve_assignment(class_means=loose, prototypes=prototypes)
        assert len(passes) > 3
        passes.clear()
        again = solve_assignment(class_means=loose, prototypes=prototypes, start=found)
        assert len(passes) == 1
    assert found.moved > 250 and again.moved == 0 and again.exact


def test_displaced_classes_are_found_in_one_pass():
    prototypes = unit_rows(300, 64, 0)
    start = np.arange(300)
    start[:6] = [1, 2, 0, 4, 5, 3]
    with counted_passes() as passes:
        result = solve_assignment(class_means=prototypes + unit_rows(300, 64, 1), prototypes=prototypes, start=start)
    assert result.assignment.tolist() == list(range(300)) and result.moved == 6 and result.exact
    assert len(passes) == 1


def test_earlier_prices_save_passes_after_a_drift():
    prototypes, means = unit_rows(600, 32, 0), unit_rows(600, 32, 1)
    earlier = solve_assignment(class_means=means, prototypes=prototypes)
    means = means + 0.01 * unit_rows(600, 32, 2)
    with counted_passes() as passes:
        without = solve_assignment(class_means=means, prototypes=prototypes, start=earlier.assignment)
        cold = len(passes)
        passes.clear()
        warm = solve_assignment(class_means=means, prototypes=prototypes, start=earlier)
    assert len(passes) < cold
    check(warm, means @ prototypes.T, earlier.assignment.numpy())
    assert warm.objective == pytest.approx(without.objective, rel=1e-12) and 0 < warm.moved < 300


def test_a_narrow_cone_takes_no_more_passes_than_the_whole_sphere():
    """What all classes' means have in common, as in a young network, is in the first prices."""
    prototypes = unit_rows(500, 16, 0)
    passes = {}
    for width in (0.01, 1e9):
        with counted_passes() as counted:
            result = solve_assignment(class_means=unit_rows(1, 16, 1) + width * unit_rows(500, 16, 2),
                                      prototypes=prototypes)
        assert result.exact
        passes[width] = len(counted)
    assert passes[0.01] <= passes[1e9] + 1


def test_prices_of_any_kind_only_help_or_hinder():
    prototypes, means, start = unit_rows(70, 4, 0), unit_rows(60, 4, 1), np.arange(60)
    for factor in (1e-3, 10, 1e6, 1e300, float('nan')):
        prices = factor * torch.randn(70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        earlier = AssignmentResult(torch.from_numpy(start), 0, 0.0, 0.0, prices=prices)
        with small_steps(2):
            check(solve_assignment(class_means=means, prototypes=prototypes, start=earlier), means @ prototypes.T,
                  start)


@pytest.mark.parametrize('precision', ['highest', 'medium'])
def test_float64_decides_what_float32_cannot_tell(precision):
    """Prototypes in pairs that are 1e-8 apart: float32 products of a pair are equal, under autocast of more."""
    base = unit_rows(20, 6, 0)
    prototypes = np.concatenate([base, base + 1e-8 * unit_rows(20, 6, 1)])
    means = np.concatenate([base + 0.1 * unit_rows(20, 6, 2), base + 0.1 * unit_rows(20, 6, 3)])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with small_steps(2), torch.autocast('cpu', torch.bfloat16):
            result = solve_assignment(class_means=means, prototypes=prototypes)
    finally:
        torch.set_float32_matmul_precision(before)
    scores = means @ prototypes.T
    rows, columns = linear_sum_assignment(scores, maximize=True)
    assert 0 < result.moved < 40 and (result.assignment.numpy() == columns).mean() > 0.9
    assert result.objective == pytest.approx(scores[rows, columns].sum(), rel=1e-14)


@pytest.mark.parametrize('width', [1, 3, 500])
@pytest.mark.parametrize('report_all', [False, True])
def test_a_pass_is_exact_where_float32_is_not(width, report_all):
    base = unit_rows(200, 48, 0)
    prototypes = np.concatenate([base, base + 1e-8 * unit_rows(200, 48, 1)])
    means, prices = base + unit_rows(200, 48, 2), 0.01 * np.random.default_rng(3).random(400)
    prices[200:] = prices[:200]
    for assignment in (np.arange(200), np.arange(200, 400)):
        scores = Products(means, prototypes)
        table = means @ prototypes.T / scores.unit - prices
        own = table[np.arange(200), assignment]
        found = sweep_module.sweep(scores, prices, assignment, own, width=width, tolerance=1e-13, report_all=report_all)
        np.testing.assert_allclose(found.best, table.max(axis=1), rtol=0, atol=1e-14)
        broken = np.flatnonzero(table.max(axis=1) > own + 1e-13)
        assert 50 < len(broken) < 150
        assert set(found.rows) == (set(range(200)) if report_all else set(broken))
        # The pair that breaks the prices most is among those reported.
        reported = set(zip(found.rows, found.columns))
        assert all((row, table[row].argmax()) in reported for row in broken)


def test_a_tie_moves_nobody_although_others_gain():
    prototypes = np.eye(6)
    means = np.zeros((6, 6))
    means[0, 1] = means[1, 0] = 1   # these two gain by an exchange
    means[2, 2:4] = means[3, 2:4] = 1   # these two would not, nor would a class that has 1 with all that are left
    means[4, 4] = means[5, 5] = 1
    for width in (1, 6):
        with small_steps(width):
            for start in ([0, 1, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5]):
                result = solve_assignment(class_means=means, prototypes=prototypes, start=start)
                assert result.assignment.tolist() == [1, 0, *start[2:]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('given', ['means', 'scores'])
def test_low_precision_inputs_are_taken_as_they_are(dtype, given):
    prototypes = torch.from_numpy(unit_rows(200, 8, 0)).to(dtype)
    means = torch.from_numpy(unit_rows(180, 8, 1)).to(dtype)
    if given == 'means':
        result = solve_assignment(class_means=means, prototypes=prototypes)
        scores = means.double() @ prototypes.double().T
    else:
        scores = (means.double() @ prototypes.double().T).to(dtype)
        result = solve_assignment(scores)
        scores = scores.double()
    check(result, scores.numpy(), np.arange(180))


@pytest.mark.parametrize('looks', [0, 3, 20, 60])
def test_out_of_time(looks):
    """The clock jumps after so many looks at it: the best so far is returned, with a bound that holds."""
    prototypes, means = unit_rows(70, 8, 0), unit_rows(60, 8, 1)
    start = np.random.default_rng(2).permutation(70)[:60]
    times = iter([0.0] * (looks + 1))
    with small_steps(2), mock.patch('time.monotonic', lambda: next(times, 100.0)):
        result = solve_assignment(class_means=means, prototypes=prototypes, start=start, time_budget=10)
    check(result, means @ prototypes.T, start, exact=False)
    assert not result.exact and 0 < result.gap < np.inf
    assert (result.objective > result.objective_before) == (looks > 0)


def test_a_subproblem_that_takes_too_long_is_matched_greedily(monkeypatch):
    """The solver of the other process never ends; without its time limit this test would not either."""
    monkeypatch.setattr(sparse, '_PROGRAM', 'import time; time.sleep(600)')
    monkeypatch.setattr(sparse, '_MIN_PROCESS_PAIRS', 1)
    monkeypatch.setattr(generation, '_SMALL_PAIRS', 0)
    monkeypatch.setattr(generation, '_MAX_DENSE_PAIRS', 0)
    prototypes, means = unit_rows(900, 6, 0), unit_rows(800, 6, 1)
    start = np.random.default_rng(2).permutation(900)[:800]
    began = time.monotonic()
    result = solve_assignment(class_means=means, prototypes=prototypes, start=start, time_budget=2)
    assert time.monotonic() - began < 60
    check(result, means @ prototypes.T, start, exact=False)
    assert not result.exact and 0 < result.gap < np.inf
    best = solve_assignment(class_means=means, prototypes=prototypes).objective
    assert result.objective > result.objective_before + 0.8 * (best - result.objective_before)


@given(st.integers(1, 30), st.integers(0, 10), st.integers(1, 6), st.integers(0, 999))
def test_a_greedy_matching_is_at_least_half_as_good(count, spare, each, seed):
    generator = np.random.default_rng(seed)
    width = count + spare
    rows = np.repeat(np.arange(count), min(each, width))
    columns = np.concatenate([generator.permutation(width)[:each] for _ in range(count)])
    profits = generator.integers(1, 9, len(rows)) / 8  # with ties
    start = generator.permutation(width)[:count]
    found = match_greedily(profits, rows, columns, start, width)
    assert len(set(found.tolist())) == count and 0 <= found.min() <= found.max() < width
    table = np.zeros((count, width))
    table[rows, columns] = profits
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    total = table[np.arange(count), found].sum()
    assert best / 2 <= total <= best + 1e-9
    nothing = np.empty(0, np.int64)
    assert np.array_equal(match_greedily(np.empty(0), nothing, nothing, start, width), start)


def test_a_time_budget_that_suffices_changes_nothing():
    prototypes, means = unit_rows(300, 8, 0), unit_rows(300, 8, 1)
    unlimited = solve_assignment(class_means=means, prototypes=prototypes)
    limited = solve_assignment(class_means=means, prototypes=prototypes, time_budget=600)
    assert limited.exact and torch.equal(limited.assignment, unlimited.assignment)


def test_never_holds_all_scores():
    prototypes, means = unit_rows(3000, 4, 0), unit_rows(3000, 4, 1)
    scores = Products(means, prototypes)
    largest = []
    profits = Products.profits

    def watched(self, rows, prices):
        block = profits(self, rows, prices)
        largest.append(block.numel())
        return block

    with mock.patch.object(Products, 'profits', watched), mock.patch.object(sources, '_BLOCK_SCORES', 2 ** 18):
        found = best_matching(scores, np.arange(3000))
    assert found.exact and max(largest) <= 128 * 3000


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('given', ['means', 'scores'])
def test_on_a_gpu(given):
    prototypes, means = unit_rows(700, 16, 0), unit_rows(600, 16, 1)
    scores = means @ prototypes.T
    if given == 'means':
        arguments = dict(class_means=torch.from_numpy(means).cuda(), prototypes=torch.from_numpy(prototypes).cuda())
    else:
        arguments = dict(scores=torch.from_numpy(scores).cuda())
    check(solve_assignment(**arguments), scores, np.arange(600))


@pytest.mark.parametrize('arguments, message', [
    (dict(pinned=[True]), r'pinned must be a mask \(3,\)'),
    (dict(pinned=[0, 1, 0]), 'pinned must be a mask .* of torch.int64'),
    (dict(time_budget=0), 'time_budget must be a positive number of seconds or None, not 0'),
    (dict(start=AssignmentResult(torch.arange(3), 0, 0.0, 0.0, prices=torch.zeros(4))),
     'start has prices for 4 prototypes, but there are 3'),
    (dict(start=AssignmentResult(torch.tensor([0, 0, 1]), 0, 0.0, 0.0)), 'classes 0 and 1 share'),
])
def test_errors_name_the_trouble(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_assignment(np.eye(3), **arguments)


@pytest.mark.parametrize('spare', [0, 30])
def test_few_moves_take_a_pass_and_many_are_solved_densely(spare):
    """From a start in which few classes move, no dense problem is solved; from a random one, no pass is made."""
    prototypes = unit_rows(300 + spare, 40, 0)
    means = prototypes[:300] + 0.8 * unit_rows(300, 40, 1)
    near, far = np.arange(300), np.random.default_rng(2).permutation(300)
    near[[5, 70]] = near[[70, 5]]
    best = linear_sum_assignment(means @ prototypes.T, maximize=True)[1]
    for start, unused in ((near, '_dense_matching'), (far, 'sweep')):
        with mock.patch.object(generation, unused, side_effect=AssertionError(unused)):
            found = best_matching(Products(means, prototypes), start)
        assert found.exact and np.array_equal(found.assignment, best)
