"""Whole models in folders: round trips, saves that fail, older and hostile folders."""
import hashlib
import json
import os
import shutil
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_dl2pa import load_model, save_model, save_prototypes, wrap_dl2pa
from timm_dl2pa import prototypes as prototypes_room
from timm_dl2pa.models.model_files import SavedModel
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = pytest.mark.timm
RECORDS = tuple(map(int, timm.__version__.split('.')[:3])) >= (1, 0, 31)  # whether timm knows a model's arguments


def make_model():
    model = timm.create_model('test_resnet', num_classes=5)
    wrap_dl2pa(model, 3, neck='linear_bn', num_prototypes=7, scale=9.0)
    model.train()(torch.randn(4, 3, 32, 32))
    model.fc.assign(torch.tensor([6, 2, 0, 1, 4]))
    return model.eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder that a model was saved to. Tests work on copies of it."""
    return save_model(make_model(), tmp_path_factory.mktemp('saved'))


def test_round_trip_to_the_bit(model, tmp_path, refuse_prototypes):
    folder = save_model(model, tmp_path / 'new' / 'model', label_names=list('abcde'))
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    (tmp_path / 'any').write_text('')
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / 'any').stat().st_mode}
    refuse_prototypes()
    state = torch.get_rng_state()
    again = load_model(folder)
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and not again.training
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())
    assert again.label_names == list('abcde') and again.fc.config == model.fc.config


def test_bfloat16_and_own_prototypes_and_several_heads(tmp_path):
    points = prototypes_room.make_prototypes(6, 4, seed=5)
    model = wrap_dl2pa(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=6, img_size=32), 4,
                       prototypes=points).to(torch.bfloat16).eval()
    again = load_model(save_model(model, tmp_path, model_args=dict(img_size=32)))
    x = torch.randn(2, 3, 32, 32).bfloat16()
    assert torch.equal(again(x), model(x)) and again.head.neck[0].weight.dtype == torch.bfloat16
    assert torch.equal(again.head_dist.prototypes, points)


def test_arguments_that_timm_does_not_record(tmp_path):
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5, in_chans=1), 3)
    if not RECORDS:
        with pytest.raises(ValueError, match='Give model_args'):
            save_model(model, tmp_path / 'model')
        assert not list(tmp_path.iterdir())
    again = load_model(save_model(model, tmp_path / 'model', model_args=dict(in_chans=1)))
    assert again(torch.randn(1, 1, 32, 32)).shape == (1, 5)


def test_wrapped_with_another_number_of_classes_than_timm_made_it_for(tmp_path):
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=9), 3, num_classes=4, seed=2 ** 62)
    again = load_model(save_model(model, tmp_path))
    assert again.num_classes == 4 and again.fc.config.seed == 2 ** 62


@pytest.mark.slow
@pytest.mark.parametrize('name, arguments', [
    ('levit_128s', dict(img_size=32)), ('crossvit_tiny_240', {}), ('volo_d1_224', dict(img_size=64)),
    ('efficientvit_m0', {}), ('poolformerv2_s12', {}), ('test_mambaout', {}), ('test_vit3', dict(img_size=32)),
])
def test_many_architectures(tmp_path, name, arguments):
    model = wrap_dl2pa(timm.create_model(name, num_classes=5, **arguments), 3).eval()
    again = load_model(save_model(model, tmp_path, model_args=arguments))
    x = torch.randn(1, 3, *model.pretrained_cfg['input_size'][1:])
    x = x[..., :arguments.get('img_size'), :arguments.get('img_size')]
    assert torch.equal(again(x), model(x))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failed_save_leaves_the_old_files(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / 'model')
    before = files_of(tmp_path / 'model')
    model.fc.assign(torch.arange(5))

    def disk_full(tensors, path, metadata=None):
        path.write_bytes(b'half')
        raise OSError('no space left')

    with monkeypatch.context() as patch:
        patch.setattr('timm_dl2pa.prototypes.files.save_file', disk_full)
        for folder in ('model', 'new/folder'):
            with pytest.raises(OSError, match='no space'):
                save_model(model, tmp_path / folder)
    assert files_of(tmp_path / 'model') == before and not (tmp_path / 'new').exists()

    replace = os.replace
    for link in (os.link, None):  # without hard links, copies serve
        calls = []

        def second_fails(source, target, calls=calls):
            calls.append(target)
            if len(calls) == 2:
                raise OSError('in use')
            replace(source, target)

        def no_links(*_):
            raise OSError('no hard links')

        with monkeypatch.context() as patch:
            patch.setattr('os.replace', second_fails)
            patch.setattr('os.link', link or no_links)
            with pytest.raises(OSError, match='in use'):
                save_model(model, tmp_path / 'model')
            assert len(calls) == 3 and files_of(tmp_path / 'model') == before
            calls.clear()
            with pytest.raises(OSError, match='in use'):
                save_model(model, tmp_path / 'new')
            assert not (tmp_path / 'new').exists()
    save_model(model, tmp_path / 'model')
    assert files_of(tmp_path / 'model').keys() == before.keys() and files_of(tmp_path / 'model') != before


def test_bad_saves(model, tmp_path):
    with pytest.raises(ValueError, match='has no DL2PAHead'):
        save_model(timm.create_model('test_resnet'), tmp_path)
    with pytest.raises(ValueError, match='5 names, one for each class, not 3'):
        save_model(model, tmp_path, label_names=list('abc'))
    with pytest.raises(ValueError, match='was not made by timm'):
        save_model(torch.nn.Sequential(model), tmp_path)
    with pytest.raises(ValueError, match=r'give the model itself, model\._orig_mod'):
        save_model(torch.compile(model), tmp_path)
    with pytest.raises(ValueError, match='JSON values'):
        save_model(model, tmp_path, model_args=dict(norm_layer=torch.nn.BatchNorm2d))
    with pytest.raises(ValueError, match='timm cannot load'):
        save_model(model, tmp_path, model_args=dict(no_such_argument=1))
    with torch.no_grad():
        model.conv1[0].weight[0] = float('nan')
    with pytest.raises(ValueError, match=r'conv1\.0\.weight is not finite'):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_timms_own_loader_takes_the_folder(model, tmp_path):
    folder = save_model(model, tmp_path, label_names=list('abcde'), **(
        dict(data_config=dict(mean=(0.1, 0.2, 0.3))) if RECORDS else {}))
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and again.label_names == list('abcde')
    for found in (again, load_model(f'local-dir:{folder}')):
        assert found.pretrained_cfg['label_names'] == list('abcde')
        assert not RECORDS or found.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)


def test_what_concerns_training_and_paths_of_the_saver_stay_behind(tmp_path):
    points = tmp_path / 'points.safetensors'
    save_prototypes(points, prototypes_room.make_prototypes(6, 3, seed=4))
    with plugged_in():
        model = timm.create_model('test_resnet', num_classes=5, dl2pa_dim=3, dl2pa_interval=7,
                                  dl2pa_prototypes=str(points)).eval()
    folder = save_model(model, tmp_path / 'model')
    text = (folder / 'config.json').read_text()
    assert 'interval' not in text and str(tmp_path) not in text
    again = load_model(folder)
    assert torch.equal(again.fc.prototypes, model.fc.prototypes) and again.fc.config == model.fc.config


def test_another_number_of_classes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = wrap_dl2pa(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, img_size=32, depth=1), 3,
                       num_prototypes=6, neck='linear_bn')
    folder = save_model(model, tmp_path, model_args=dict(img_size=32, depth=1), label_names=list('abcd'))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        again = load_model(folder, num_classes=9)
    assert [str(w.message) for w in said] == [
        f'{folder} is a model for 4 classes, not 9: its backbone and neck are kept, its prototypes and assignment are '
        'new.']
    x = torch.randn(2, 3, 32, 32)
    assert again(x).shape == (2, 9) and again.num_classes == 9 and again.label_names is None
    assert torch.equal(again.forward_features(x), model.eval().forward_features(x)) and not again.head.training
    for name in ('head', 'head_dist'):
        new, old = again.get_submodule(name), model.get_submodule(name)
        assert torch.equal(new.neck[0].weight, old.neck[0].weight)
        assert torch.equal(new.prototypes, prototypes_room.make_prototypes(9, 3)) and new.auxiliary == old.auxiliary
    assert load_model(save_model(again, tmp_path, model_args=dict(img_size=32, depth=1))).num_classes == 9


# --- damaged and hostile folders


def edit(folder, change):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change, keep_digest=False):
    """Change tensors, as one would who means harm: the sha256 fits."""
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    if not keep_digest:
        edit(folder, lambda config: config['timm_dl2pa'].update(weights_sha256=digest))


def ours(**values):
    return lambda folder: edit(folder, lambda config: config['timm_dl2pa'].update(values))


def top(**values):
    return lambda folder: edit(folder, lambda config: config.update(values))


def args(**values):
    return lambda folder: edit(folder, lambda config: config['model_args'].update(values))


def data(**values):
    return lambda folder: edit(folder, lambda config: config['pretrained_cfg'].update(values))


def head(**values):
    return lambda folder: edit(folder, lambda config: config['timm_dl2pa']['head'].update(values))


def tensors(change, **how):
    return lambda folder: edit_tensors(folder, change, **how)


HOSTILE = {
    'no json': (lambda f: (f / 'config.json').write_text('{'), 'config.json is damaged'),
    'deep json': (lambda f: (f / 'config.json').write_text('[' * 100000), 'config.json is damaged'),
    'no object': (lambda f: (f / 'config.json').write_text('[]'), 'config.json is damaged: it must hold a JSON object'),
    'garbage': (lambda f: (f / 'model.safetensors').write_bytes(b'x' * 100), 'damaged'),
    'truncated': (lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes()[:-9]),
                  'model.safetensors is damaged'),
    'newer': (ours(format=99), 'has the format 99, newer than the formats .* install a newer version'),
    'no format': (ours(format=None), 'must state its format'),
    'versions': (ours(versions=[1]), 'versions must be an object'),
    'digest': (ours(weights_sha256=5), 'weights_sha256 must be a string, not 5'),
    'no head': (ours(head=None), 'timm_dl2pa must state the config of the head'),
    'head options': (head(extra=1), 'does not know, extra'),
    'head kinds': (head(dim='3'), "config.json: dim must be int, not '3'"),
    'other head': (head(neck='linear'), "neck is 'linear' in the config of the head, and 'linear_bn' in the"),
    'other features': (head(in_features=95), 'in_features is 95 in the config of the head, and 96'),
    'architecture': (top(architecture='test_vit'), "its architecture is 'test_vit', not 'dl2pa'. It is a plain"),
    'a path': (top(architecture='local-dir:/etc'), 'its architecture is'),
    'classes': (top(num_classes=10 ** 15), 'must state one number of classes|num_prototypes must be at least'),
    'no classes': (top(num_classes='5'), 'must state one number of classes'),
    'two classes': (args(num_classes=6), 'must state one number of classes'),
    'label names': (top(label_names=['a']), 'label_names must be 5 names, one for each class, not 1'),
    'label kinds': (top(label_names=[1] * 5), 'label_names must be 5 names'),
    'no arguments': (top(model_args=[1]), 'model_args must be an object'),
    'no backbone': (args(dl2pa_backbone=None), "must be a name in timm's registry"),
    'unknown backbone': (args(dl2pa_backbone='evil'), "must be a name in timm's registry"),
    'itself': (args(dl2pa_backbone='dl2pa'), "must be a name in timm's registry"),
    'folder as backbone': (args(dl2pa_backbone='local-dir:/etc'), "must be a name in timm's registry"),
    'repository as backbone': (args(dl2pa_backbone='hf-hub:evil/model'), "must be a name in timm's registry"),
    'another backbone': (args(dl2pa_backbone='test_vit'), 'in_features is 96 in the config of the head, and 64'),
    'of the same features': (args(dl2pa_backbone='test_vit4'), 'does not match config.json: '),
    'checkpoint': (args(checkpoint_path='../../secret.pth'), "checkpoint_path='../../secret.pth' cannot be among"),
    'weights': (args(pretrained=True), 'pretrained=True cannot be among'),
    'overlay': (args(pretrained_cfg_overlay={'file': '/etc/passwd'}), 'pretrained_cfg_overlay=.* cannot be among'),
    'cache': (args(cache_dir='/tmp'), "cache_dir='/tmp' cannot be among"),
    'features': (args(features_only=True), 'features_only=True cannot be among'),
    'unknown argument': (args(evil=1), "timm cannot make 'test_resnet.r160_in1k' .*evil"),
    'large sizes': (args(in_chans=10 ** 7), r'conv1.0.weight has the shape .*, not \(.*10000000'),
    'huge sizes': (args(in_chans=10 ** 9), 'in_chans must not be 1000000000 or hold it'),
    'more than there is': (args(in_chans=10 ** 400), 'in_chans must not be 1000'),
    'huge parts': (args(layers=[1, {'a': [1, 10 ** 9]}]), 'layers must not be 1000000000 or hold it'),
    'a million layers': (args(layers=[10 ** 6] * 4), r'far more is being made than the \d+ tensors that there are'),
    'wrong kinds': (args(in_chans=[3]), 'timm cannot make'),
    'head size': (lambda f: [change(f) for change in (args(dl2pa_dim=10 ** 9), head(dim=10 ** 9))],
                  r'fc.neck.0.weight has the shape \(3, 96\), not \(1000000000, 96\)'),
    'head kind': (args(dl2pa_dim='3'), "dl2pa_dim must be int, not '3'"),
    'bool': (args(dl2pa_dim=True), 'dl2pa_dim must be int, not True'),
    'nan': (args(dl2pa_scale=float('nan')), 'scale'),
    'head option': (args(dl2pa_evil=1), 'dl2pa_evil is not an option'),
    'image size': (data(input_size=[3, 'x', 5]), 'input_size has the wrong type'),
    'mean': (data(mean=[float('nan')] * 3), 'mean has the wrong type, length or range'),
    'interpolation': (data(interpolation=5), 'interpolation has the wrong type.*5'),
    'missing': (tensors(lambda t: t.pop('fc.assignment')), 'fc.assignment is missing'),
    'more': (tensors(lambda t: t.update(evil=torch.ones(1))), 'evil is not expected'),
    'shape': (tensors(lambda t: t.update({'fc.prototypes': torch.ones(8, 3)})), r'has the shape \(8, 3\), not'),
    'long prototypes': (tensors(lambda t: t['fc.prototypes'].mul_(2)), 'fc.prototypes must have unit rows'),
    'one prototype for two': (tensors(lambda t: t['fc.assignment'].zero_()), 'fc.assignment is not an injection'),
    'outside': (tensors(lambda t: t['fc.assignment'].fill_(9)), r'fc.assignment .*outside 0\.\.6'),
    'no whole numbers': (tensors(lambda t: t.update({'fc.assignment': torch.arange(5.0)})),
                         'must have an integer dtype, not F32'),
    'negative variance': (tensors(lambda t: t['bn1.running_var'].neg_()), 'bn1.running_var must not be negative'),
    'negative variance of the neck': (tensors(lambda t: t['fc.neck.1.running_var'].neg_()),
                                      'fc.neck.1.running_var must not be negative'),
    'another scale': (lambda f: [change(f) for change in (args(dl2pa_scale=3.0), head(scale=3.0))],
                      'fc.scale is 9.0 in the tensors, and 3.0 in the config'),
    'absurd scale': (lambda f: [change(f) for change in (args(dl2pa_scale=1e30), head(scale=1e30))],
                     'scale must be between'),
    'float8': (tensors(lambda t: t.update({'conv1.0.weight': t['conv1.0.weight'].to(torch.float8_e4m3fn)})),
               'conv1.0.weight in model.safetensors must have a floating-point dtype'),
    'nan weights': (tensors(lambda t: t['conv1.0.weight'].fill_(float('nan'))), 'conv1.0.weight is not finite'),
    'other weights': (tensors(lambda t: t['conv1.0.weight'].zero_(), keep_digest=True), 'its sha256 differs'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_folders(saved, tmp_path, case, monkeypatch):
    damage, message = HOSTILE[case]
    damage(shutil.copytree(saved, tmp_path, dirs_exist_ok=True))
    for name in ('torch.load', 'timm.models._helpers._torch_load', 'timm.models._builder.load_state_dict_from_url'):
        monkeypatch.setattr(name, None)
    build = SavedModel.build

    def without_memory(saved):
        assert torch.empty(0).is_meta, 'a model was made of it'
        return build(saved)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(SavedModel, 'build', without_memory)
        load_model(tmp_path)
    # timm's own loader ends in an error too, ours or its own.
    with pytest.raises(Exception) as caught:
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert not isinstance(caught.value, MemoryError)


@pytest.mark.parametrize('depth, message', [(2000, 'far more is being made than the'),
                                            (10 ** 7, 'a tensor of 10000000 numbers is being made beside the weights')])
def test_a_small_file_that_asks_for_a_large_model(tmp_path, depth, message):
    save_model(wrap_dl2pa(timm.create_model('test_vit', num_classes=5), 3), tmp_path)
    args(depth=depth)(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=message):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained)
    (tmp_path / 'model.safetensors').unlink()  # without weights, that of timm's largest models is the limit
    args(depth=10 ** 7)(tmp_path)
    with pytest.raises(ValueError, match='a tensor of 10000000 numbers'):
        timm.create_model(f'local-dir:{tmp_path}')
    args(depth=1)(tmp_path)
    assert len(timm.create_model(f'local-dir:{tmp_path}').blocks) == 1


WITHOUT_WEIGHTS = ['deep json', 'newer', 'head options', 'other head', 'another backbone', 'checkpoint', 'large sizes',
                   'a million layers', 'head size', 'image size', 'label names', 'missing', 'more', 'float8']


@pytest.mark.parametrize('case', WITHOUT_WEIGHTS)
def test_hostile_folders_without_their_weights(saved, tmp_path, case):
    """timm's own loader, without `pretrained`: config and header are checked all the same."""
    damage, message = HOSTILE[case]
    damage(shutil.copytree(saved, tmp_path, dirs_exist_ok=True))
    with pytest.raises((ValueError, RecursionError), match=None if case == 'deep json' else message):
        timm.create_model(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('name', ['assignment', 'prototypes'])
def test_heads_that_differ(tmp_path, name):
    model = wrap_dl2pa(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=6, img_size=32, depth=1), 4)
    save_model(model, tmp_path, model_args=dict(img_size=32, depth=1))
    message = f'head_dist.{name} differs from head.{name}: all heads of a model share one assignment'
    with torch.no_grad():
        getattr(model.head_dist, name).copy_(getattr(model.head_dist, name).flip(0))
    with pytest.raises(ValueError, match=message):
        save_model(model, tmp_path, model_args=dict(img_size=32, depth=1))
    edit_tensors(tmp_path, lambda t: t[f'head_dist.{name}'].copy_(t[f'head_dist.{name}'].flip(0)))
    for load in (load_model, lambda folder: timm.create_model(f'local-dir:{folder}', pretrained=True)):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_config_brings_no_weights_without_being_asked(model, tmp_path):
    args(checkpoint_path='../secret.pth')(save_model(model, tmp_path))
    with pytest.raises(ValueError, match=r'checkpoint_path=.* cannot be among'):
        timm.create_model(f'local-dir:{tmp_path}')


def test_a_savers_file_of_prototypes_is_not_looked_for(model, tmp_path):
    """timm's own save_for_hf writes its name down."""
    args(dl2pa_prototypes='/nowhere/points.safetensors')(save_model(model, tmp_path))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    if RECORDS:
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_missing_files_and_pickles(model, tmp_path):
    save_model(model, tmp_path / 'model')
    (tmp_path / 'model' / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'has no model\.safetensors: it does not hold a DL2PA model'):
        load_model(tmp_path / 'model')
    torch.save(model.state_dict(), tmp_path / 'model' / 'pytorch_model.bin')
    for load in (load_model, lambda folder: timm.create_model(f'local-dir:{folder}', pretrained=True)):
        with pytest.raises(ValueError, match=r'only as a pickle \(pytorch_model\.bin\), which could run any code'):
            load(tmp_path / 'model')
    with pytest.raises(FileNotFoundError, match=r'has no config\.json'):
        load_model(f'local-dir:{tmp_path}')
    with pytest.raises(FileNotFoundError, match='is neither a folder nor the name of a repository'):
        load_model('../no/such/folder')
    model.fc.save_pretrained(tmp_path / 'head')
    with pytest.raises(ValueError, match='a head alone: load it with load_head'):
        load_model(tmp_path / 'head')


def test_the_number_of_classes_is_written_once(model, tmp_path):
    """transformers' TimmWrapper passes it beside `model_args`, and takes no config that has it there too."""
    config = json.loads((save_model(model, tmp_path) / 'config.json').read_text())
    assert config['num_classes'] == model.num_classes and 'num_classes' not in config['model_args']


def test_the_version_that_wrote_it_is_named(model, tmp_path):
    save_model(model, tmp_path)
    ours(versions={'timm': '9.9.9'})(tmp_path)
    args(new_argument=1)(tmp_path)
    with pytest.raises(ValueError, match=f'was written with timm 9.9.9; this is {timm.__version__}'):
        load_model(tmp_path)
