"""Models inside PEFT. Without it these are skipped."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_dl2pa import AssignmentScheduler, DL2PAHead, prime, wrap_dl2pa
from timm_dl2pa.head import heads_of

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.timm

CLASSES = 6


def wrapped():
    torch.manual_seed(0)
    return wrap_dl2pa(timm.create_model('test_vit', num_classes=CLASSES, img_size=64), 4)


def adapted(**options):
    return peft.get_peft_model(wrapped(), peft.LoraConfig(**{'target_modules': ['qkv'], 'r': 2, **options}))


@pytest.fixture
def batch(generator):
    return torch.randn(16, 3, 64, 64, generator=generator), torch.arange(16) % CLASSES


@pytest.mark.parametrize('targets', [['qkv'], 'all-linear'])
def test_the_head_that_is_trained_is_found_saved_and_merged(batch, targets, tmp_path):
    x, labels = batch
    model = adapted(target_modules=targets, modules_to_save=['head'])
    head, = heads_of(model)
    assert head is model.base_model.model.head.modules_to_save['default'] and model.get_classifier() is head
    scheduler = AssignmentScheduler(model, interval=2, warmup_length=2)
    prime(model, [batch], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        nn.functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(labels)
    assert [update.event for update in scheduler.history] == ['placed', 'resolve']
    expected = model.eval()(x)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(wrapped(), str(tmp_path)).eval()
    assert torch.equal(loaded(x), expected)
    with model.disable_adapter():
        assert heads_of(model)[0] is model.base_model.model.head.original_module
    merged = model.merge_and_unload()
    assert isinstance(merged.get_classifier(), DL2PAHead)
    assert torch.allclose(merged.eval()(x), expected, atol=1e-4)


@pytest.mark.parametrize('targets', [['qkv'], 'all-linear'])
def test_a_head_that_peft_would_lose_is_told_of(targets):
    with pytest.warns(UserWarning, match=r"PEFT will not save the DL2PAHead '.*head'.*modules_to_save=\['head'\]"):
        AssignmentScheduler(adapted(target_modules=targets))


def test_a_neck_with_an_adapter_is_primed_if_that_is_exact(batch):
    x, _ = batch
    plain, model = wrapped(), adapted(target_modules='all-linear')
    assert type(heads_of(model)[0].neck[0]).__module__.startswith('peft')
    for each in (plain, model):
        prime(each, [batch], progress=False)
    assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-4)
    for name, parameter in heads_of(model)[0].neck.named_parameters():
        if 'lora_B' in name:
            parameter.data.normal_()
    before = copy.deepcopy(model.state_dict())
    for refused in (model, adapted(target_modules='all-linear', use_dora=True)):
        with pytest.raises(ValueError, match=r'cannot set the neck: .*an adapter of PEFT \(Linear\)'):
            prime(refused, [batch], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_inside_peft_is_wrapped_before():
    model = timm.create_model('test_vit', num_classes=CLASSES, img_size=64)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv'], r=2))
    with pytest.raises(ValueError, match=r'PeftModel around a VisionTransformer: wrap .* first.* get_peft_model'):
        wrap_dl2pa(model, 4)
