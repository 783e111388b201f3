"""The scheduler's policies: re-solves in the background, schedules, a least gain."""
import io
import threading

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.helpers.scheduling import feed, paper_rule
from timm_dl2pa import AssignmentScheduler, ClassMeans, Schedule, solve_assignment
from timm_dl2pa.assignment.matching import generation, sparse
from timm_dl2pa.scheduling import Duration, resolver
from timm_dl2pa.scheduling.background import Background


def as_told(update):
    return update and (update.step, update.epoch, update.moved, update.objective_before, update.objective)


def test_the_answer_is_taken_at_its_step(make_head):
    head = make_head()
    observed = paper_rule(head, interval=3, background=True, lag=2)
    for step in range(3):
        assert feed(head, observed, step) is None
    means = ClassMeans(7, 4)
    means.sums = observed.class_means.sums.clone()
    expected = solve_assignment(class_means=means.directions(), prototypes=head.prototypes)
    # Begun before the fourth batch is folded in, taken before the sixth.
    for step in (3, 4):
        assert feed(head, observed, step) is None
        assert head.assignment.tolist() == list(range(7))
    update = feed(head, observed, 5)
    assert torch.equal(head.assignment, expected.assignment) and expected.moved > 0
    assert as_told(update) == (3, 0, expected.moved, expected.objective_before, expected.objective)
    assert update.seconds > 0 and observed.history == [update]


def test_the_sums_decay_when_the_solve_begins(make_head):
    head = make_head()
    beside, waiting = (paper_rule(make_head(), interval=3, momentum=0.25, **options)
                       for options in (dict(background=True, lag=9), dict()))
    for step in range(5):
        for observed in (beside, waiting):
            feed(observed.heads[0], observed, step)
    assert torch.equal(beside.class_means.sums, waiting.class_means.sums)
    assert not beside.history and len(waiting.history) == 1
    assert torch.equal(beside.heads[0].assignment, head.assignment)


def test_what_falls_due_meanwhile_begins_when_the_answer_is_taken(make_head):
    head = make_head()
    observed = paper_rule(head, interval=2, background=True, lag=3)
    taken = [feed(head, observed, step) for step in range(12)]
    assert [(number, update.step) for number, update in enumerate(taken) if update] == [(5, 2), (8, 5), (11, 8)]


def test_training_goes_on_until_the_answer_is_needed(make_head, monkeypatch):
    free, began = threading.Event(), threading.Event()

    def slow(**arguments):
        began.set()
        assert free.wait(60)
        return solve_assignment(**arguments)

    monkeypatch.setattr(resolver, 'solve_assignment', slow)
    head = make_head()
    observed = paper_rule(head, interval=1, background=True, lag=3)
    for step in range(4):
        feed(head, observed, step)
    assert began.wait(60)
    threading.Timer(0.2, free.set).start()
    assert feed(head, observed, 4).moved > 0 and free.is_set()


def test_an_error_of_the_solver_reaches_the_training(make_head, monkeypatch):
    def broken(**arguments):
        raise ArithmeticError('the solver broke')

    head = make_head()
    observed = paper_rule(head, interval=2, background=True, lag=1)
    with monkeypatch.context() as patched:
        patched.setattr(resolver, 'solve_assignment', broken)
        for step in range(3):
            feed(head, observed, step)
        with pytest.raises(ArithmeticError, match='the solver broke'):
            feed(head, observed, 3)
    assert head.assignment.tolist() == list(range(7)) and not observed.history
    # Those who catch it go on.
    assert [feed(head, observed, step) is not None for step in range(3, 7)] == [False, False, True, False]


@pytest.fixture
def sparse_apart(monkeypatch):
    """No sparse problem is small; and whoever solves one in this process stops the training."""
    def refuse(pairs):
        raise AssertionError('held the lock')

    monkeypatch.setattr(sparse, '_MIN_PROCESS_PAIRS', 0)
    monkeypatch.setattr(sparse, 'min_weight_full_bipartite_matching', refuse)
    monkeypatch.setattr(generation, '_SMALL_PAIRS', 0)
    monkeypatch.setattr(generation, '_MAX_DENSE_PAIRS', 0)


@pytest.mark.usefixtures('sparse_apart')
def test_what_would_hold_pythons_lock_runs_in_another_process():
    points, means = (torch.randn(200, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = Background(lambda: solve_assignment(class_means=means, prototypes=points)).result()
    assert found.exact
    scores = (means.double() @ points.double().T).numpy()
    rows, columns = linear_sum_assignment(scores, maximize=True)
    assert found.objective == pytest.approx(scores[rows, columns].sum(), rel=1e-12)
    with pytest.raises(AssertionError, match='held the lock'):
        solve_assignment(class_means=means, prototypes=points)


@pytest.mark.usefixtures('sparse_apart')
def test_an_error_in_the_other_process_is_told(monkeypatch):
    monkeypatch.setattr(sparse, '_PROGRAM', 'raise MemoryError("too much")')
    points, means = (torch.randn(200, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with pytest.raises(RuntimeError, match=r'(?s)ended with the status 1.*too much'):
        Background(lambda: solve_assignment(class_means=means, prototypes=points)).result()


def test_bad_batches_raise_when_the_solve_begins(make_head):
    head = make_head()
    observed = paper_rule(head, interval=1, background=True)
    feed(head, observed, 0)
    observed.class_means.add(torch.eye(4)[:1], torch.tensor([9]))
    for _ in range(2):
        with pytest.raises(ValueError, match='class 9'):
            feed(head, observed, 0)


def test_the_rotation_after_the_warmup_is_waited_for(make_head):
    head = make_head()
    observed = AssignmentScheduler(head, interval=2, recipe='even', background=True, lag=1)
    updates = [feed(head, observed, step) for step in range(6)]
    assert [number for number, update in enumerate(updates) if update] == [2, 5]
    assert [update.step for update in observed.history] == [2, 4] and not observed.warming_up


@pytest.mark.parametrize('stopped_after', range(2, 10))
def test_resumes_to_the_bit_with_a_solve_pending(make_head, stopped_after):
    options = dict(interval=Schedule(((2, 4), (3, None))), background=True, lag=2, min_gain=1e-3)

    def saved(head, observed):
        buffer = io.BytesIO()
        torch.save({'model': head.state_dict(), 'scheduler': observed.state_dict()}, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    head = make_head()
    observed = paper_rule(head, **options)
    unbroken = [as_told(feed(head, observed, step)) for step in range(12)]
    assert sum(update is not None for update in unbroken) == 3

    first = make_head()
    before = paper_rule(first, **options)
    told = [as_told(feed(first, before, step)) for step in range(stopped_after)]
    state = saved(first, before)
    second = make_head()
    after = paper_rule(second, **options)
    after.load_state_dict(state['scheduler'])   # before the model: nothing is solved yet
    second.load_state_dict(state['model'])
    assert told + [as_told(feed(second, after, step)) for step in range(stopped_after, 12)] == unbroken
    assert torch.equal(second.assignment, head.assignment)
    assert torch.equal(after.class_means.sums, observed.class_means.sums)
    assert torch.equal(after.state_dict()['resolver']['prices'], observed.state_dict()['resolver']['prices'])


def test_earlier_prices_are_given_to_the_next_solve(make_head, monkeypatch):
    starts = []

    def watched(**arguments):
        if threading.current_thread() is threading.main_thread():   # not what an earlier test left to be taken
            starts.append(arguments['start'].prices)
        return solve_assignment(**arguments)

    monkeypatch.setattr(resolver, 'solve_assignment', watched)
    head = make_head()
    observed = paper_rule(head, interval=1)
    for step in range(3):
        feed(head, observed, step)
    assert starts[0] is None and starts[1].shape == (7,) and starts[1].any()


def test_prices_of_another_head_are_refused_before_anything_changes(make_head):
    observed = paper_rule(make_head(), interval=1)
    feed(observed.heads[0], observed, 0)
    feed(observed.heads[0], observed, 1)
    other = paper_rule(make_head(num_prototypes=9), interval=1)
    with pytest.raises(ValueError, match='saved prices are of 7 prototypes, not 9'):
        other.load_state_dict(observed.state_dict())
    assert other.steps == 0 and not other.class_means.sums.any()


@pytest.mark.parametrize('min_gain, moves', [(0.0, True), (1e-6, True), (0.999, False)])
def test_a_gain_that_is_too_small_moves_nothing(make_head, min_gain, moves):
    head = make_head()
    # From a good assignment, which later batches improve a little.
    observed = paper_rule(head, interval=2, min_gain=0.0, momentum=1.0)
    for step in range(3):
        feed(head, observed, step)
    observed.resolver.min_gain = min_gain
    with torch.no_grad():
        swapped = head.assignment.clone()
        swapped[:2] = swapped[:2].flip(0)
        head.assign(swapped)
    feed(head, observed, 3)
    update = feed(head, observed, 4)
    assert (update.moved > 0) == moves and torch.equal(head.assignment, swapped) != moves
    assert (update.objective > update.objective_before) == moves


@pytest.mark.parametrize('interval, due', [
    (4, [4, 8, 12, 16]), ('3:6,5', [3, 6, 11, 16]), ('1:3,4:11', [1, 2, 3, 7, 11]),
    (Schedule(((2, 4), (6, None))), [2, 4, 10, 16])])
def test_schedules_of_batches(make_head, interval, due):
    head = make_head()
    observed = paper_rule(head, interval=interval)
    for step in range(17):
        feed(head, observed, step)
    assert [update.step for update in observed.history] == due


def test_schedules_of_epochs_and_their_text(make_head):
    assert Schedule.of('1:3,2 epochs') == Schedule(((1, 3), (2, None)), 'epochs')
    head = make_head()
    observed = paper_rule(head, interval='1:3,2 epochs')
    for step in range(9):
        feed(head, observed, step)
        observed.epoch_end()
    assert [update.epoch for update in observed.history] == [1, 2, 3, 5, 7]
    assert str(Schedule.of('epoch')) == 'epoch' and str(Schedule.of(3)) == '3 batches'
    assert str(observed.schedule) == '1 (up to 3), then 2 epochs'


def test_a_rotation_without_a_length_comes_after_one_interval_of_the_first_stage(make_head):
    assert AssignmentScheduler(make_head(), interval='5:10,20', recipe='even').warmup_length == Duration(5)


@pytest.mark.parametrize('stages, unit, message', [
    ((), 'batches', 'at least one pair'), (((0, None),), 'batches', 'every >= 1, not 0 in stage 0'),
    (((1, None), (2, None)), 'batches', 'stage 0 ends at None'), (((1, 5), (2, 5)), 'batches', 'stage 1 ends at 5'),
    (((1, None),), 'days', "unit must be 'batches' or 'epochs'")])
def test_schedules_that_make_no_sense_are_refused(stages, unit, message):
    with pytest.raises(ValueError, match=message):
        Schedule(stages, unit)


@pytest.mark.parametrize('text', ['', '3:', ':3', '3,4', '3:6:9', '3 batches', '0'])
def test_texts_that_are_no_schedule_are_refused(text):
    with pytest.raises(ValueError, match=r'interval must be|must have every|must end'):
        Schedule.of(text)
