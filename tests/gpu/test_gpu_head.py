"""The head's numbers on a device, in each precision, against float64."""
from contextlib import nullcontext

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn as nn

from tests.helpers import reference
from timm_dl2pa import AssignmentScheduler, DotRegressionLoss, SampledCrossEntropyLoss, SquaredCosineLoss

# Largest error of a result, as a share of its norm: of the features, rounded once, and of the products of the neck.
PRECISIONS = [(None, 2e-6), ('bfloat16', 2e-2), ('float16', 2e-3)]
IDS = ['float32', 'bfloat16', 'float16']


def autocast(device, precision):
    return nullcontext() if precision is None else torch.autocast(device.type, getattr(torch, precision))


def close(found, expected, share):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (found.detach().cpu().double() - expected).norm() / expected.norm()
    return bool(error <= share)  # and not NaN


def problem(make_head, device, **options):
    """A head with a shuffled assignment, and a batch, the same on each device."""
    head = make_head(in_features=48, num_classes=20, dim=8, **options)
    generator = torch.Generator().manual_seed(1)
    head.assign(torch.randperm(20, generator=generator))
    x, labels = torch.randn(64, 48, generator=generator), torch.randint(0, 20, (64,), generator=generator)
    return head.to(device), x.to(device), labels.to(device)


def exact(head, x, labels, loss):
    """Return logits, the loss and the gradients of the neck's weight and of the features, in float64."""
    weight, bias, x = (tensor.detach().cpu().double().requires_grad_() for tensor in
                       (head.neck.weight, head.neck.bias, x))
    embeddings = nn.functional.normalize(x @ weight.t() + bias, dim=1)
    scale, prototypes = head.current_scale().item(), head.class_prototypes.cpu().double()
    cosines = embeddings @ prototypes.t()
    plain = reference.logits(reference.embed((x @ weight.t() + bias).detach()), head.prototypes.cpu().double().numpy(),
                             head.assignment.tolist(), scale)
    assert close(scale * cosines, plain, 1e-12)  # the autograd graph is the paper's
    if loss == 'cross_entropy':
        value = nn.functional.cross_entropy(scale * cosines, labels.cpu())
    else:
        value = 30 * (1 - cosines[torch.arange(len(x)), labels.cpu()]).square().mean()
    return scale * cosines.detach(), value.detach(), *torch.autograd.grad(value, (weight, x))


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('precision, share', PRECISIONS, ids=IDS)
def test_forward_and_backward(make_head, device, precision, share, compiled, monkeypatch):
    head, x, labels = problem(make_head, device)
    logits, loss, weight_gradient, x_gradient = exact(head, x, labels, 'cross_entropy')
    scheduler = AssignmentScheduler(head, interval=100, warmup='none')  # an observer is part of the graph
    forward = head
    if compiled:
        torch.compiler.reset()
        # Seen with PyTorch 2.11: its cache of compiled graphs takes one made for bfloat16 where float16 is asked for.
        if '2.6' < torch.__version__ < '2.12':
            monkeypatch.setattr(functorch_config, 'enable_autograd_cache', False)
        forward = torch.compile(head, fullgraph=True, backend='inductor' if device.type == 'cuda' else 'aot_eager')
    x.requires_grad_()
    with autocast(device, precision):
        found = forward(x)
    assert found.dtype == torch.float32 and found.device.type == device.type
    value = nn.functional.cross_entropy(found, labels)
    value.backward()
    scheduler.step(labels)
    assert close(found, logits, share) and close(value, loss, share)
    assert close(head.neck.weight.grad, weight_gradient, 2 * share) and close(x.grad, x_gradient, 2 * share)
    sums = torch.zeros(20, 8, dtype=torch.float64).index_add_(
        0, labels.cpu(), torch.from_numpy(reference.embed(head.neck(x).detach().cpu())))
    assert close(scheduler.class_means.sums, sums, 2 * share)


@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
@pytest.mark.parametrize('precision, share', PRECISIONS, ids=IDS)
def test_the_squared_cosine_loss(make_head, device, precision, share, train_output):
    head, x, labels = problem(make_head, device, train_output=train_output)
    _, loss, weight_gradient, _ = exact(head, x, labels, 'squared_cosine')
    with autocast(device, precision):
        found = SquaredCosineLoss(head)(head(x), labels)
    found.backward()
    assert close(found, loss, 2 * share) and close(head.neck.weight.grad, weight_gradient, 4 * share)


@pytest.mark.parametrize('precision, share', PRECISIONS, ids=IDS)
def test_the_sampled_cross_entropy(make_head, device, precision, share):
    """Over all classes when all are sampled; never waiting for the device; and nearest classes are those of all."""
    head, x, labels = problem(make_head, device, train_output='embeddings', learn_scale=True)
    logits, loss, weight_gradient, _ = exact(head, x, labels, 'cross_entropy')
    criterion, few = SampledCrossEntropyLoss(head, 20), SampledCrossEntropyLoss(head, 5, label_smoothing=0.1)
    few(head(x), labels).backward()
    head.zero_grad()
    with autocast(device, precision):
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('error')
        try:
            found = criterion(head(x), labels)
            few(head(x), labels)
        finally:
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('default')
    found.backward()
    assert close(found, loss, 2 * share) and close(head.neck.weight.grad, weight_gradient, 4 * share)
    assert head.log_scale.grad.abs() > 0
    cosines = head.nearest(head.embed(x), 3)[0]
    assert close(head.current_scale() * cosines, logits.topk(3, dim=1)[0], 2e-6)


def test_dot_regression_of_hard_and_mixed_targets(make_head, device):
    head, x, labels = problem(make_head, device)
    embeddings = reference.embed(head.neck(x).detach().cpu())
    prototypes, assignment = head.prototypes.cpu().double().numpy(), head.assignment.tolist()
    expected = reference.dot_regression_loss(embeddings, labels.cpu().numpy(), prototypes, assignment)
    criterion = DotRegressionLoss(head)
    assert criterion(head(x), labels).item() == pytest.approx(expected, rel=1e-4)
    one_hot = nn.functional.one_hot(labels, 20).float()
    assert criterion(head(x), one_hot).item() == pytest.approx(expected, rel=1e-4)


def test_a_half_model_keeps_its_prototypes(make_head, device):
    head, x, _ = problem(make_head, device)
    expected = head.eval()(x).detach()
    for dtype, share in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        half = problem(make_head, device)[0].eval().to(dtype)
        assert half.prototypes.dtype == torch.float32 and torch.equal(half.prototypes, head.prototypes)
        found = half(x.to(dtype))
        assert found.dtype == torch.float32 and close(found, expected.cpu(), 2 * share)


@pytest.mark.parametrize('precision', [None, 'bfloat16'], ids=['float32', 'bfloat16'])
def test_a_batch_of_zeros_has_no_gradient_and_no_nan(make_head, device, precision):
    head = make_head(neck='none', in_features=4).to(device)
    x = torch.zeros(5, 4, device=device, requires_grad=True)
    with autocast(device, precision):
        logits = head(x)
    nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long, device=device)).backward()
    assert not logits.any() and not x.grad.any()


def test_maps_in_channels_last(make_head, device):
    head = make_head().to(device)
    head.channels_first = True
    maps = torch.randn(3, 12, 5, 4, device=device).to(memory_format=torch.channels_last)
    found = head(maps)
    expected = head(maps.contiguous())
    assert found.shape == (3, 7, 5, 4) and torch.allclose(found, expected, atol=1e-5)
