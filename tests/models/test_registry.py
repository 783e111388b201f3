"""The entry `dl2pa` in timm's registry, and timm's own loaders."""
import json
import logging

import pytest
import timm
import torch
from timm.models import PretrainedCfg, save_for_hf

from timm_dl2pa import DL2PAHead, load_model, save_model, wrap_dl2pa
from timm_dl2pa.timm_scripts import plugged_in
from timm_dl2pa.timm_scripts.creation import plugin_options

pytestmark = pytest.mark.timm


def make(num_classes=6, **kwargs):
    kwargs = dict(dl2pa_backbone='test_resnet', dl2pa_dim=4, dl2pa_neck='linear_bn', dl2pa_scale=9.0) | kwargs
    return timm.create_model('dl2pa', num_classes=num_classes, **kwargs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = make()
    model.fc.assign(torch.randperm(6))
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    """A model and a folder as timm writes it for the Hub."""
    # timm 1.0.31 knows the arguments by itself.
    save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True, model_args=model._model_args)
    return model, tmp_path / 'saved'


def same(one, other):
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_create_model(model):
    head = model.get_classifier()
    assert isinstance(head, DL2PAHead) and (head.dim, head.num_classes, head.config.scale) == (4, 6, 9.0)
    assert timm.is_model('dl2pa') and 'dl2pa' in timm.list_models()
    backbone = timm.create_model('test_resnet', num_classes=6)
    assert type(model) is type(backbone)
    for name in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation'):
        assert model.pretrained_cfg[name] == backbone.pretrained_cfg[name]
    assert make(in_chans=1, global_pool='max')(torch.randn(2, 1, 32, 32)).shape == (2, 6)


@pytest.mark.parametrize('arguments, message', [
    (dict(dl2pa_backbone=None), 'give its name'),
    (dict(dl2pa_loss='squared_cosine'), 'dl2pa_loss: no such option.*plugin'),
    (dict(dl2pa_backbone='local-dir:/etc'), "must be a name in timm's registry"),
    (dict(dl2pa_dim=0), 'dim must be at least 1'),
    (dict(pretrained_cfg='a1_in1k'), "give the tag to the backbone, dl2pa_backbone='test_resnet.a1_in1k'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_local_dir(saved, caplog):
    model, folder = saved
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'dl2pa'
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    same(model, again)
    assert torch.equal(again.fc.assignment, model.fc.assignment) and again.fc.config.scale == 9.0
    assert not torch.equal(timm.create_model(f'local-dir:{folder}').conv1[0].weight, model.conv1[0].weight)
    with caplog.at_level(logging.WARNING):
        other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3)
    assert 'its prototypes and assignment are new, and its neck was loaded' in caplog.text
    assert other.fc.num_classes == 3 and torch.equal(other.fc.neck[0].weight, model.fc.neck[0].weight)
    assert torch.equal(other.conv1[0].weight, model.conv1[0].weight)
    assert other(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_checkpoint_path_and_overlay(saved, tmp_path):
    model, folder = saved
    file = str(folder / 'model.safetensors')
    same(model, make(checkpoint_path=file))
    same(model, make(pretrained=True, pretrained_cfg_overlay=dict(file=file)))
    same(model, make(pretrained=True, pretrained_cfg=PretrainedCfg(file=file, input_size=(3, 160, 160))))
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'backbone.pth')
    with pytest.raises(ValueError, match='not those of a DL2PA model'):
        make(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'backbone.pth')))
    assert make(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3))).pretrained_cfg['mean'] == (0.1, 0.2, 0.3)


def test_pretrained_is_the_backbones(monkeypatch):
    """Without a source of one's own; the download is left out."""
    loaded = []
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda model, **kwargs: loaded.append(
        kwargs['pretrained_cfg']['architecture']))
    assert isinstance(make(pretrained=True).fc, DL2PAHead) and loaded == ['test_resnet']


def test_features_only(saved):
    features = make(features_only=True)
    assert [tuple(level.shape[1:]) for level in features(torch.randn(2, 3, 32, 32))] == [
        tuple(level.shape[1:]) for level in timm.create_model('test_resnet', features_only=True)(
            torch.randn(2, 3, 32, 32))]
    with pytest.raises(ValueError, match="takes the backbone's weights alone"):
        timm.create_model(f'local-dir:{saved[1]}', pretrained=True, features_only=True)


def test_save_model(model, tmp_path):
    same(model, load_model(save_model(model, tmp_path)))


def test_with_the_plugin(saved):
    model, folder = saved
    with plugged_in():
        trained = make(dl2pa_interval=3)
        assert plugin_options(trained).interval == 3 and trained.fc.config == model.fc.config
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert plugin_options(again).dim == 4
        same(model, again)


def test_other_models_are_as_before():
    model = timm.create_model('test_resnet', num_classes=5)
    assert type(model.fc) is torch.nn.Linear and 'get_classifier' not in vars(model)
    wrap_dl2pa(model, 3)
    other = timm.create_model('test_resnet', num_classes=5)
    assert other.pretrained_cfg['architecture'] == 'test_resnet' and type(other.fc) is torch.nn.Linear
