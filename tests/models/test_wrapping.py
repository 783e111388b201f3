import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SquaredCosineLoss, make_prototypes, wrap_dl2pa
from timm_dl2pa.models.wrapping import set_module

pytestmark = pytest.mark.timm

PROVED = ['resnet50', 'convnext_tiny', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'mobilenetv3_small_100',
          'efficientnet_b0', 'mixer_s32_224', 'deit_tiny_distilled_patch16_224']
SMALL = 'test_resnet'
CLASSES = 20
SIZE = 64  # of the images, in pixels: at 224 a step in bfloat16 takes ten times as long, where the CPU has none


def heads_of(model):
    found = model.get_classifier()
    return [found] if isinstance(found, nn.Module) else list(found)


@pytest.fixture(scope='module', params=PROVED)
def wrapped(request):
    """A wrapped model, and its backbone's state from before wrapping. Tests leave the weights as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sized = timm.get_pretrained_cfg(request.param).fixed_input_size
        model = timm.create_model(request.param, num_classes=CLASSES, **({'img_size': SIZE} if sized else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {**model.pretrained_cfg, 'architecture': 'dl2pa', 'tag': None}, model.num_features
    assert wrap_dl2pa(model, dim=8) is model
    # It says how timm's registry makes it: for timm's own exports.
    assert (model.pretrained_cfg, model.num_features) == attributes and model.default_cfg is model.pretrained_cfg
    return model, before


def test_wrapping_changes_the_classifier_alone(wrapped):
    model, before = wrapped
    heads = heads_of(model)
    assert all(isinstance(head, DL2PAHead) and head.dim == 8 for head in heads)
    names = [name for name, module in model.named_modules() if isinstance(module, DL2PAHead)]
    assert len(names) == len(heads)
    after = model.state_dict()
    for name, tensor in before.items():
        if not any(name.startswith(head + '.') for head in names):
            assert torch.equal(after.pop(name), tensor)
    assert all(any(name.startswith(head + '.') for head in names) for name in after)
    assert model.num_classes == CLASSES


def test_timms_interface_goes_on_working(wrapped):
    model, _ = wrapped
    model = copy.deepcopy(model).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert logits.shape == (1, CLASSES)
        assert torch.allclose(model.forward_head(features), logits, atol=1e-4)
        pre_logits = model.forward_head(features, pre_logits=True)
        head = heads_of(model)[0]
        assert pre_logits.shape == (1, head.in_features)
        if len(heads_of(model)) == 1:
            assert torch.allclose(head(pre_logits), logits, atol=1e-4)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(last, logits, atol=1e-3)
    unprotected = getattr(model, 'no_weight_decay', lambda: set())()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=unprotected)
    scales = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert all(scales[id(p)] == 1.0 for head in heads_of(model) for p in head.parameters())  # the last layer's
    assert min(scales.values()) < 1.0 and len(scales) == len(list(model.parameters()))


@pytest.mark.slow
def test_trains_a_step(wrapped):
    model, _ = wrapped
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(True)
    scheduler = AssignmentScheduler(model, interval=1, warmup='none')
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        labels = torch.randint(0, CLASSES, (2,))
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(torch.randn(2, 3, SIZE, SIZE))
            loss = F.cross_entropy(logits, labels)
        assert logits.dtype == torch.float32
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing and all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        update = scheduler.step(labels)
    assert update is not None and torch.isfinite(loss)
    neck = heads_of(model)[0].neck[0].weight
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
    assert sum(changed) > 0.9 * len(changed) and neck.requires_grad
    assert len({tuple(head.assignment.tolist()) for head in heads_of(model)}) == 1


def small(**kwargs):
    return timm.create_model(SMALL, num_classes=CLASSES, **kwargs)


def test_device_dtype_and_mode_are_the_models():
    model = wrap_dl2pa(small().to(torch.bfloat16).eval(), 8)
    head = model.get_classifier()
    assert head.neck[0].weight.dtype == torch.bfloat16 and head.prototypes.dtype == torch.float32 and not head.training
    assert model(torch.randn(2, 3, 64, 64).bfloat16()).dtype == torch.float32
    with torch.device('meta'):
        model = small()
    head = wrap_dl2pa(model, 8).get_classifier()
    assert head.neck[0].weight.is_meta and head.prototypes.is_meta


def test_arguments_reach_the_head():
    points = make_prototypes(25, 6)
    model = wrap_dl2pa(small(), 6, num_classes=22, prototypes=points, neck='linear_bn', scale=7.0,
                       train_output='embeddings', seed=3)
    config = model.get_classifier().config
    assert (config.num_classes, config.num_prototypes, config.neck, config.scale) == (22, 25, 'linear_bn', 7.0)
    assert model.num_classes == 22 and torch.equal(model.get_classifier().prototypes, points)
    x = torch.randn(2, 3, 64, 64)
    assert model.train()(x).shape == (2, 6) and model.eval()(x).shape == (2, 22)
    assert wrap_dl2pa(small(), 4, num_prototypes=30, learn_scale=True).get_classifier().prototypes.shape == (30, 4)
    assert wrap_dl2pa(small()).get_classifier().dim == 128
    features = small().num_features
    assert isinstance(wrap_dl2pa(small(), features, neck='none').get_classifier().neck, nn.Identity)


def test_models_without_classes_and_wrapped_ones_can_be_wrapped():
    model = timm.create_model(SMALL, num_classes=0)
    with pytest.raises(ValueError, match='num_classes must be given'):
        wrap_dl2pa(model, 8)
    wrap_dl2pa(model, 8, num_classes=5)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5) and model.num_classes == 5
    wrap_dl2pa(model, 3)
    assert model.get_classifier().dim == 3 and model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_several_classifiers_get_heads_with_their_own_tensors():
    model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=CLASSES, img_size=SIZE)
    wrap_dl2pa(model, 8, learn_scale=False, prototypes=make_prototypes(CLASSES, 8, seed=9))
    main, distilled = model.get_classifier()
    assert torch.equal(main.prototypes, distilled.prototypes)
    for name, tensor in main.state_dict().items():
        assert tensor.data_ptr() != distilled.state_dict()[name].data_ptr()
    model.set_distilled_training(True)
    one, two = model.train()(torch.randn(2, 3, SIZE, SIZE))
    assert one.shape == two.shape == (2, CLASSES)
    # The average of logits is the logits of the average embedding, so that our losses fit it too.
    model.set_distilled_training(False)
    SquaredCosineLoss(main)(model(torch.randn(2, 3, SIZE, SIZE)), torch.tensor([0, 1])).backward()
    assert main.neck[0].weight.grad is not None and distilled.neck[0].weight.grad is not None


@pytest.mark.parametrize('make, arguments, message', [
    (lambda: nn.Linear(3, 3), {}, r'Linear\) has no get_classifier'),
    (small, dict(dim=0), 'dim must be at least 1'),
    (small, dict(num_classes=1), 'num_classes must be at least 2'),
    (small, dict(neck='none', dim=8), "neck='none'"),
    (small, dict(scale=-1.0), 'scale must be between'),
    (lambda: replaced_by(nn.Bilinear(2, 2, 2)), {}, 'is a Bilinear, which wrap_dl2pa cannot replace'),
    (lambda: torch.compile(small()), {}, 'OptimizedModule around a ResNet: wrap the ResNet .* first.* torch.compile'),
    (lambda: nn.DataParallel(small()), dict(num_classes=5), 'DataParallel around a ResNet: wrap the ResNet'),
])
def test_errors_leave_the_model_as_it_was(make, arguments, message):
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        wrap_dl2pa(model, **arguments)
    assert {name: id(module) for name, module in model.named_modules()} == before


def replaced_by(classifier, path='fc', name=SMALL, **kwargs):
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    set_module(model, path, classifier)
    return model


@pytest.mark.parametrize('make, path', [
    (lambda: replaced_by(nn.Linear(64, 10)), 'fc'),
    (lambda: replaced_by(nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 10))), 'fc.1'),
    (lambda: replaced_by(nn.Linear(192, 10), 'head_dist', 'deit_tiny_distilled_patch16_224'), 'head_dist'),
    (lambda: replaced_by(nn.Linear(64, 10), 'head.fc', 'test_convnext'), 'head.fc'),
    (lambda: replaced_by(nn.Conv2d(2048, 10, 1), 'head.fc', 'resnetv2_50'), 'head.fc'),
    (lambda: replaced_by(DL2PAHead(64, 10, 4)), 'fc'),
])
def test_a_replaced_classifier_and_the_models_number_of_classes_must_agree(make, path):
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"num_classes={CLASSES}, but its classifier '{path}' has 10 rows.* Give "
                                         f'num_classes=10'):
        wrap_dl2pa(model, 8)
    assert {name: id(module) for name, module in model.named_modules()} == before
    wrap_dl2pa(model, 8, num_classes=10)
    assert model.num_classes == 10 and all(head.num_classes == 10 for head in heads_of(model))


def test_a_removed_classifier_needs_a_number_of_classes():
    with pytest.raises(ValueError, match='num_classes must be given: ResNet has no classifier'):
        wrap_dl2pa(replaced_by(nn.Identity()))


def test_a_classifier_with_hidden_layers_of_ones_own_keeps_them():
    hidden = nn.Linear(small().num_features, 12)
    model = wrap_dl2pa(replaced_by(nn.Sequential(hidden, nn.ReLU(), nn.Linear(12, CLASSES))), 8).eval()
    assert model.fc.in_features == 12 and model.fc.before[0] is hidden
    x = torch.randn(2, 3, SIZE, SIZE)
    features = hidden(model.forward_head(model.forward_features(x), pre_logits=True)).relu()
    z = nn.functional.normalize(model.fc.neck(features), dim=1)
    assert torch.allclose(model(x), model.fc.current_scale() * model.fc.cosines(z), atol=1e-5)


def test_model_ema_carries_the_assignment_in_force():
    from timm.utils import ModelEmaV3
    model = wrap_dl2pa(small(), 8)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler = AssignmentScheduler(model, interval=1, warmup='none')
    for _ in range(3):
        labels = torch.randint(0, CLASSES, (16,))
        model.train()(torch.randn(16, 3, 64, 64))
        scheduler.step(labels)
        ema.update(model)
    assert model.fc.assignment.tolist() != list(range(CLASSES))
    assert torch.equal(ema.module.fc.assignment, model.fc.assignment)
    assert torch.equal(ema.module.fc.prototypes, model.fc.prototypes)
    assert ema.module.fc.training_view.on_forward is None


@pytest.mark.slow
def test_compiled_whole_model_with_scheduler():
    torch._dynamo.reset()
    model = wrap_dl2pa(small(), 8).train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    scheduler = AssignmentScheduler(compiled, interval=1, warmup='none')
    x, labels = torch.randn(16, 3, 64, 64), torch.randint(0, CLASSES, (16,))
    for _ in range(2):
        F.cross_entropy(compiled(x), labels).backward()
        scheduler.step(labels)
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-4)


def test_distributed_data_parallel_leaves_out_the_prototypes_of_very_many_classes():
    names = '_ddp_params_and_buffers_to_ignore'
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=8_200), dim=2)
    state = model.state_dict(keep_vars=True)
    assert {'fc.prototypes', 'fc.assignment'} <= set(getattr(model, names)) & state.keys()
    compiled = torch.compile(model)
    assert set(getattr(compiled, names)) >= {name for name, _ in compiled.named_buffers() if '.fc.pro' in name} != set()
    model.reset_classifier(10)
    assert getattr(model, names) == []
    assert not hasattr(wrap_dl2pa(timm.create_model('test_resnet', num_classes=10), dim=2), names)
