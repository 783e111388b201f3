"""Whole training steps on a device: a plain loop, timm's task with its scaler, several processes, CUDA graphs."""
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.recipe_words import RECIPES, plugin_options, scheduler_arguments
from timm_dl2pa import AssignmentScheduler, DL2PAHead
from timm_dl2pa.timm_scripts import plugged_in

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
from training_step import GraphedStep, PlainStep

pytestmark = pytest.mark.slow
CLASSES = 5


def images_of(step, device, channels_last=False, count=20):
    generator = torch.Generator().manual_seed(step)
    patterns = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = (patterns[labels] + torch.randn(count, 3, 32, 32, generator=generator)).to(device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels.to(device)


def small_model():
    """Return a network with a DL2PA head that a CPU trains in a moment, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        DL2PAHead(512, CLASSES, 3, neck='linear_bn', learn_scale=True))


def timm_model(**options):
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=CLASSES, dl2pa_dim=3, **options)


@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('precision', [None, 'bfloat16'], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_plain_loop_learns(device, recipe, precision, channels_last):
    model = small_model().to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    scheduler = AssignmentScheduler(model, interval=4, **scheduler_arguments(recipe, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(40):
        images, labels = images_of(step, device, channels_last)
        with torch.autocast(device.type, getattr(torch, precision)) if precision else nullcontext():
            logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(labels)
        losses.append(loss.item())
    assert not scheduler.warming_up and scheduler.history
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    with torch.no_grad():
        images, labels = images_of(1000, device, channels_last)
        assert (model.eval()(images).argmax(dim=1) == labels).float().mean() > 0.6


@pytest.mark.parametrize('recipe', RECIPES)
def test_timms_task_with_its_scaler(device, recipe):
    """Float16, as train.py's --amp --amp-dtype float16 trains."""
    with plugged_in():
        model = timm_model(dl2pa_interval=4, dl2pa_warmup_length=4, **plugin_options(recipe)).to(device)
        task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=device, verbose=False)
        scaler = NativeScaler(device=device.type)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for epoch in range(2):
            task.get_trainable_module().train()
            for step in range(6):
                images, labels = images_of(6 * epoch + step, device, count=10)
                with torch.autocast(device.type, torch.float16):
                    loss = task(images, labels)['loss']
                optimizer.zero_grad()
                scaler(loss, optimizer, parameters=task.get_clip_parameters(), need_update=True)
                task.update_ema(step=step)
                losses.append(loss.item())
            task.get_eval_model().eval()
    assert task.assignment_scheduler.steps == 12 and task.assignment_scheduler.history
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_timms_task_compiled_under_autocast_while_prototypes_are_placed(device):
    """As train.py's --amp --torchcompile: the compiled graph keeps the prototypes themselves for the backward pass."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        with plugged_in():
            model = timm_model().to(device)
            task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=device, verbose=False)
            if compiled:
                task.compile(backend='inductor' if device.type == 'cuda' else 'aot_eager')
            task.get_trainable_module().train()
            losses = []
            for step in range(3):
                images, labels = images_of(step, device)
                with torch.autocast(device.type, torch.bfloat16):
                    losses.append(task(images, labels)['loss'])
                losses[-1].backward()
        found.append((torch.stack(losses).detach(), model.get_classifier().prototypes, model.fc.neck[0].weight.grad))
    for plain, other in zip(*found):
        assert torch.allclose(plain, other, rtol=0.05, atol=0.05 * plain.abs().max().item())


# --- several processes, of which there is one: the calls are those of several


def _in_process(rank, folder, device_name, recipe, sync_bn, background):
    device = torch.device(device_name)
    answer = _train(device, recipe, sync_bn, background, distributed=True)
    torch.save(answer, f'{folder}/answer.pt')


def _train(device, recipe, sync_bn, background, distributed):
    model = small_model().to(device)
    if sync_bn:
        model = convert_sync_batchnorm(model)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in model[-1].modules())
    inner = model
    if distributed:
        model = DistributedDataParallel(model, device_ids=[0] if device.type == 'cuda' else None)
    scheduler = AssignmentScheduler(model, interval=3, background=background, lag=2, **scheduler_arguments(recipe, 4))
    for step in range(12):
        images, labels = images_of(step, device)
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()
        scheduler.step(labels)
    scheduler.merge()
    head = inner[-1]
    return {'assignment': head.assignment.cpu(), 'prototypes': head.prototypes.cpu(),
            'sums': scheduler.class_means.sums.cpu(), 'steps': [update.step for update in scheduler.history]}


@pytest.mark.parametrize('recipe, sync_bn, background', [
    ('placed', True, False), ('even', False, False), ('paper', False, True)])
def test_one_process_of_a_distributed_run(tmp_path, device, recipe, sync_bn, background):
    # Synchronised batch norm is for GPUs alone.
    sync_bn &= device.type == 'cuda'
    run_ranks(_in_process, str(tmp_path), device.type, recipe, sync_bn, background, folder=tmp_path, count=1,
              backend='nccl' if device.type == 'cuda' else 'gloo')
    found = torch.load(tmp_path / 'answer.pt')
    expected = _train(device, recipe, False, background, distributed=False)
    assert found['steps'] == expected['steps'] and len(found['steps']) >= 2
    assert torch.equal(found['assignment'], expected['assignment'])
    assert torch.allclose(found['prototypes'], expected['prototypes'], atol=1e-4)
    assert torch.allclose(found['sums'], expected['sums'], atol=1e-3)


# --- CUDA graphs


def test_compiled_into_cuda_graphs_while_the_assignment_changes(make_head, cuda):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    head, eager = make_head(num_classes=20, dim=8).to(cuda), make_head(num_classes=20, dim=8).to(cuda)
    scheduler = AssignmentScheduler(head, interval=4, warmup='none')
    compiled = torch.compile(head, mode='reduce-overhead', fullgraph=True)
    assignments = set()
    for step in range(16):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 12, generator=generator).to(cuda)
        labels = torch.randint(0, 20, (32,), generator=generator).to(cuda)
        scheduler.resolve_if_due()
        eager.assign(head.assignment)
        assignments.add(tuple(head.assignment.tolist()))
        torch.compiler.cudagraph_mark_step_begin()
        loss = nn.functional.cross_entropy(compiled(x), labels)
        loss.backward()
        expected = nn.functional.cross_entropy(eager(x), labels)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert torch.allclose(head.neck.weight.grad, eager.neck.weight.grad, atol=1e-5)
        scheduler.step(labels)
        head.zero_grad()
        eager.zero_grad()
    assert len(assignments) > 1
    assert not torch._dynamo.utils.counters['inductor']['cudagraph_skips']


@pytest.mark.parametrize('recipe', RECIPES)
def test_the_training_step_recorded_by_hand(cuda, recipe):
    """What benchmarks/accuracy.py trains with on a GPU."""
    def train(graphed):
        torch.manual_seed(0)
        head = DL2PAHead(16, CLASSES, 3, neck='linear_bn', learn_scale=True)
        model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), head).to(cuda)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
        scheduler = AssignmentScheduler(model, interval=5, **scheduler_arguments(recipe, 8))
        step = PlainStep(model, nn.CrossEntropyLoss(), optimizer, nullcontext)
        step = GraphedStep(step, head) if graphed else step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        losses = []
        with torch.cuda.stream(stream):
            for number in range(24):
                images, labels = images_of(number, cuda)
                scheduler.resolve_if_due()
                losses.append(float(step(images, labels, 0.05 / (1 + number))))
                scheduler.step(labels)
        torch.cuda.synchronize()
        return step, losses, scheduler

    step, losses, scheduler = train(graphed=True)
    _, expected, plain = train(graphed=False)
    assert step.failure is None and step.replays >= 10
    assert losses == pytest.approx(expected, rel=2e-2)
    assert [update.step for update in scheduler.history] == [update.step for update in plain.history]
