"""torch.set_default_dtype(torch.float64): everything works, and prototypes stay float32."""
import pytest
import torch
import torch.nn as nn

from timm_dl2pa import (
    AssignmentScheduler,
    BalancedSoftmaxLoss,
    DL2PAHead,
    DotRegressionLoss,
    SampledCrossEntropyLoss,
    SquaredCosineLoss,
    load_head,
    prime,
)

CLASSES = 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('recipe', ['placed', 'even', 'paper'])
@pytest.mark.parametrize('criterion', [
    None, SquaredCosineLoss, DotRegressionLoss, SampledCrossEntropyLoss, BalancedSoftmaxLoss])
@pytest.mark.filterwarnings('ignore:.* is the cross-entropy')
def test_a_head_is_trained_primed_and_saved(recipe, criterion, tmp_path):
    head = DL2PAHead(8, CLASSES, 4, recipe=recipe, learn_scale=False if criterion else None)
    if criterion is None:
        criterion = nn.CrossEntropyLoss()
    else:
        criterion = criterion(CLASSES if criterion is BalancedSoftmaxLoss else head)
    scheduler = AssignmentScheduler(head, interval=2, warmup_length=2)
    x, labels = torch.randn(12, 8), torch.arange(12) % CLASSES
    for step in range(5):
        targets = nn.functional.one_hot(labels, CLASSES).double() if step % 2 else labels
        loss = criterion(head(x), targets)
        loss.backward()
        scheduler.step(targets)
    assert len(scheduler.history) == 2 and loss.dtype == torch.float32
    scheduler.load_state_dict(scheduler.state_dict())
    prime(head, [(x, labels)], scheduler, progress=False)
    assert head.neck.state_dict()['weight' if recipe == 'paper' else '0.weight'].dtype == torch.float64
    assert head.prototypes.dtype == scheduler.class_means.sums.dtype == torch.float32
    head.save_pretrained(tmp_path)
    assert torch.equal(load_head(tmp_path).eval()(x), head.eval()(x))
