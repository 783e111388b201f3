"""Wrapped and folded models outside of Python: torch.export, ONNX, TorchScript, torch.fx, int8."""
import copy
import inspect
import pickle

import pytest
import timm
import torch
from timm.layers import apply_test_time_pool
from timm.models import FeatureListNet
from timm.models._features import FeatureDictNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor
from timm.utils import reparameterize_model

from timm_dl2pa import DL2PAHead, fold_dl2pa, wrap_dl2pa
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore')]

CLASSES = 10
MODELS = {'resnet50': {}, 'convnext_tiny': {}, 'vit_tiny_patch16_224': dict(img_size=32), 'mobilenetv3_small_100': {}}


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=MODELS)
def both(request):
    """A wrapped model and the folded one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wrap_dl2pa(timm.create_model(request.param, num_classes=CLASSES, **MODELS[request.param]), 4)
        # Batch norms as after a training, so that activations keep their size.
        model.train()(torch.randn(8, 3, 32, 32))
    model.get_classifier().assign(torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0)))
    model.eval().requires_grad_(False)
    return model, fold_dl2pa(model)


def skip_what_torch_cannot_trace(model):
    if torch.__version__ < '2.6' and hasattr(model, 'patch_embed'):
        pytest.skip("torch 2.5 exports and traces no ViT of timm's, with or without a DL2PA head")


@pytest.mark.slow
@pytest.mark.parametrize('folded', [False, True])
def test_export_with_any_batch_size(both, folded):
    model = both[folded]
    skip_what_torch_cannot_trace(model)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert torch.allclose(program.module()(images(5)), model(images(5)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('folded', [False, True])
def test_onnx_with_any_batch_size(both, folded, tmp_path):
    """Wrapped by the exporter of torch.export, folded by the older, faster one."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = both[folded]
    dynamic = dict(dynamic_axes={'images': {0: 'batch'}}) if folded else \
        dict(dynamic_shapes=({0: torch.export.Dim('batch')},))
    torch.onnx.export(model, (images(),), str(tmp_path / 'model.onnx'), dynamo=not folded, verbose=False,
                      input_names=['images'], **dynamic)
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    logits, = session.run(None, {'images': images(5).numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(images(5)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_resnet', 'dla46_c'])
def test_exact_folds_go_through_all_exporters(name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model = wrap_dl2pa(timm.create_model(name, num_classes=CLASSES), 4).eval().requires_grad_(False)
    folded = fold_dl2pa(model, normalize=True)
    torch.onnx.export(folded, (images(),), str(tmp_path / 'model.onnx'), dynamo=False, input_names=['images'],
                      dynamic_axes={'images': {0: 'batch'}})
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    expected = model(images(5))
    for logits in (torch.from_numpy(session.run(None, {'images': images(5).numpy()})[0]),
                   torch.jit.trace(folded, images())(images(5)), torch.jit.script(folded)(images(5)),
                   torch.export.export(folded, (images(5),)).module()(images(5))):
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('dynamo', [False, True])
def test_timms_onnx_export(dynamo, tmp_path):
    """What timm's onnx_export.py does, on a model that the plugin made; the script itself is in test_scripts.py."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    from timm.utils import onnx
    if dynamo and 'ExportOptions' in inspect.getsource(onnx) and not hasattr(torch.onnx, 'ExportOptions'):
        pytest.skip(f'timm {timm.__version__} exports by what torch {torch.__version__} no longer has')
    with plugged_in():
        model = timm.create_model('test_resnet', num_classes=CLASSES, exportable=True, dl2pa_dim=4)
    onnx.onnx_export(model, str(tmp_path / 'model.onnx'), input_size=(3, 32, 32), batch_size=2, use_dynamo=dynamo)
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    logits, = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    assert torch.allclose(torch.from_numpy(logits), model.eval()(images(5)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('folded', [False, True])
def test_torchscript(both, folded):
    model = both[folded]
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(images(5)), model(images(5)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [('dla46_c', dict(learn_scale=True, neck='linear_bn')),
                                          ('levit_128s', dict(neck='linear_bn'))])
def test_torchscript_of_convolutions_and_several_classifiers(name, kwargs):
    model = wrap_dl2pa(timm.create_model(name, num_classes=5, **({} if 'dla' in name else {'img_size': 32})), 3,
                       **kwargs).eval()
    with torch.no_grad():
        assert torch.allclose(torch.jit.script(model)(images()), model(images()), atol=1e-4)


@pytest.mark.slow
def test_int8(both):
    _, folded = both
    quantized = torch.ao.quantization.quantize_dynamic(folded, {torch.nn.Linear}, dtype=torch.qint8)
    assert 'quantized' in type(quantized.get_classifier()).__module__
    x = images(16)
    expected, logits = folded(x), quantized(x)
    assert (logits - expected).norm() < 0.1 * expected.norm() and not torch.equal(logits, expected)


@pytest.mark.slow
def test_fx(both):
    model, _ = both
    skip_what_torch_cannot_trace(model)
    graph = torch.fx.symbolic_trace(model) if not hasattr(model, 'patch_embed') else None  # a ViT asserts its size
    if graph is not None:
        assert torch.allclose(graph(images(5)), model(images(5)), atol=1e-4)
    node = next(name for name, module in model.named_modules() if isinstance(module, DL2PAHead))
    extractor = create_feature_extractor(model, {node: 'logits'})
    assert torch.allclose(extractor(images(5))['logits'], model(images(5)), atol=1e-4)


def test_features_of_wrapped_models(both):
    model, _ = both
    plain = copy.deepcopy(model)
    plain.reset_classifier(0)
    last, levels = model.forward_intermediates(images(), indices=2)
    assert len(levels) == 2 and torch.equal(last, model.forward_features(images()))
    assert all(torch.equal(a, b) for a, b in zip(levels, plain.forward_intermediates(images(), indices=2)[1]))


def test_timms_feature_extractors():
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5), 3).eval()
    own = timm.create_model('test_resnet', features_only=True).eval()
    own.load_state_dict(model.state_dict(), strict=False)
    expected = own(images())
    for kind in (FeatureListNet, FeatureDictNet, FeatureHookNet, FeatureGraphNet):
        found = kind(copy.deepcopy(model), out_indices=(0, 1, 2, 3, 4))(images())
        found = list(found.values()) if isinstance(found, dict) else found
        assert len(found) == 5 and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_pickles_and_copies_are_complete():
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5), 3).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), model(images())) and twin.get_classifier() is twin.fc is not model.fc
        twin.reset_classifier(7)
        assert twin.fc.num_classes == 7 and model.fc.num_classes == 5 and model(images()).shape == (2, 5)


# Classifiers that timm fuses: around the heads (RepViT has two), before them (LeViT's batch norm), and none.
@pytest.mark.parametrize('name, kwargs', [('repvit_m0_9', {}), ('levit_128s', dict(img_size=32)), ('repvgg_a0', {})])
def test_reparameterization_leaves_the_heads_alone(name, kwargs):
    model = wrap_dl2pa(timm.create_model(name, num_classes=CLASSES, **kwargs), 4).eval().requires_grad_(False)
    expected = model(images())
    fused = [reparameterize_model(model), reparameterize_model(pickle.loads(pickle.dumps(model)))]
    if hasattr(model, 'fuse'):
        twin = copy.deepcopy(model)
        fused.append(twin.fuse() or twin)  # before 1.0.31, timm's returns nothing
    for each in fused:
        assert len(list(each.modules())) < len(list(model.modules()))
        assert torch.allclose(each(images()), expected, atol=1e-4)
        heads = each.get_classifier()
        assert all(isinstance(head, DL2PAHead) for head in (heads if isinstance(heads, tuple) else (heads,)))
    # A folded model is timm's again: its classifier is fused too.
    plain = fold_dl2pa(model, images=images())
    fused = reparameterize_model(plain)
    assert torch.allclose(fused(images()), plain(images()), rtol=1e-3, atol=1e-3 * plain(images()).abs().max().item())
    assert isinstance(fused.head if hasattr(fused.head, 'weight') else fused.get_classifier(), torch.nn.Linear)


def test_test_time_pooling_takes_folded_models():
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=CLASSES), 4).eval()
    larger = dict(input_size=(3, 288, 288))
    with pytest.raises(AttributeError, match=r'--test-pool.*fold the model first'):
        apply_test_time_pool(model, larger)
    pooled, applied = apply_test_time_pool(fold_dl2pa(model), larger)
    assert applied and pooled(torch.randn(1, 3, 288, 288)).shape == (1, CLASSES)
