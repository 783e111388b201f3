"""Averages of models (EMA, SWA): they work, or say in evaluation what is wrong."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from timm_dl2pa import AssignmentScheduler, DL2PAHead
from timm_dl2pa.head.averages import copy_class_vectors, digits_of


def moved(make_head, **options):
    head = make_head(neck='linear', **options)
    head.assign(torch.randperm(len(head.prototypes), generator=torch.Generator().manual_seed(3))[:7])
    return head.eval()


def averaged(head, updates=30):
    average = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(updates):
        average.update_parameters(head)
    return average.eval()


@pytest.mark.parametrize('num_prototypes', [7, 19])
def test_an_average_over_all_buffers_keeps_an_assignment_that_did_not_change(make_head, num_prototypes):
    head, x = moved(make_head, num_prototypes=num_prototypes), torch.randn(5, 12)
    average = averaged(head)
    average.update_parameters(head)
    assert not torch.equal(average.module.assignment, head.assignment)  # what the average made of it
    assert torch.allclose(average(x), head(x), atol=1e-6)
    assert torch.equal(average.module.assignment, head.assignment)
    average.update_parameters(head)
    assert torch.allclose(average(x), head(x), atol=1e-6)


@pytest.mark.parametrize('decay', [0.9, 0.999])
def test_an_average_whose_terms_are_rounded_keeps_the_assignment_of_many_classes(decay):
    """`get_ema_avg_fn` adds two products: large equal numbers drift apart, by 0.01 at 1,000 after 300 updates."""
    points = nn.functional.normalize(torch.randn(70_000, 3), dim=1)
    head = DL2PAHead(12, 70_000, 3, prototypes=points, neck='linear').eval()
    head.assign(torch.randperm(70_000, generator=torch.Generator().manual_seed(0)))
    average = AveragedModel(head, avg_fn=get_ema_avg_fn(decay), use_buffers=True).eval()
    for _ in range(300):
        average.update_parameters(head)
    assert not torch.equal(average.module.averaged_assignment, digits_of(head.assignment))
    average(torch.randn(2, 12))
    assert torch.equal(average.module.assignment, head.assignment)


@pytest.mark.parametrize('use', [lambda head: head(torch.randn(5, 12)), lambda head: head.eval(),
                                 lambda head: head.save_pretrained('never written')])
def test_an_average_of_different_assignments_is_refused_at_its_first_use(make_head, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = moved(make_head)
    average = averaged(head)
    head.assign(head.assignment.roll(1))
    average.update_parameters(head)
    with pytest.raises(ValueError, match=r'average of heads with different assignments.*use_buffers=False'):
        use(average.module)
    assert not list(tmp_path.iterdir())


def test_an_average_that_copies_buffers_follows_the_assignment(make_head):
    head, x = moved(make_head), torch.randn(5, 12)
    average = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(0.9)).eval()
    for shift in range(3):
        head.assign(head.assignment.roll(shift))
        average.update_parameters(head)
        assert torch.allclose(average(x), head(x), atol=1e-6)


def test_an_average_over_a_warmup_has_unit_prototypes(make_head, tmp_path):
    """timm's ModelEmaV3 averages the floating-point entries of the state dict and copies the others."""
    head = make_head(neck='linear')
    scheduler, average = AssignmentScheduler(head, interval=5, warmup_length=100), copy.deepcopy(head).eval()
    for _ in range(8):
        nn.functional.cross_entropy(head(torch.randn(14, 12)), torch.arange(14) % 7).backward()
        scheduler.step(torch.arange(14) % 7)
        for own, other in zip(average.state_dict().values(), head.state_dict().values(), strict=True):
            own.lerp_(other, 0.2) if own.is_floating_point() else own.copy_(other)
    assert (average.prototypes.norm(dim=1) < 0.99).any()
    directions = nn.functional.normalize(average.prototypes, dim=1)
    average.save_pretrained(tmp_path)
    assert torch.allclose(average.prototypes, directions, atol=1e-6) and average.config.own_prototypes
    assert torch.equal(DL2PAHead.from_pretrained(tmp_path).prototypes, average.prototypes)


@pytest.mark.parametrize('value, message', [(float('nan'), 'finite: row 2'), (0.0, 'row 2 has the length 0')])
def test_prototypes_without_a_direction_are_refused_in_evaluation(make_head, value, message):
    head = make_head().eval()
    head.prototypes[2] = value
    with pytest.raises(ValueError, match=message):
        head(torch.randn(5, 12))


@pytest.mark.parametrize('copied', [
    copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head)), nn.Module.double, lambda head: head.half().float()])
def test_what_is_written_into_the_assignment_alone_stays(make_head, copied):
    head = copied(moved(make_head))
    written = head.assignment.roll(2)
    head.assignment.copy_(written)
    head(torch.randn(5, 12).to(head.neck.weight.dtype))
    assert torch.equal(head.assignment, written) and torch.equal(head.averaged_assignment, digits_of(written))
    head.load_state_dict({**head.state_dict(), 'assignment': written.roll(1)})
    head(torch.randn(5, 12).to(head.neck.weight.dtype))
    assert torch.equal(head.assignment, written.roll(1))


def test_nothing_is_read_of_a_head_that_nobody_wrote_into(make_head, monkeypatch):
    head = moved(make_head)
    head(torch.randn(5, 12))
    monkeypatch.setattr('timm_dl2pa.head.module.settle_average', None)
    head(torch.randn(5, 12))
    head.train().eval()(torch.randn(5, 12))
    head.prototypes.mul_(1)
    with pytest.raises(TypeError):
        head(torch.randn(5, 12))


def test_class_vectors_are_copied_into_an_average(make_head):
    head, x = moved(make_head), torch.randn(5, 12)
    average = AveragedModel(head, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for seed in range(3):
        average.update_parameters(head)
        points = torch.nn.functional.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)))
        head.assign(head.assignment.roll(1), points)
    average.update_parameters(head)
    copy_class_vectors(head, average.module)
    for name in ('prototypes', 'assignment', 'scale'):
        assert torch.equal(getattr(average.module, name), getattr(head, name))
    assert torch.allclose(average.eval()(x), head(x), atol=1e-4)
    assert average.module.config == head.config and average.module.config.own_prototypes


@pytest.mark.parametrize('scale', [None, 7.3])
def test_tensors_that_are_put_in_place_one_by_one_are_followed(make_head, tmp_path, scale):
    """As transformers loads: into a module of the meta device, tensor by tensor, the others uninitialised."""
    head = moved(make_head, learn_scale=scale is None, **({} if scale is None else {'scale': scale}))
    with torch.device('meta'):
        other = make_head(neck='linear', learn_scale=scale is None)
    for name, value in head.state_dict().items():
        module = other.get_submodule(name.rpartition('.')[0])
        kind = nn.Parameter if name.rpartition('.')[2] in module._parameters else torch.Tensor.clone
        setattr(module, name.rpartition('.')[2], kind(value))
    other.averaged_assignment = torch.full((4, 7), float('nan'))
    other.init_non_persistent_buffers()
    assert torch.equal(other.averaged_assignment, digits_of(head.assignment))
    assert other.config.own_prototypes and other.config.scale == pytest.approx(head.config.scale, rel=1e-6)
    other.averaged_assignment.mul_(1)  # as an average over all buffers does
    x = torch.randn(5, 12)
    assert torch.equal(other.eval()(x), head(x))
    other.save_pretrained(tmp_path)
