"""A training loop that leaves out a call is told so, once."""
import warnings

import pytest
import torch

from timm_dl2pa import AssignmentScheduler


def loop(make_head, epochs=3, batches=(6, 6, 4), *, modes=True, step=True, tell=False, **options):
    head = make_head()
    scheduler = AssignmentScheduler(head, **options)
    for _ in range(epochs):
        if modes:
            head.train()
        for size in batches:
            head(torch.randn(size, 12))
            if step:
                scheduler.step(torch.arange(size))
        if modes:
            head.eval()
        if tell:
            scheduler.epoch_end()


@pytest.mark.parametrize('case', [
    {}, {'modes': False}, {'batches': (6, 6, 6)}, {'interval': 5, 'warmup_length': '2 epochs'}])
def test_epochs_that_are_never_told_are_noticed(make_head, case):
    with pytest.warns(UserWarning, match=r'no epoch_end\(\) came') as found:
        loop(make_head, epochs=8, **case)
    assert len(found) == 1


@pytest.mark.parametrize('case', [{}, {'modes': False, 'epochs': 10}])
def test_steps_that_are_never_made_are_noticed(make_head, case):
    with pytest.warns(UserWarning, match=r'forwards in training mode came and no step\(\)') as found:
        loop(make_head, step=False, **case)
    assert len(found) == 1


@pytest.mark.parametrize('case', [
    {'tell': True}, {'modes': False, 'tell': True}, {'interval': 5, 'warmup_length': 7},
    {'tell': True, 'interval': '1:2,2 epochs', 'total': '8 epochs'}])
def test_complete_loops_hear_nothing(make_head, case):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loop(make_head, epochs=8, **case)


def test_of_announced_epochs_nobody_hears_before_they_end(make_head):
    """Evaluation within the first epoch looks like the ends of several."""
    for announced in (False, True):
        head = make_head()
        scheduler = AssignmentScheduler(head)
        if announced:
            scheduler.announce_epochs()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            for _ in range(4):
                head.train()(torch.randn(6, 12))
                scheduler.step(torch.arange(6))
                head.eval()
        assert bool(found) != announced
