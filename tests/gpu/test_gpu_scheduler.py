"""The scheduler on a device: it never waits between re-solves, and re-solves, resumes and places as on the CPU."""
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.recipe_words import RECIPES, scheduler_arguments
from timm_dl2pa import AssignmentScheduler, SampledCrossEntropyLoss, SquaredCosineLoss
from timm_dl2pa.head import MANY_CLASSES

KINDS = ('hard', 'soft')


def batch(step, device, kind='hard', classes=7):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, classes, (64,), generator=generator)
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99))
    x = centres[labels] + 0.5 * torch.randn(64, 12, generator=generator)
    targets = labels if kind == 'hard' else 0.8 * nn.functional.one_hot(labels, classes) + 0.2 * nn.functional.one_hot(
        labels.flip(0), classes)
    return x.to(device), targets.to(device)


def make(make_head, device, recipe, warmup=4, interval=3, **options):
    head = make_head(neck='linear_bn', learn_scale=True).to(device)
    return head, AssignmentScheduler(head, interval=interval, **scheduler_arguments(recipe, warmup), **options)


# --- the promise that a step never waits


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_step_never_waits_for_the_gpu(make_head, cuda, recipe, kind):
    head, scheduler = make(make_head, cuda, recipe, warmup=1000, interval=1000)
    batches = [batch(step, cuda, kind) for step in range(3)]
    for number, (x, targets) in enumerate(batches):
        loss = nn.functional.cross_entropy(head(x), targets)
        loss.backward()
        if number:  # the targets of the first batch are read
            torch.cuda.set_sync_debug_mode('error')
        try:
            scheduler.step(targets)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert scheduler.steps == 3


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_whole_training_step_never_waits_for_the_gpu(make_head, cuda, recipe):
    """With pinned labels too, which come over beside the work."""
    head, scheduler = make(make_head, cuda, recipe, warmup=1000, interval=1000)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    batches = [batch(step, 'cpu') for step in range(3)]
    batches = [(x.pin_memory(), labels.pin_memory()) for x, labels in batches]
    for number, (x, labels) in enumerate(batches):
        if number:
            torch.cuda.set_sync_debug_mode('error')
        try:
            loss = nn.functional.cross_entropy(head(x.to(cuda, non_blocking=True)),
                                               labels.to(cuda, non_blocking=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(labels)
        finally:
            torch.cuda.set_sync_debug_mode('default')


class _NoCopies(TorchDispatchMode):
    """Refuses what moves numbers between devices, as `x[indices] = 0.0` does too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        # A number on the CPU that fills a tensor goes with the launch.
        if len(devices) > 1 and 'fill_' not in str(function):
            raise AssertionError(f'{function} moves numbers between {devices}')
        return out


@pytest.mark.skipif(torch.__version__ < '2.6', reason='torch 2.5 puts no parameters onto fake devices')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_step_never_waits_for_a_gpu_that_is_not_there(make_head, recipe, kind):
    """The twin of the two above, on PyTorch's fake tensors: they know their device and shape, and no numbers.

    Reading one raises, as does an operation on tensors of two devices."""
    heads = [make_head(neck='linear_bn', learn_scale=True), make_head()]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        head, plain = (head._apply(lambda tensor: torch.empty_like(tensor, device='cuda')) for head in heads)
        scheduler = AssignmentScheduler(head, interval=1000, **scheduler_arguments(recipe, 1000))
        assert scheduler.class_means.sums.device.type == 'cuda'
        scheduler._values_checked = True  # as after the first batch, whose targets are read
        criterion = SquaredCosineLoss(plain)
        for _ in range(2):
            targets = torch.zeros(16, dtype=torch.long, device='cuda') if kind == 'hard' else torch.rand(
                16, 7, device='cuda')
            with _NoCopies():
                x = torch.randn(16, 12, device='cuda')
                nn.functional.cross_entropy(head(x), targets)
                criterion(plain(x), targets)
                scheduler.step(targets)
        assert scheduler.steps == 2
        # What reads numbers is found: so the above means something.
        with pytest.raises(DataDependentOutputException):
            scheduler.class_means.sums.sum().item()
        with pytest.raises(AssertionError, match='moves numbers'), _NoCopies():
            scheduler.class_means.directions()
        with pytest.raises(AssertionError, match='moves numbers'), _NoCopies():
            scheduler.class_means.sums[torch.arange(7, device='cuda')] = 0.0


@pytest.mark.skipif(torch.__version__ < '2.6', reason='torch 2.5 puts no parameters onto fake devices')
def test_with_very_many_classes_it_never_waits_either(make_head):
    classes = MANY_CLASSES + 1
    made = make_head(num_classes=classes, prototypes=nn.functional.normalize(torch.randn(classes, 4), dim=1),
                     train_output='embeddings', learn_scale=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        head = made._apply(lambda tensor: torch.empty_like(tensor, device='cuda'))
        scheduler, criterion = AssignmentScheduler(head, interval=1000, recipe='placed'), SampledCrossEntropyLoss(head)
        scheduler._values_checked = True
        for batches in range(3):
            targets = torch.zeros(16, dtype=torch.long, device='cuda')
            with _NoCopies() if batches else nullcontext():  # in the first batch the samplers come over
                criterion(head(torch.randn(16, 12, device='cuda')), targets)
                scheduler.step(targets)
        assert scheduler.steps == 3


# --- re-solves


def run(make_head, device, recipe, steps=14, resume_at=None, **options):
    head, scheduler = make(make_head, device, recipe, **options)
    for step in range(steps):
        if step == resume_at:
            file = io.BytesIO()
            torch.save({'head': head.state_dict(), 'scheduler': scheduler.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
            head, scheduler = make(make_head, device, recipe, **options)
            head.load_state_dict(state['head'])
            scheduler.load_state_dict(state['scheduler'])
        x, labels = batch(step, device)
        head(x)
        scheduler.step(labels)
    return head, scheduler


@pytest.mark.parametrize('background', [False, True], ids=['foreground', 'background'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_resolve_finds_what_it_finds_on_a_cpu(make_head, cuda, recipe, background):
    options = dict(background=background, lag=2)
    head, scheduler = run(make_head, cuda, recipe, **options)
    expected, on_cpu = run(make_head, torch.device('cpu'), recipe, **options)
    assert len(scheduler.history) == len(on_cpu.history) >= 2
    found = [update.objective for update in scheduler.history]
    assert found == pytest.approx([update.objective for update in on_cpu.history], rel=1e-4)
    assert torch.allclose(head.class_prototypes.cpu(), expected.class_prototypes, atol=1e-3)
    assert scheduler.history[0].moved == on_cpu.history[0].moved


@pytest.mark.parametrize('resume_at', [2, 8])
@pytest.mark.parametrize('background', [False, True], ids=['foreground', 'background'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_resumed_it_goes_on_as_it_would_have(make_head, device, recipe, background, resume_at):
    options = dict(background=background, lag=2)
    head, scheduler = run(make_head, device, recipe, **options)
    resumed, after = run(make_head, device, recipe, resume_at=resume_at, **options)
    assert [update.moved for update in after.history] == [update.moved for update in scheduler.history]
    assert torch.equal(resumed.assignment, head.assignment)
    # Sums over a batch are added up in any order on a GPU.
    tolerance = 1e-5 if device.type == 'cuda' else 0.0
    assert torch.allclose(resumed.prototypes, head.prototypes, rtol=0, atol=tolerance)
    assert torch.allclose(after.class_means.sums, scheduler.class_means.sums, rtol=tolerance, atol=tolerance)
