"""Accelerate: a scheduler of a prepared model, saved and loaded by the accelerator, in one process and in two."""
import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.integrations import Killed, as_launched, outcome, same, tiny_data, tiny_model
from tests.helpers.processes import run_ranks
from timm_dl2pa import AssignmentScheduler

accelerate = pytest.importorskip('accelerate', reason='needs accelerate: pip install "timm-dl2pa[accelerate]"')


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps one state for the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(folder, *, epochs=2, kill=False, resume=False, count=24, **kwargs):
    """Two epochs with a checkpoint after the first; in it, a re-solve is due and class sums wait for it."""
    from timm_dl2pa.integrations.accelerate import register_scheduler
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tiny_data(count), batch_size=4))
    scheduler = AssignmentScheduler(model, **{'interval': 4, 'total': epochs * len(loader), **kwargs})
    register_scheduler(accelerator, scheduler)
    if resume:
        accelerator.load_state(folder)
    for epoch in range(1 if resume else 0, epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step(labels)
        scheduler.epoch_end()
        if epoch == 0 and not resume:
            accelerator.save_state(folder)
            if kill:
                raise Killed
    return outcome(accelerator.unwrap_model(model), scheduler)


@pytest.mark.parametrize('options', [{}, dict(warmup='none'), dict(warmup='none', interval='epoch')])
def test_resumes_to_the_bit(tmp_path, options):
    whole = train(tmp_path / 'whole', **options)
    assert whole['scheduler']['resolver']['history']
    with pytest.raises(Killed):
        train(tmp_path / 'killed', kill=True, **options)
    assert same(whole, train(tmp_path / 'killed', resume=True, **options))


def test_the_scheduler_alone_may_be_registered(tmp_path):
    accelerator, model = accelerate.Accelerator(cpu=True), tiny_model()
    scheduler = AssignmentScheduler(accelerator.prepare(model), interval=1, warmup='none')
    accelerator.register_for_checkpointing(scheduler)
    model.train()(torch.randn(4, 3, 32, 32))
    scheduler.step(torch.arange(4))
    accelerator.save_state(tmp_path)
    before = outcome(model, scheduler)
    model(torch.randn(4, 3, 32, 32))
    scheduler.step(torch.arange(4))
    accelerator.load_state(tmp_path)
    assert same(before, outcome(model, scheduler))


def test_other_schedulers_are_refused():
    from timm_dl2pa.integrations.accelerate import register_scheduler
    with pytest.raises(TypeError, match='must be an AssignmentScheduler, not StepLR'):
        register_scheduler(accelerate.Accelerator(cpu=True), torch.optim.lr_scheduler.StepLR(
            torch.optim.SGD(tiny_model().parameters(), lr=0.1), 1))


def ranks_train(rank, folder):
    as_launched(rank)
    kwargs = dict(warmup='none', interval=9, count=48)  # a re-solve between the checkpoint and the end
    torch.save(train(folder, **kwargs), f'{folder}/whole-{rank}.pt')
    fresh = accelerate.state
    fresh.AcceleratorState._reset_state(reset_partial_state=True)
    fresh.GradientState._reset_state()
    torch.save(train(folder, resume=True, **kwargs), f'{folder}/resumed-{rank}.pt')


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    run_ranks(ranks_train, str(tmp_path), folder=tmp_path)
    whole, other, resumed, other_resumed = (
        torch.load(tmp_path / f'{name}-{rank}.pt') for name in ('whole', 'resumed') for rank in range(2))
    assert torch.equal(whole['model']['fc.assignment'], other['model']['fc.assignment'])
    assert len(whole['scheduler']['resolver']['history']) == 1
    # What both processes saw before the checkpoint is in the sums of rank 0 after it, added up in another order.
    for one, again in ((whole, resumed), (other, other_resumed)):
        assert same(one['model'], again['model'])
        assert one['scheduler']['clock'] == again['scheduler']['clock']
