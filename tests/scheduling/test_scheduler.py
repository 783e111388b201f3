import collections
import copy
import math
import warnings
import weakref

import pytest
import torch
import torch.nn as nn

from tests.helpers.recipe_words import RECIPES, scheduler_arguments
from tests.helpers.scheduling import feed, paper_rule
from timm_dl2pa import AssignmentScheduler, ClassMeans, SquaredCosineLoss, align_prototypes, solve_assignment
from timm_dl2pa.scheduling.class_means import MovingClassMeans


def test_due_resolve_runs_at_the_next_batch_before_it_is_folded_in(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval=3)
    expected = ClassMeans(7, 4)
    for step in range(3):
        assert feed(head, scheduler, step) is None
        expected.sums = scheduler.class_means.sums.clone()
    # Due, but only marked: validation and saving see the assignment that training had.
    assert head.assignment.tolist() == list(range(7))
    update = feed(head, scheduler, 3)
    result = solve_assignment(class_means=expected.directions(), prototypes=head.prototypes)
    assert torch.equal(head.assignment, result.assignment) and result.moved > 0
    assert (update.step, update.moved) == (3, result.moved)
    assert update.objective == pytest.approx(result.objective) and update.objective > update.objective_before
    assert update.seconds > 0
    assert [feed(head, scheduler, step) is not None for step in range(4, 10)] == [False, False, True] * 2


def test_epochs(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval='epoch', start=2, stop=3)
    happened = []
    for epoch in range(1, 6):
        happened.append([feed(head, scheduler, 10 * epoch + step) is not None for step in range(3)])
        scheduler.epoch_end()
    assert happened == [[False] * 3, [False] * 3, [True, False, False], [True, False, False], [False] * 3]


def test_start_and_stop_in_batches(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval=2, start=4, stop=6)
    assert [update.step for step in range(12) if (update := feed(head, scheduler, step))] == [4, 6]
    static = paper_rule(head, interval=1, stop=0)
    assert all(feed(head, static, step) is None for step in range(4))


@pytest.mark.parametrize('momentum', [0.0, 0.5])
def test_momentum(make_head, momentum):
    head = make_head()
    scheduler = paper_rule(head, interval=1, momentum=momentum)
    feed(head, scheduler, 0)
    first = scheduler.class_means.sums.clone()
    feed(head, scheduler, 1)
    alone = paper_rule(head, interval=1)
    feed(head, alone, 1)
    assert torch.allclose(scheduler.class_means.sums, momentum * first + alone.class_means.sums, atol=1e-5)


def test_optimal_assignment_stays(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval=1)
    assert feed(head, scheduler, 0) is None
    assert feed(head, scheduler, 0).moved > 0
    assert feed(head, scheduler, 0).moved == 0


def test_unseen_classes_keep_their_prototypes(make_head):
    head = make_head(num_prototypes=40, neck='none', in_features=4)
    head.assign(torch.arange(20, 27))
    scheduler = paper_rule(head, interval=1)
    for _ in range(2):
        head(head.prototypes[:2])  # two classes, at prototypes that nobody holds
        scheduler.step(torch.tensor([5, 6]))
    assert head.assignment.tolist() == [20, 21, 22, 23, 24, 0, 1]


def test_soft_targets(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval=1)
    head(torch.randn(4, 12))
    scheduler.step(torch.softmax(torch.randn(4, 7), 1))
    head(torch.randn(4, 12))
    assert scheduler.step(torch.full((4, 7), 1 / 7)) is not None


def test_only_training_forwards_count(make_head):
    head = make_head()
    scheduler = paper_rule(head)
    head.eval()(torch.randn(5, 12))
    with pytest.raises(RuntimeError, match='no embeddings'):
        scheduler.step(torch.zeros(5, dtype=torch.long))
    head.train()(torch.randn(5, 12))
    head.eval()(torch.randn(3, 12))
    with pytest.raises(ValueError, match='for 3 samples, but there are 5 embeddings'):
        scheduler.step(torch.zeros(3, dtype=torch.long))
    scheduler.step(torch.zeros(5, dtype=torch.long))
    with pytest.raises(RuntimeError, match='no embeddings'):
        scheduler.step(torch.zeros(5, dtype=torch.long))
    assert scheduler.steps == 1


class Node(torch.autograd.Function):
    """A node of the graph by which one can tell whether the graph is alive."""

    @staticmethod
    def forward(ctx, x, sign):
        ctx.sign = sign
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_keeps_no_graph_alive(make_head):
    class Sign:
        pass

    head, sign = make_head(), Sign()
    scheduler, alive = paper_rule(head), weakref.ref(sign)
    logits = head(Node.apply(torch.randn(3, 12, requires_grad=True), sign))
    del sign
    assert alive() is not None
    del logits
    assert alive() is None
    scheduler.step(torch.zeros(3, dtype=torch.long))
    assert not scheduler.class_means.sums.requires_grad


@pytest.mark.parametrize('targets, message', [
    (torch.tensor([0, 9, 1]), r'class 9, outside 0\.\.6'), (torch.tensor([0, -1, 1]), r'class -1'),
    (torch.tensor([0, 9, 1], dtype=torch.uint8), 'class 9'),
    (torch.eye(7)[:3] + torch.eye(7)[1:4], 'sum to one, not to 2'), (torch.zeros(3, 7), 'sum to one, not to 0'),
    (torch.eye(7)[:3] * 2 - torch.eye(7)[1:4], 'at least 0, not -1'), (torch.eye(7, dtype=torch.cfloat)[:3], 'complex'),
    (torch.tensor([True, False, True]), 'bool')])
def test_targets_out_of_range_are_refused_at_once(make_head, targets, message):
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=1, warmup_length=3)
    feed(head, scheduler, 0)
    before = repr((scheduler.state_dict(), head.state_dict()))
    head(torch.randn(3, 12))
    with pytest.raises(ValueError, match=message):
        scheduler.step(targets)
    assert repr((scheduler.state_dict(), head.state_dict())) == before
    feed(head, scheduler, 1)  # a training that goes on with the next batch does so
    assert scheduler.steps == 2


def test_labels_out_of_range_that_were_not_read_in_time_stop_the_resolve(make_head):
    """On a device the values of later batches are not waited for."""
    head = make_head()
    scheduler = paper_rule(head, interval=2)
    feed(head, scheduler, 0)
    scheduler.class_means.add(torch.eye(4)[:1], torch.tensor([9]))
    feed(head, scheduler, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match='class 9'):
            feed(head, scheduler, 1)
    assert head.assignment.tolist() == list(range(7))
    scheduler.class_means.reset()
    assert feed(head, scheduler, 1) is not None


@pytest.mark.parametrize('kind', ['hard', 'soft'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_samples_that_are_not_finite_are_left_out_and_counted(make_head, recipe, kind):
    """As where GradScaler skips a batch with an activation that overflowed."""
    def train(broken):
        head = make_head(neck='linear')
        scheduler = AssignmentScheduler(head, interval=2, **scheduler_arguments(recipe, 4))
        for step in range(9):
            x, targets = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)), torch.arange(8) % 7
            if kind == 'soft':
                targets = nn.functional.one_hot(targets, 7).float()
            if broken and step in (1, 6):
                x, targets = torch.cat([x, torch.randn(2, 12)]), torch.cat([targets, targets[:2]])
                x[8, 3], x[9, 3] = math.inf, math.nan
                if kind == 'soft':
                    x[9], targets[9, 2] = 1.0, math.nan
            head(x)
            scheduler.step(targets)
        return head, scheduler

    plain, without = train(broken=False)
    with pytest.warns(UserWarning, match='2 samples since the last re-solve were left out'):
        head, scheduler = train(broken=True)
    assert torch.allclose(head.prototypes, plain.prototypes, atol=1e-5)
    assert torch.equal(head.assignment, plain.assignment)
    assert torch.allclose(scheduler.class_means.sums, without.class_means.sums, atol=1e-5)
    assert sum(update.left_out for update in scheduler.history) == 4
    assert scheduler.class_means.check() == 0 and not any(update.left_out for update in without.history)


@pytest.mark.parametrize('background', [False, True])
def test_a_training_in_which_nothing_is_finite_is_refused(make_head, background):
    head = make_head()
    scheduler = paper_rule(head, interval=2, background=background)
    for _ in range(2):
        head(torch.full((3, 12), math.nan))
        scheduler.step(torch.tensor([0, 1, 2]))
    for _ in range(2):
        with pytest.raises(ValueError, match='all 6 samples since the last re-solve were not finite'):
            feed(head, scheduler, 1)
    assert head.assignment.tolist() == list(range(7))
    scheduler.class_means.reset()
    feed(head, scheduler, 1)


@pytest.mark.parametrize('recipe', RECIPES)
def test_ignored_labels_are_left_out(make_head, recipe):
    """Like torch's losses, with -100 or the number that was given."""
    def train(ignored, **options):
        head = make_head(neck='linear')
        scheduler = AssignmentScheduler(head, interval=2, **scheduler_arguments(recipe, 4), **options)
        for step in range(7):
            x, labels = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)), torch.arange(8) % 7
            if ignored is not None:
                x, labels = torch.cat([x, torch.randn(3, 12)]), torch.cat([labels, torch.full((3,), ignored)])
            head(x)
            scheduler.step(labels)
        return head, scheduler

    plain, without = train(None)
    for ignored, options in ((-100, {}), (255, {'ignore_index': 255}), (3, {'ignore_index': 3})):
        if ignored == 3:
            head, scheduler = train(None, ignore_index=3)
            assert not scheduler.class_means.sums[3].any() and scheduler.class_means.sums[2].any()
            continue
        head, scheduler = train(ignored, **options)
        assert torch.allclose(head.prototypes, plain.prototypes, atol=1e-5)
        assert torch.allclose(scheduler.class_means.sums, without.class_means.sums, atol=1e-5)
        assert scheduler.class_means.check() == 0


def test_a_batch_without_labels_changes_nothing(make_head):
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=2, warmup_length=3)
    feed(head, scheduler, 0)
    prototypes, sums = head.prototypes.clone(), scheduler.class_means.sums.clone()
    head(torch.randn(3, 12))
    scheduler.step(torch.full((3,), -100))
    assert torch.allclose(head.prototypes, prototypes, atol=1e-6) and torch.equal(scheduler.class_means.sums, sums)
    assert scheduler.steps == 2


def test_the_history_stays_bounded(make_head):
    head = make_head()
    scheduler = paper_rule(head, interval=1)
    scheduler.resolver._history = collections.deque(maxlen=3)
    for step in range(6):
        feed(head, scheduler, step)
    assert len(scheduler.history) == 3 and scheduler.resolver.updates == 5
    again = paper_rule(make_head(), interval=1)
    again.load_state_dict(scheduler.state_dict())
    assert again.history == scheduler.history and again.resolver.updates == 5
    assert again.resolver._history.maxlen == 1000


@pytest.mark.parametrize('targets', [torch.zeros(3), torch.zeros(3, 8), torch.tensor(1), torch.zeros(2, dtype=int)])
def test_targets_that_do_not_fit_are_refused_before_a_due_resolve(make_head, targets):
    head = make_head()
    scheduler = paper_rule(head, interval=1)
    feed(head, scheduler, 0)
    head(torch.randn(3, 12))
    with pytest.raises(ValueError, match='targets'):
        scheduler.step(targets)
    assert head.assignment.tolist() == list(range(7))
    assert scheduler.step(torch.zeros(3, dtype=torch.long)) is not None


def test_state_of_another_head_is_refused(make_head):
    scheduler = paper_rule(make_head())
    feed(scheduler.heads[0], scheduler, 0)
    other = paper_rule(make_head(dim=5))
    with pytest.raises(ValueError, match='of another head'):
        other.load_state_dict(scheduler.state_dict())
    assert other.steps == 0


def test_several_heads_share_the_assignment(make_head):
    model = nn.ModuleList([make_head(), make_head()])
    scheduler = paper_rule(model, interval=1)
    feed(model[0], scheduler, 0)
    feed(model[0], scheduler, 1)
    assert model[0].assignment.tolist() != list(range(7))
    assert torch.equal(model[0].assignment, model[1].assignment)
    assert model[0].assignment.data_ptr() != model[1].assignment.data_ptr()


def test_the_newest_scheduler_takes_over(make_head):
    head = make_head()
    old, new = paper_rule(head), paper_rule(head)
    head(torch.randn(3, 12))
    new.step(torch.zeros(3, dtype=torch.long))
    with pytest.raises(RuntimeError, match='no embeddings'):
        old.step(torch.zeros(3, dtype=torch.long))


def test_heads_that_cannot_share_an_assignment_are_refused(make_head):
    for other in (make_head(num_classes=5), make_head(seed=1)):
        with pytest.raises(ValueError, match='heads of the model differ'):
            AssignmentScheduler(nn.ModuleList([make_head(), other]))


def test_a_state_that_lacks_something_changes_nothing(make_head):
    scheduler = paper_rule(make_head())
    feed(scheduler.heads[0], scheduler, 0)
    state = scheduler.state_dict()
    for name in ('due', 'class_means', 'resolver', 'warmup'):
        broken = {key: value for key, value in state.items() if key != name}
        other = paper_rule(make_head())
        with pytest.raises(ValueError, match=f'lacks, or does not know, {name}'):
            other.load_state_dict(broken)
        assert not other.class_means.sums.any() and other.steps == 0


@pytest.mark.parametrize('arguments, message', [
    (dict(interval=0), "interval must be 'epoch' or"), (dict(interval='step'), "interval must be 'epoch' or"),
    (dict(min_gain=-0.1), 'min_gain must be a share'), (dict(lag=0), 'lag must be at least 1'),
    (dict(interval=2.5), "interval must be 'epoch' or"), (dict(start=-1), 'start must be at least 0'),
    (dict(stop=-1), 'stop must be at least 0'), (dict(momentum=1.5), 'momentum must be from 0 to 1'),
    (dict(recipe='fast'), 'recipe must be one of placed, even, paper'),
    (dict(warmup='rotate'), 'warmup must be one of placed, rotated or none'), (dict(warmup=0), 'warmup must be one of'),
    (dict(warmup_length=0), "warmup_length must be a number.*warmup='none'"),
    (dict(warmup_length='5 hours'), 'warmup_length must be a number'),
    (dict(warmup_length=float('nan')), 'warmup_length must be a number'), (dict(total='half'), 'total must be'),
    (dict(evenness=-0.1), 'evenness must be a finite number of at least 0'),
    (dict(evenness=float('nan')), 'evenness must be'), (dict(evenness=math.inf), "evenness must be.*recipe 'even'"),
    (dict(evenness='inf'), 'evenness must be'), (dict(recipe='even', evenness=0.3), "is for the warm-up 'placed'")])
def test_bad_arguments(make_head, arguments, message):
    with pytest.raises(ValueError, match=message):
        AssignmentScheduler(make_head(), **arguments)


def test_model_without_head():
    with pytest.raises(ValueError, match=r'Linear.*has no DL2PAHead'):
        AssignmentScheduler(nn.Linear(2, 2))


def test_a_rotation_that_cannot_work_is_refused_at_once(make_head):
    head = make_head(num_classes=50_000, dim=2, prototypes=nn.functional.normalize(torch.randn(50_000, 2)))
    with pytest.raises(ValueError, match="50000 classes by 50000 prototypes are too many for the rotation"):
        AssignmentScheduler(head, recipe='even')
    # Without the rotation there is no limit.
    AssignmentScheduler(head)
    AssignmentScheduler(head, recipe='even', stop=0)
    paper_rule(head)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_synchronisation_on_a_gpu(make_head):
    head = make_head().cuda()
    scheduler = paper_rule(head, interval=100)
    x, labels = torch.randn(16, 12, device='cuda'), torch.randint(0, 7, (16,), device='cuda')
    soft = torch.rand(16, 7, device='cuda')
    for targets in (labels, soft):
        head(x)
        torch.cuda.set_sync_debug_mode('error')
        try:
            scheduler.step(targets)
        finally:
            torch.cuda.set_sync_debug_mode('default')


# --- the warm-up


def test_in_the_warmup_running_means_are_the_class_vectors_of_training_alone(make_head):
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=3, recipe='even')
    running = MovingClassMeans(7, 4, memory=0.98)
    for _ in range(3):
        x, labels = torch.randn(32, 12), torch.randint(0, 7, (32,))
        expected = head.current_scale() * head.embed(x) @ running.centred_directions().t()
        assert scheduler.warming_up and torch.allclose(head(x), expected, atol=1e-6)
        scheduler.step(labels)
        running.add(head.embed(x).detach(), labels)
    # Validation and checkpoints see the prototypes, as a copy of the model does.
    x = torch.randn(5, 12)
    assert torch.equal(head.eval()(x), copy.deepcopy(head)(x))
    assert torch.allclose(head(x), head.current_scale() * head.embed(x) @ head.class_prototypes.t(), atol=1e-6)


def test_the_warmup_ends_with_the_whole_set_rotated_to_the_means(make_head):
    head = make_head()
    before = head.prototypes.clone()
    scheduler = AssignmentScheduler(head, interval=3, recipe='even')
    for step in range(3):
        assert feed(head, scheduler, step) is None
    means = scheduler.warmup.class_means.centred_directions()
    assert torch.equal(head.prototypes, before)
    update = feed(head, scheduler, 3)
    assert not scheduler.warming_up and head.training_view.class_vectors is None
    expected = align_prototypes(means, before)
    assert torch.equal(head.assignment, expected.assignment) and torch.equal(head.prototypes, expected.prototypes)
    assert torch.allclose(head.prototypes @ head.prototypes.t(), before @ before.t(), atol=1e-5)
    assert not torch.allclose(head.prototypes, before, atol=0.1)
    assert update.objective == pytest.approx(float((means * head.class_prototypes).sum()), rel=1e-5)
    assert update.objective > update.objective_before
    # Rotated prototypes are none that a seed makes.
    assert head.config.own_prototypes
    # From here on labels move alone.
    rotated = head.prototypes.clone()
    assert [feed(head, scheduler, step) is not None for step in range(4, 8)] == [False, False, True, False]
    assert torch.equal(head.prototypes, rotated)


@pytest.mark.parametrize('arguments, first', [
    (dict(interval=2, warmup_length=3), 3), (dict(interval=2, warmup_length=1, start=4), 1),
    (dict(interval=2, recipe='even'), 2), (dict(interval=2, recipe='even', stop=1), 2),
    (dict(interval=2, warmup='rotated'), 2), (dict(interval=2, warmup='none'), 2), (dict(interval=2, total=9), 8),
    (dict(interval=2, total=9, warmup_length='34 %'), 3), (dict(interval=2, total=9, recipe='even'), 2),
    (dict(interval=2, total=1), 1), (dict(interval=2, total='8 epochs', warmup_length='3 batches'), 3)])
def test_how_long_the_warmup_takes(make_head, arguments, first):
    head = make_head()
    scheduler = AssignmentScheduler(head, **arguments)
    assert scheduler.warming_up == (arguments.get('warmup') != 'none')
    updates = [feed(head, scheduler, step) for step in range(9)]
    assert next(update.step for update in updates if update) == first and not scheduler.warming_up


def test_without_the_length_of_the_training_prototypes_move_until_they_are_told_not_to(make_head):
    head = make_head()
    for options in (dict(), dict(interval=2), dict(interval=2, recipe='paper', warmup='placed')):
        scheduler = AssignmentScheduler(head, **options)
        before = head.prototypes.clone()
        for step in range(6):
            assert feed(head, scheduler, step) is None
            scheduler.epoch_end()
        assert scheduler.warming_up and not torch.allclose(head.prototypes, before, atol=1e-3)
        scheduler.clock.total = 7  # known later
        assert feed(head, scheduler, 6).event == 'placed'


def test_a_warmup_of_epochs_and_its_early_end(make_head):
    head = make_head()
    for options in (dict(warmup_length='2 epochs'), dict(total='3 epochs'), dict(interval=2, total='3 epochs'),
                    dict(recipe='even', interval=1, total='9 epochs', warmup_length='25 %')):
        scheduler = AssignmentScheduler(head, **options)
        for epoch in range(2):
            assert feed(head, scheduler, epoch) is None
            scheduler.epoch_end()
        assert feed(head, scheduler, 2).epoch == 2

    scheduler = AssignmentScheduler(head, interval=4, warmup_length=math.inf)
    assert all(feed(head, scheduler, step) is None for step in range(6))
    scheduler.end_warmup()
    assert feed(head, scheduler, 6).step == 6
    scheduler.end_warmup()
    assert feed(head, scheduler, 7) is None


def test_a_static_assignment_has_no_warmup(make_head):
    head = make_head()
    scheduler = AssignmentScheduler(head, stop=0)
    assert not scheduler.warming_up and not head.warming_up


@pytest.mark.parametrize('warmup', ['placed', 'rotated'])
@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
def test_the_papers_loss_is_the_cross_entropy_in_the_warmup_and_says_so_once(make_head, train_output, warmup):
    """A loss of distances to means that follow the embeddings would be least where all embeddings are one."""
    head = make_head(train_output=train_output)
    scheduler = AssignmentScheduler(head, interval=2, warmup=warmup)
    feed(head, scheduler, 0)
    criterion = SquaredCosineLoss(head)
    x, labels = torch.randn(8, 12), torch.randint(0, 7, (8,))
    vectors = head.class_prototypes if warmup == 'placed' else scheduler.warmup.class_means.centred_directions()
    logits = head.current_scale() * head.embed(x) @ vectors.t()
    soft = torch.softmax(torch.randn(8, 7), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for targets in (labels, soft):
            expected = nn.functional.cross_entropy(logits, targets)
            assert criterion(head(x), targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert [str(each.message)[:38] for each in caught] == ['SquaredCosineLoss is the cross-entropy']
    head.eval()
    squared = 30 * (1 - (head.embed(x) * head.class_prototypes[labels]).sum(1)).square().mean()
    assert criterion(head(x), labels).item() == pytest.approx(squared.item(), rel=1e-5)


def test_a_share_without_the_length_of_the_training_is_refused_at_the_first_step(make_head):
    head = make_head()
    scheduler = AssignmentScheduler(head, warmup_length='half')
    with pytest.raises(ValueError, match='needs the length of the training: give total'):
        feed(head, scheduler, 0)


def test_the_papers_recipe_is_the_papers(make_head):
    """A random first assignment, prototypes that never move, and its moving average of class means."""
    head = make_head(recipe='paper', seed=3)
    assert sorted(head.assignment.tolist()) == list(range(7)) != head.assignment.tolist()
    assert torch.equal(head.assignment, make_head(recipe='paper', seed=3).assignment)
    assert not torch.equal(head.assignment, make_head(recipe='paper', seed=4).assignment)
    before, table = head.prototypes.clone(), torch.zeros(7, 4)
    scheduler = AssignmentScheduler(head, interval=3)
    assert not scheduler.warming_up
    for _ in range(3):
        x, labels = torch.randn(5, 12), torch.randperm(7)[:5]
        for z, label in zip(head.embed(x).detach(), labels):
            table[label] = 0.9 * table[label] + 0.1 * z
        head(x)
        assert scheduler.step(labels) is None
    expected = nn.functional.normalize(table, dim=1)
    assert torch.allclose(scheduler.class_means.directions().float(), expected, atol=1e-5)
    means = scheduler.class_means.directions()
    update = feed(head, scheduler, 3)
    expected = solve_assignment(class_means=means, prototypes=before)
    assert torch.equal(head.assignment, expected.assignment) and update.event == 'resolve'
    assert torch.equal(head.prototypes, before) and scheduler.recipe.loss == 'squared_cosine'
