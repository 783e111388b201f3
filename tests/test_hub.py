import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dl2pa import load_model, save_model, wrap_dl2pa
from timm_dl2pa import prototypes as prototypes_room

pytestmark = pytest.mark.timm


@pytest.fixture
def model():
    model = timm.create_model('test_resnet', num_classes=5)
    wrap_dl2pa(model, 3, neck='linear_bn', num_prototypes=7, scale=9.0)
    model.train()(torch.randn(4, 3, 32, 32))
    model.fc.assign(torch.tensor([6, 2, 0, 1, 4]))
    return model.eval()


def test_round_trip_to_the_bit(model, tmp_path, monkeypatch):
    folder = save_model(model, tmp_path / 'new' / 'model', label_names=list('abcde'))
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']

    def no_optimisation(*_, **__):
        raise AssertionError('loading must not make prototypes')

    monkeypatch.setattr('timm_dl2pa.head.make_prototypes', no_optimisation)
    state = torch.get_rng_state()
    again = load_model(folder)
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and not again.training
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())
    assert again.label_names == list('abcde') and again.fc.config == model.fc.config
    assert prototypes_room.make_prototypes is not no_optimisation


def test_bfloat16_and_own_prototypes_and_several_heads(tmp_path):
    points = prototypes_room.make_prototypes(6, 4, seed=5)
    model = wrap_dl2pa(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=6, img_size=32), 4,
                       prototypes=points).to(torch.bfloat16).eval()
    again = load_model(save_model(model, tmp_path, model_args=dict(img_size=32)))
    x = torch.randn(2, 3, 32, 32).bfloat16()
    assert torch.equal(again(x), model(x)) and again.head.neck.weight.dtype == torch.bfloat16
    assert torch.equal(again.head_dist.prototypes, points)


def test_missing_model_args_are_found_before_writing(tmp_path):
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5, in_chans=1), 3)
    with pytest.raises(ValueError, match='model_args'):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())
    again = load_model(save_model(model, tmp_path, model_args=dict(in_chans=1)))
    assert again(torch.randn(1, 1, 32, 32)).shape == (1, 5)


def test_failed_save_leaves_the_old_files(model, tmp_path, monkeypatch):
    save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(tensors, path, metadata=None):
        path.write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr('timm_dl2pa.hub.save_file', disk_full)
    model.fc.assign(torch.arange(5))
    with pytest.raises(OSError, match='no space'):
        save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_saves(model, tmp_path):
    with pytest.raises(ValueError, match='has no DL2PAHead'):
        save_model(timm.create_model('test_resnet'), tmp_path)
    with pytest.raises(ValueError, match='3 names for 5 classes'):
        save_model(model, tmp_path, label_names=list('abc'))
    with pytest.raises(ValueError, match='names no architecture'):
        save_model(torch.nn.Sequential(model), tmp_path)
    with pytest.raises(ValueError, match='JSON values'):
        save_model(model, tmp_path, model_args=dict(norm_layer=torch.nn.BatchNorm2d))
    with pytest.raises(ValueError, match='timm cannot make'):
        save_model(model, tmp_path, model_args=dict(no_such_argument=1))
    assert not list(tmp_path.iterdir())


def edit(folder, change):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


@pytest.mark.parametrize('damage, error, message', [
    (lambda f: (f / 'config.json').unlink(), FileNotFoundError, r'has no config\.json'),
    (lambda f: (f / 'model.safetensors').unlink(), FileNotFoundError, r'has no model\.safetensors'),
    (lambda f: (f / 'config.json').write_text('{'), ValueError, 'damaged'),
    (lambda f: (f / 'model.safetensors').write_bytes(b'x' * 100), ValueError, 'damaged'),
    (lambda f: edit(f, lambda c: c.update(format=99)), ValueError, 'install a newer one'),
    (lambda f: edit(f, lambda c: c.pop('format')), ValueError, 'names no format'),
    (lambda f: edit(f, lambda c: c.pop('architecture')), ValueError, "no valid 'architecture'"),
    (lambda f: edit(f, lambda c: c['head'].update(extra=1)), ValueError, 'extra'),
    (lambda f: edit(f, lambda c: c['head'].update(num_prototypes=8)), ValueError, r'no prototypes .* \(8, 3\)'),
    (lambda f: edit(f, lambda c: c.update(architecture='test_vit')), ValueError, 'is not what its architecture'),
    (lambda f: edit_tensors(f, lambda t: t.pop('fc.assignment')), ValueError, 'fc.assignment is missing'),
    (lambda f: edit_tensors(f, lambda t: t['fc.prototypes'].mul_(2)), ValueError, 'unit rows'),
    (lambda f: edit_tensors(f, lambda t: t['fc.assignment'].zero_()), ValueError, 'no injection'),
])
def test_damaged_folders(model, tmp_path, damage, error, message):
    damage(save_model(model, tmp_path))
    with pytest.raises(error, match=message):
        load_model(tmp_path)
