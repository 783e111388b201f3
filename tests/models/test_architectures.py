"""One model of each of timm's modules, the smallest; benchmarks/architectures.py has them all."""
import gc

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_dl2pa import AssignmentScheduler, make_prototypes, wrap_dl2pa
from timm_dl2pa.head import heads_of

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore')]

VERSION = tuple(map(int, timm.__version__.split('.')[:3]))
CLASSES = 5
# The smallest images, in pixels, that each takes; 32 where nothing is said.
SIZES = {'crossvit_tiny_240': 240, 'csatv2': 64, 'deepseek_vit_412m': 112, 'efficientformer_l1': 224,
         'inception_resnet_v2': 96, 'inception_v3': 96, 'inception_v4': 96}
MODELS = [
    'beit_base_patch16_224', 'lambda_resnet26t', 'test_byobnet', 'cait_xxs24_224', 'coat_tiny', 'convit_tiny',
    'convmixer_768_32', 'test_convnext', 'cpubone_nano', 'cs3darknet_focus_s', 'cspnext_tiny', 'davit_tiny',
    'deit_tiny_patch16_224', 'densenet121', 'dla46x_c', 'dpn48b', 'edgenext_xx_small', 'efficientformerv2_s0',
    'test_efficientnet', 'efficientvim_m1', 'efficientvit_b0', 'efficientvit_m0', 'vit_tiny_patch16_dinov3_qkvb',
    'fasternet_t0', 'fastvit_t8', 'focalnet_tiny_srf', 'gcvit_xxtiny', 'gemma4_vit_167m', 'ghostnet_050',
    'hardcorenas_b', 'hgnetv2_b0', 'hiera_tiny_224', 'sam2_hiera_tiny', 'hrnet_w18_small', 'iformer_t',
    'inception_next_atto', 'lcnetv2_small', 'levit_128s', 'lowformer_b0', 'test_mambaout', 'test_coatnet',
    'poolformerv2_s12', 'gmlp_ti16_224', 'lcnet_035', 'mobilenetv5_base', 'mobilevit_xxs', 'mvitv2_tiny',
    'naflexvit_base_patch16_parfac_gap', 'nasnetalarge', 'nest_tiny', 'nextvit_small', 'test_nfnet', 'pit_ti_224',
    'pnasnet5large', 'pvt_v2_b0', 'qwen3_vit_88m', 'rdnet_tiny', 'regnetx_002', 'repghostnet_050', 'repvit_m1',
    'res2next50', 'resnest14d', 'test_resnet', 'resnetv2_18', 'rexnet_100', 'selecsls42', 'legacy_seresnet18',
    'sequencer2d_s', 'shvit_s1', 'skresnet18', 'starnet_s050', 'swiftformer_xs', 'swin_tiny_patch4_window7_224',
    'swinv2_tiny_window8_256', 'swinv2_cr_tiny_224', 'tiny_vit_5m_224', 'tnt_s_legacy_patch16_224', 'tresnet_m',
    'twins_svt_small', 'vgg11', 'visformer_tiny', 'test_vit', 'vit_tiny_r_s16_p8_224', 'test_vit_relpos',
    'samvit_base_patch16_224', 'vitamin_small_224', 'volo_d1_224', 'ese_vovnet19b_slim_dw', 'legacy_xception',
    'xception41p', 'xcit_nano_12_p8_224', *SIZES,
]
MOST_PARAMETERS = 40_000_000  # with more, shapes alone are checked, on the meta device


def make(name, num_classes=CLASSES):
    """A timm model and images for it; on the meta device if it is large."""
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name}')
    size = SIZES.get(name, 32)
    arguments = {'img_size': size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=num_classes, **arguments)
        images = torch.empty(2, 3, size, size)
    if sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, images = timm.create_model(name, num_classes=num_classes, **arguments), torch.rand(images.shape)
    return model, images


def trained_by_a_step(model, images):
    """The parameters, by identity, that a step in training reaches."""
    model.train().zero_grad(set_to_none=True)
    model(images).float().square().sum().backward()
    assert images.is_meta or all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return {id(p): name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (1, 0, 31), reason='older ones do not run some models on so small images')
@pytest.mark.parametrize('name', MODELS)
def test_one_model_of_each_module(name):
    model, images = make(name)
    expected = trained_by_a_step(model, images)
    assert wrap_dl2pa(model, 3, prototypes=make_prototypes(CLASSES, 3)) is model
    heads = heads_of(model)
    main = [head for head in heads if not head.auxiliary]
    assert model.get_classifier() == (main[0] if len(main) == 1 else tuple(main))

    reached = trained_by_a_step(model, images)
    backbone = {id(p) for p in model.parameters()}
    assert not [old for key, old in expected.items() if key in backbone and key not in reached]
    gone = [old for key, old in expected.items() if key not in backbone]
    assert len(gone) <= 2 * len(heads)  # weights and biases of the linear layers, and nothing else
    assert all(id(p) in reached for p in heads[0].neck.parameters())

    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, CLASSES)
        parts = model.forward_head(model.forward_features(images))
        assert parts.shape == logits.shape and (images.is_meta or torch.allclose(parts, logits, atol=1e-4))
        if len(heads) == 1:
            embeddings = heads[0].embed(model.forward_head(model.forward_features(images), pre_logits=True))
            assert embeddings.shape == (2, 3)
            if not images.is_meta:
                assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
                assert torch.allclose(heads[0].cosines(embeddings) * heads[0].current_scale(), logits, atol=1e-4)
    del model
    gc.collect()


def test_every_module_has_one():
    from timm.models._registry import _model_to_module
    # Not our own entry, nor the benchmarks' models, which other tests register.
    modules = {_model_to_module[name] for name in timm.list_models()
               if timm.model_entrypoint(name).__module__.startswith('timm.')}
    if VERSION == (1, 0, 31):  # the newest when this was written
        assert {_model_to_module[name] for name in MODELS} == modules and len(modules) == 98


@pytest.mark.skipif(not timm.is_model('qwen3_vit_88m_enc'), reason='this timm has no encoders')
def test_encoders_are_refused():
    with torch.device('meta'), pytest.raises(ValueError, match='has no get_classifier'):
        wrap_dl2pa(timm.create_model('qwen3_vit_88m_enc'), num_classes=3)


@pytest.mark.slow
@pytest.mark.parametrize('name, classifiers', [
    ('test_resnet', 1), ('dla46_c', 1), ('levit_256d', 1), ('repvit_m1', 1), ('shvit_s1', 1), ('volo_d1_224', 2),
    ('samvit_base_patch16_224', 1), ('crossvit_tiny_240', 2), ('efficientvim_m1', 4)])
def test_reset_classifier(name, classifiers):
    model, images = make(name)
    if images.is_meta and VERSION < (1, 0, 31):
        pytest.skip('older ones make tensors on the CPU in a forward on the meta device')
    wrap_dl2pa(model, 3, neck='linear_bn', scale=7.0, num_prototypes=8).eval()
    plain, _ = make(name, num_classes=0)
    with torch.no_grad():
        model.reset_classifier(0)
        assert not heads_of(model) and model.num_classes == 0
        plain.load_state_dict(model.state_dict())
        expected = plain.eval()(images)
        assert model(images).shape == expected.shape and (images.is_meta or torch.equal(model(images), expected))
        model.reset_classifier(6)
        heads = heads_of(model)
        assert len(heads) == classifiers and not heads[0].training
        config = heads[0].config
        assert (config.num_classes, config.num_prototypes, config.neck, config.scale) == (6, 6, 'linear_bn', 7.0)
        assert model(images).shape == (2, 6) and model.num_classes == 6
        model.train()
        model.reset_classifier(4)
        assert heads_of(model)[0].training and model.eval()(images).shape == (2, 4)


def test_reset_classifier_keeps_what_it_can():
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5), 6, prototypes=make_prototypes(8, 6, seed=3),
                       learn_scale=False)
    points, scale = model.fc.prototypes, model.fc.config.scale
    for bad in (1, -1):
        with pytest.raises(ValueError, match='num_classes must be at least 2'):
            model.reset_classifier(bad)
    assert model.fc.num_classes == 5
    model.reset_classifier(7, global_pool='max')  # timm's own argument
    assert torch.equal(model.fc.prototypes, points) and model.fc.config.scale != scale
    assert model.global_pool.pool_type == 'max'
    model.reset_classifier(8)  # as many as there are
    assert torch.equal(model.fc.prototypes, points)
    model.reset_classifier(6)  # none were spare: of so many, six would not be spread evenly
    assert len(model.fc.prototypes) == 6 and not model.fc.config.own_prototypes
    model = wrap_dl2pa(model, 6, prototypes=points)
    model.reset_classifier(9)  # too many for them
    assert len(model.fc.prototypes) == 9 and model.fc.dim == 6


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dla46_c', 'levit_256d', 'repvit_m0_9', 'volo_d1_224', 'crossvit_tiny_240',
                                  'samvit_base_patch16_224'])
def test_models_without_classes(name):
    model, images = make(name, num_classes=0)
    before = {key: tensor for key, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match='num_classes must be given'):
        wrap_dl2pa(model, 3)
    with pytest.raises(ValueError, match="neck='none'"):
        wrap_dl2pa(model, 3, num_classes=4, neck='none')
    assert model.num_classes == 0 and not heads_of(model)
    wrap_dl2pa(model, 3, num_classes=4)
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 4) and model.num_classes == 4
    after = dict(model.named_parameters())
    assert all(after[key] is tensor for key, tensor in before.items())


def test_what_comes_before_the_linear_layer_stays():
    model = timm.create_model('levit_256d', num_classes=5, img_size=32)
    norm = model.head.bn
    wrap_dl2pa(model, 3)
    head = model.get_classifier()
    assert head is model.head and norm in set(head.before.modules())
    assert 'head.before.bn.weight' in model.state_dict()
    wrap_dl2pa(model, 4)  # again
    assert norm in set(model.head.before.modules()) and model.head.dim == 4


def test_auxiliary_classifiers():
    model, images = make('volo_d1_224')
    wrap_dl2pa(model, 3, neck='linear_bn')
    assert heads_of(model) == [model.head, model.aux_head] and model.get_classifier() is model.head
    scheduler = AssignmentScheduler(model, interval=1, warmup_length=1)
    for _ in range(2):
        F.cross_entropy(model.train()(images), torch.tensor([0, 1])).backward()
        update = scheduler.step(torch.tensor([0, 1]))  # two embeddings, though there are many patch tokens
    assert update is not None and torch.equal(model.head.assignment, model.aux_head.assignment)
    with pytest.raises(ValueError, match="train_output='embeddings' does not work with VOLO"):
        wrap_dl2pa(model, 3, train_output='embeddings')
    assert model.head.train_output == 'logits'


def test_convolutions_make_maps():
    model, _ = make('dla46_c')
    wrap_dl2pa(model, 3, neck='linear_bn', train_output='embeddings')
    seen = []
    model.fc.training_view.on_forward = lambda embeddings, output: seen.append(embeddings)
    maps = torch.rand(2, 256, 4, 3)
    embeddings = model.fc.train()(maps)
    assert embeddings.shape == (2, 3, 4, 3) and seen[0].shape == (24, 3)
    logits = model.fc.eval()(maps)
    assert logits.shape == (2, CLASSES, 4, 3)
    assert torch.allclose(logits[1, :, 2, 0], model.fc(maps[1:, :, 2, 0])[0], atol=1e-5)
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_distilled_models_return_both_logits():
    model, images = make('repvit_m0_9')
    model = timm.create_model('repvit_m0_9', num_classes=CLASSES, distillation=True)
    wrap_dl2pa(model, 3)
    assert len(model.get_classifier()) == 2
    model.set_distilled_training(True)
    one, two = model.train()(images)
    assert one.shape == two.shape == (2, CLASSES)
    head, distilled = heads_of(model)
    both = [part.eval()(torch.rand(2, 384, generator=torch.Generator().manual_seed(0))) for part in (head, distilled)]
    mean = model.head.eval()(torch.rand(2, 384, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(mean, (both[0] + both[1]) / 2, atol=1e-5)


def test_wrapping_draws_no_random_numbers_but_for_the_neck():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    torch.manual_seed(1)
    nn.Linear(96, 3, bias=False)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    wrap_dl2pa(model, 3)
    assert torch.equal(state, torch.get_rng_state())
