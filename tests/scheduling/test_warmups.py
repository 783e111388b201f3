"""What every warm-up promises, run over all of them: resuming, several heads, bad states, a scheduler that takes over.

(Two processes: `test_distributed.py`.)
"""
import copy
import io

import pytest
import torch
import torch.nn as nn

from tests.helpers.scheduling import feed
from timm_dl2pa import AssignmentScheduler
from timm_dl2pa.scheduling import WARMUPS

EVERY = pytest.mark.parametrize('warmup', WARMUPS)


@pytest.mark.parametrize('warmup', ['none', *WARMUPS])
@pytest.mark.parametrize('length', [4, 6])
@pytest.mark.parametrize('stopped_after', [3, 4, 5, 6])
def test_resumes_to_the_bit(make_head, stopped_after, warmup, length):
    """An unbroken run equals one that was saved, loaded in new objects and continued: before, in and after the warm-up
    and with a re-solve due."""

    def train(head, scheduler, steps):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        updates = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x, labels = torch.randn(16, 12, generator=generator), torch.randint(0, 7, (16,), generator=generator)
            nn.functional.cross_entropy(head(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            update = scheduler.step(labels)
            updates.append(update and (update.step, update.moved, update.objective_before, update.objective,
                                       update.event))
        return updates

    options = dict(interval=3, warmup=warmup, warmup_length=length)
    head = make_head()
    scheduler = AssignmentScheduler(head, **options)
    unbroken = train(head, scheduler, range(10))
    assert {update[4] for update in unbroken if update} == {'resolve'} | ({warmup} - {'none'})

    first = make_head()
    before = AssignmentScheduler(first, **options)
    updates = train(first, before, range(stopped_after))
    buffer = io.BytesIO()
    torch.save({'model': first.state_dict(), 'scheduler': before.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second = make_head()
    second.load_state_dict(state['model'])
    after = AssignmentScheduler(second, **options)
    after.load_state_dict(state['scheduler'])
    assert updates + train(second, after, range(stopped_after, 10)) == unbroken
    assert any(update and update[1] for update in unbroken)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in head.state_dict().items())
    assert torch.equal(after.class_means.sums, scheduler.class_means.sums)


@EVERY
def test_its_end_is_recorded_as_what_it_is(make_head, warmup):
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=2, warmup=warmup, warmup_length=2)
    updates = [update for step in range(8) if (update := feed(head, scheduler, step))]
    assert [update.event for update in updates] == [warmup, 'resolve', 'resolve'] and updates == scheduler.history


@EVERY
@pytest.mark.parametrize(('interval', 'length', 'first'), [(4, 6, 12), (4, 8, 12), ('epoch', 6, 12), ('epoch', 8, 12),
                                                           ('2:4,4', 6, 12), ('100', 6, None)])
def test_class_means_of_a_whole_interval_come_before_the_first_resolve(make_head, warmup, interval, length, first):
    """Class means of a few batches moved a quarter of the labels."""
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=interval, warmup=warmup, warmup_length=length)
    for step in range(14):
        feed(head, scheduler, step)
        if (step + 1) % 4 == 0:
            scheduler.epoch_end()
    assert [(update.event, update.step) for update in scheduler.history] == \
        [(warmup, length), *([('resolve', first)] if first else [])]


@EVERY
def test_several_heads_have_the_same_class_vectors(make_head, warmup):
    model = nn.ModuleList([make_head(), make_head()])
    scheduler = AssignmentScheduler(model, interval=3, warmup=warmup, warmup_length=3)
    x = torch.randn(5, 12)
    for step in range(5):
        feed(model[0], scheduler, step)
        assert model[0].warming_up == model[1].warming_up == scheduler.warming_up == (step < 3)
        one, other = (head.cosines(nn.functional.normalize(x[:, :4], dim=1)) for head in model)
        assert torch.equal(one, other) and torch.equal(model[0].prototypes, model[1].prototypes)
        assert torch.equal(model[0].assignment, model[1].assignment)
        assert model[0].prototypes.data_ptr() != model[1].prototypes.data_ptr()


@EVERY
def test_a_second_scheduler_takes_the_place_of_the_first(make_head, warmup):
    head = make_head()
    first = AssignmentScheduler(head, interval=9, warmup=warmup)
    feed(head, first, 0)
    second = AssignmentScheduler(head, interval=9, warmup='none')
    assert not first.warming_up and not second.warming_up and not head.warming_up
    assert head.training_view.class_vectors is None and head.training_view.warmup_loss is None
    third = AssignmentScheduler(head, interval=9, warmup=warmup)
    assert third.warming_up and head.warming_up
    feed(head, third, 1)
    with pytest.raises(RuntimeError, match='no embeddings'):
        first.step(torch.zeros(3, dtype=torch.long))


@EVERY
def test_a_copy_of_the_head_knows_nothing_of_it(make_head, warmup):
    head = make_head()
    scheduler = AssignmentScheduler(head, interval=9, warmup=warmup)
    feed(head, scheduler, 0)
    for other in (copy.deepcopy(head), copy.copy(head)):
        assert not other.warming_up and other.training_view.on_forward is None
        assert other.training_view.class_vectors is None and head.warming_up


@EVERY
def test_states_of_another_kind_setting_or_head_change_nothing(make_head, warmup):
    """A state in a warm-up fits a scheduler with that warm-up and its settings only."""
    scheduler = AssignmentScheduler(make_head(), interval=9, warmup=warmup)
    feed(scheduler.heads[0], scheduler, 0)
    state = scheduler.state_dict()

    def refused(message, state=state, head=None, **options):
        head = head or make_head()
        other = AssignmentScheduler(head, interval=9, **{'warmup': warmup, **options})
        prototypes, warming_up = head.prototypes.clone(), other.warming_up
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.steps == 0 and not other.class_means.sums.any() and torch.equal(head.prototypes, prototypes)
        assert other.warming_up == head.warming_up == warming_up

    for name in {'none', *WARMUPS} - {warmup}:
        refused(rf"saved state is of the warm-up '{warmup}'.*make (it|the scheduler) with the recipe", warmup=name)
    for name in state['warmup']:
        broken = {key: value for key, value in state['warmup'].items() if key != name}
        refused('lacks, or does not know|saved state is of the warm-up None', {**state, 'warmup': broken})
    for name, value in state['warmup'].items():
        if isinstance(value, torch.Tensor):
            refused('is of another head', {**state, 'warmup': {**state['warmup'], name: value[:1]}})
    refused('another head', head=make_head(num_classes=6))
    for name, value in scheduler.warmup.settings.items():
        refused(f'has {name}={value}', **{name: value / 2})
