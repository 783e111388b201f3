"""Heads in folders and on a hub: round trips, hostile files, failures."""
import hashlib
import json
import os
import warnings

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load, save

from tests.helpers.processes import python
from timm_dl2pa import DL2PAHead, load_head, make_prototypes, push_head_to_hub, wrap_dl2pa

pytestmark = pytest.mark.filterwarnings('ignore:.*HTTP upload')
LABELS = list('abcdef')


@pytest.fixture(params=['linear', 'linear_bn', 'none'])
def head(request):
    torch.manual_seed(0)
    head = DL2PAHead(5 if request.param == 'none' else 7, 6, 5, num_prototypes=8, neck=request.param,
                     learn_scale=request.param == 'linear_bn')
    head.assign(torch.randperm(8)[:6])
    head.train()(torch.randn(9, head.in_features))  # moves the batch norm
    return head.eval()


@pytest.fixture
def one():
    torch.manual_seed(0)
    return DL2PAHead(7, 6, 5, neck='linear_bn', learn_scale=False).eval()


def same(head, other):
    x = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(1))
    return torch.equal(head(x), other(x)) and head.config == other.config


# --- folders


def test_folder_round_trip_makes_no_prototypes(head, tmp_path, refuse_prototypes):
    head.save_pretrained(tmp_path / 'head', label_names=LABELS)
    assert sorted(os.listdir(tmp_path / 'head')) == ['config.json', 'model.safetensors']
    refuse_prototypes()
    state = torch.get_rng_state()
    for source in (tmp_path / 'head', str(tmp_path / 'head'), f'local-dir:{tmp_path / "head"}'):
        found = DL2PAHead.from_pretrained(source)
        assert same(head, found) and not found.training and found.label_names == LABELS
    assert torch.equal(state, torch.get_rng_state())


def test_rotated_prototypes_and_bfloat16(tmp_path):
    head = DL2PAHead(7, 6, 5, neck='linear_bn', dtype=torch.bfloat16)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    head.assign(torch.arange(6).flip(0), head.prototypes @ rotation)
    head.save_pretrained(tmp_path)
    found = load_head(tmp_path)
    assert found.neck[0].weight.dtype == torch.bfloat16 and found.prototypes.dtype == torch.float32
    assert torch.equal(found.class_prototypes, head.class_prototypes) and found.config == head.config


def test_a_failed_save_leaves_the_old_files(one, tmp_path, monkeypatch):
    one.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = DL2PAHead(7, 6, 5, neck='linear_bn')
    with pytest.raises(ValueError, match='label_names must be 6 names, one for each class, not 1'):
        other.save_pretrained(tmp_path, label_names=['a'])
    with torch.no_grad():
        other.neck[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match=r'neck.0.weight is not finite'):
        other.save_pretrained(tmp_path)
    with torch.no_grad():
        other.neck[0].weight[0, 0] = 0

    def disk_full(path, content, **_):
        raise OSError('disk full')

    monkeypatch.setattr(type(tmp_path), 'write_text', disk_full)
    for folder in (tmp_path, tmp_path / 'new' / 'folder'):
        with pytest.raises(OSError, match='disk full'):
            other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def absurd_scale(head):
    head.log_scale.data.fill_(1000)


def negative_variance(head):
    head.neck[1].running_var.fill_(-1)


def average_of_prototypes(head):
    head.prototypes[1:3].mul_(1e-4)


def average_of_assignments(head):
    head.assignment.fill_(2)


def other_layers(head):
    head.neck[0] = torch.nn.Sequential(head.neck[0])


def another_reader(head):
    head.from_pretrained = lambda source: DL2PAHead(7, 6, 5)


@pytest.mark.parametrize('change, message', [
    (absurd_scale, 'log_scale must be between -14 and 14'), (negative_variance, 'running_var must not be negative'),
    (average_of_prototypes, 'prototypes cancel each other out'), (average_of_assignments, 'not an injection'),
    (other_layers, 'cannot be saved.*(neck.0.0.weight is not expected|neck.0.weight is missing)'),
    (another_reader, 'cannot be saved.*another one would be loaded: .* differs')])
def test_what_could_not_be_loaded_replaces_nothing(hub, tmp_path, change, message):
    DL2PAHead(7, 6, 5).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    head = DL2PAHead(7, 6, 5)
    change(head)
    for save_it in (lambda: head.save_pretrained(tmp_path), lambda: head.save_pretrained(tmp_path / 'new' / 'folder'),
                    lambda: push_head_to_hub(head, 'me/head', token='hf_writer')):
        with pytest.raises(ValueError, match=message):
            save_it()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and not hub.requests


def test_files_have_the_mode_of_any_file(one, tmp_path):
    (tmp_path / 'any').write_text('')
    one.save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_what_killed_savers_left_is_removed(one, tmp_path):
    left = tmp_path / '.timm-dl2pa-part-old'
    left.mkdir()
    (left / 'model.safetensors').write_bytes(b'half')
    os.utime(left, (0, 0))
    one.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']


def test_wrap_with_a_head(tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model('test_resnet', num_classes=3)
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=6), 5, neck='linear_bn')
    model.load_state_dict({**model.state_dict(), **{name: value for name, value in backbone.state_dict().items()
                                                    if not name.startswith('fc.')}})
    model.fc.save_pretrained(tmp_path, label_names=LABELS)
    for head in (tmp_path, load_head(tmp_path)):
        wrapped = wrap_dl2pa(timm.create_model('test_resnet', num_classes=3), head=head)
        wrapped.load_state_dict({**wrapped.state_dict(), **{
            name: value for name, value in backbone.state_dict().items() if not name.startswith('fc.')}})
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(wrapped.eval()(x), model.eval()(x)) and wrapped.num_classes == 6
        assert wrapped.label_names == LABELS
    distilled = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, depth=1, num_classes=3)
    for arguments, message in ((dict(neck='none'), 'neck cannot be given together with head'),
                               (dict(dim=6, scale=3.0), 'scale, dim cannot be given together')):
        with pytest.raises(ValueError, match=message):
            wrap_dl2pa(distilled, head=tmp_path, **arguments)
    DL2PAHead(192, 3, 2).save_pretrained(tmp_path)
    wrap_dl2pa(distilled, head=tmp_path)
    assert distilled.head.prototypes.data_ptr() != distilled.head_dist.prototypes.data_ptr()


def test_another_number_of_classes_keeps_the_neck_and_warns_once(one, tmp_path):
    one.save_pretrained(tmp_path, label_names=LABELS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = load_head(tmp_path, num_classes=9)
    assert [w.filename for w in said] == [__file__] and 'a head for 6 classes, not 9' in str(said[0].message)
    assert found.num_classes == len(found.prototypes) == 9 and found.label_names is None
    assert torch.equal(found.neck[0].weight, one.neck[0].weight) and not found.training
    assert torch.equal(found.prototypes, make_prototypes(9, 5))
    with pytest.warns(UserWarning, match='not 4') as said:
        wrapped = wrap_dl2pa(timm.create_model('test_resnet'), head=DL2PAHead(96, 6, 5), num_classes=4)
    assert len(said) == 1 and said[0].filename == __file__ and wrapped.num_classes == 4


def edit(folder, tensors=None, keep_digest=False, **config):
    """Change the files of a head, as one would who means harm: the sha256 fits."""
    told = json.loads((folder / 'config.json').read_text())
    for name, value in config.items():
        (told if name in told else told['head'])[name] = value
    if tensors is not None:
        content = save({name: value for name, value in {**load((folder / 'model.safetensors').read_bytes()),
                                                        **tensors}.items() if value is not None})
        (folder / 'model.safetensors').write_bytes(content)
        if not keep_digest:
            told['weights_sha256'] = hashlib.sha256(content).hexdigest()
    (folder / 'config.json').write_text(json.dumps(told))


POINTS = make_prototypes(6, 5)
HOSTILE = {
    'huge classes': (dict(num_classes=10 ** 15, num_prototypes=10 ** 15), 'has the shape .6,., not .10{15},.'),
    'huge features': (dict(in_features=10 ** 12), r'neck.0.weight has the shape .5, 7., not .5, 1000000000000.'),
    'negative': (dict(dim=-5), 'dim must be at least 1'),
    'text': (dict(dim='5'), "config.json: dim must be int, not '5'"),
    'bool': (dict(dim=True), 'config.json: dim must be int, not True'),
    'no dimension': (dict(dim=None), 'config.json: dim must be int, not None'),
    'no number of prototypes': (dict(num_prototypes=None), 'config.json: num_prototypes must be int, not None'),
    'number for a truth': (dict(learn_scale=0), 'config.json: learn_scale must be bool, not 0'),
    'no seed': (dict(seed=None), 'config.json: seed must be int, not None'),
    'huge seed': (dict(seed=10 ** 30), 'config.json: seed must be in 0'),
    'nan scale': (dict(scale=float('nan')), 'config.json: scale must be between'),
    'huge scale': (dict(scale=10 ** 400), 'config.json: scale must be between'),
    'tiny scale': (dict(scale=1e-60), 'config.json: scale must be between 1e-06 and 1e.06, not 1e-60'),
    'another scale': (dict(scale=3.0), r'scale is 9\.\d+ in the tensors, and 3.0 in the config'),
    'list': (dict(neck=['linear']), 'config.json: neck must be str'),
    'list of recipes': (dict(recipe=['paper']), 'config.json: recipe must be str'),
    'unknown neck': (dict(neck='../../etc'), 'neck must be one of'),
    'newer': (dict(format=99), 'has the format 99, newer than'),
    'no format': (dict(format=None), 'must state its format'),
    'other library': (dict(library_name='timm'), 'is not that of a DL2PA head'),
    'more options': (dict(head={'evil': 1}), 'lacks, or does not know, .*evil'),
    'label names': (dict(label_names=['a']), 'label_names in config.json must be 6 names'),
    'label kinds': (dict(label_names=[1] * 6), 'label_names in config.json must be 6 names'),
    'no digest': (dict(weights_sha256=None), 'must state weights_sha256'),
    'prototypes': (dict(tensors={'prototypes': 2 * POINTS}), 'prototypes must have unit rows'),
    'nan prototypes': (dict(tensors={'prototypes': POINTS * float('nan')}), 'prototypes is not finite'),
    'assignment': (dict(tensors={'assignment': torch.tensor([0, 1, 2, 3, 4, 4])}), 'share the prototype 4'),
    'outside': (dict(tensors={'assignment': torch.tensor([0, 1, 2, 3, 4, 6])}), 'outside 0..5'),
    'float assignment': (dict(tensors={'assignment': torch.arange(6.0)}), 'must have an integer dtype, not'),
    'negative variance': (dict(tensors={'neck.1.running_var': -torch.ones(5)}),
                          'neck.1.running_var must not be negative'),
    'float8': (dict(tensors={'neck.0.weight': torch.ones(5, 7).to(torch.float8_e4m3fn)}), 'neck.0.weight in model'),
    'complex': (dict(tensors={'neck.0.weight': torch.ones(5, 7, dtype=torch.complex64)}), 'neck.0.weight in model'),
    'whole weights': (dict(tensors={'neck.0.weight': torch.ones(5, 7, dtype=torch.int64)}), 'neck.0.weight in model'),
    'infinite': (dict(tensors={'neck.1.bias': torch.full((5,), float('inf'))}), 'neck.1.bias is not finite'),
    'missing': (dict(tensors={'neck.1.bias': None}), 'neck.1.bias is missing'),
    'extra': (dict(tensors={'evil': torch.ones(1)}), 'evil is not expected'),
    'other weights': (dict(tensors={'neck.1.bias': torch.ones(5)}, keep_digest=True), 'its sha256 differs'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_folders(one, tmp_path, case):
    one.save_pretrained(tmp_path)
    changes, message = HOSTILE[case]
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)


def test_an_absurd_learned_scale(tmp_path):
    DL2PAHead(7, 6, 5, learn_scale=True).save_pretrained(tmp_path)
    edit(tmp_path, tensors={'log_scale': torch.tensor([1000.0])})
    with pytest.raises(ValueError, match='log_scale must be between -14 and 14, not 1000'):
        load_head(tmp_path)


def test_damaged_and_missing_files(one, tmp_path):
    one.save_pretrained(tmp_path)
    weights = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(weights[:-9])
    with pytest.raises(ValueError, match=r'model.safetensors is damaged'):
        load_head(tmp_path)
    for content in (b'{', b'\xff\xfe', b'[]'):
        (tmp_path / 'config.json').write_bytes(content)
        with pytest.raises(ValueError, match=r'config.json is (damaged|not that of a DL2PA head)'):
            load_head(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'has no model.safetensors: it does not hold a DL2PA head'):
        load_head(tmp_path)
    torch.save(one.state_dict(), tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match=r'only as a pickle \(pytorch_model.bin\)'):
        load_head(tmp_path)
    with pytest.raises(FileNotFoundError, match='is neither a folder nor the name of a repository'):
        load_head('../no/such/folder')


def test_layers_before_the_neck_belong_to_the_model(tmp_path):
    model = wrap_dl2pa(timm.create_model('levit_128s', num_classes=5, img_size=32), 3)
    with pytest.raises(ValueError, match='save the whole model'):
        model.head.save_pretrained(tmp_path / 'head')
    assert not (tmp_path / 'head').exists()


# --- the hub


def test_round_trip(hub, head):
    address = push_head_to_hub(head, 'me/head', label_names=LABELS, token='hf_writer')
    assert address.startswith(f'{hub.url}/me/head/commit/')
    assert sorted(hub.files('me/head')) == ['README.md', 'config.json', 'model.safetensors', 'prototypes.png']
    assert len(hub.repositories['me/head'].commits) == 2  # the empty one, and one with all files
    for source in ('me/head', 'hf-hub:me/head', 'hf-hub:me/head@main'):
        found = load_head(source)
        assert same(head, found) and found.label_names == LABELS
    hub.requests.clear()
    constants.HF_HUB_OFFLINE = True
    try:
        assert same(head, load_head('me/head'))
    finally:
        constants.HF_HUB_OFFLINE = False
    # Before 1.0 a client that was made with a connection keeps it.
    assert not hub.requests or huggingface_hub.__version__ < '1'
    hub.requests.clear()
    assert same(head, load_head('me/head', local_files_only=True)) and not hub.requests
    with pytest.raises(errors.LocalEntryNotFoundError):
        load_head('me/other', local_files_only=True)


def test_revisions_and_pull_requests(hub, one):
    one.push_to_hub('me/head', token='hf_writer')
    first = hub.repositories['me/head'].branches['main']
    hub.repositories['me/head'].branches['v2'] = first
    other = DL2PAHead(7, 6, 5).eval()
    other.push_to_hub('me/head', token='hf_writer', revision='v2', commit_message='second')
    assert same(one, load_head('me/head')) and same(other, load_head('me/head', revision='v2'))
    assert same(one, load_head('me/head@' + first)) and same(one, load_head('me/head', revision=first))
    address = other.push_to_hub('me/head', token='hf_writer', create_pr=True)
    assert address == f'{hub.url}/me/head/discussions/1' and same(one, load_head('me/head'))
    assert same(other, load_head('me/head', revision='refs/pr/1'))
    with pytest.raises(errors.RevisionNotFoundError):
        load_head('me/head', revision='none')


def test_the_card(hub, one):
    push_head_to_hub(one, 'me/head', label_names=LABELS, base_model='timm/resnet18.a1_in1k', license='mit',
                     metrics={'accuracy': 0.75}, token='hf_writer')
    card = hub.files('me/head')['README.md'].decode()
    for text in ('library_name: timm_dl2pa', 'pipeline_tag: image-classification', 'license: mit', 'value: 0.75',
                 'base_model: timm/resnet18.a1_in1k', "wrap_dl2pa(backbone, head='me/head')", '| classes | 6 |',
                 '![Class prototypes](prototypes.png)',
                 "timm.create_model('resnet18.a1_in1k', pretrained=True)", 'a, b, c, d, e, f', '@inproceedings'):
        assert text in card, text
    assert len(hub.repositories['me/head'].commits) == 2  # the empty one, and one with all files
    hub.put('me/head', {'README.md': b'mine'})
    one.push_to_hub('me/head', token='hf_writer')
    assert hub.files('me/head')['README.md'] == b'mine' and 'prototypes.png' not in hub.files('me/head')


def test_private_repositories_and_rights(hub, one, tmp_path):
    one.push_to_hub('me/secret', token='hf_writer', private=True)
    assert same(one, load_head('me/secret', token='hf_reader'))
    with pytest.raises(errors.RepositoryNotFoundError) as caught:
        load_head('me/secret', cache_dir=tmp_path / 'other')
    assert 'hf_' not in str(caught.value)
    for token in (None, 'hf_reader', 'hf_wrong'):
        with pytest.raises(errors.HfHubHTTPError) as caught:
            one.push_to_hub('me/other', token=token)
        assert 'hf_' not in str(caught.value) and 'me/other' not in hub.repositories


@pytest.mark.parametrize('method, path, status', [
    ('POST', '/preupload/', 500), ('PUT', '/lfs/', 403), ('POST', '/commit/', 412), ('POST', '/commit/', 429),
    ('POST', 'verify', 404), ('POST', 'validate-yaml', 400)])
def test_a_failed_upload_leaves_no_half_of_it(hub, one, method, path, status):
    attempts = [(method, path, status)] * 20  # the client tries some again
    hub.faults[:] = attempts
    with pytest.raises(RuntimeError, match='the repository me/head was created, but the upload failed, and it is'):
        one.push_to_hub('me/head', token='hf_writer')
    assert hub.files('me/head') == {}
    hub.faults.clear()
    one.push_to_hub('me/head', token='hf_writer')
    before = hub.files('me/head')
    hub.faults[:] = attempts
    other = DL2PAHead(7, 6, 5).eval()
    with pytest.raises((errors.HfHubHTTPError, RuntimeError, ValueError)) as caught:
        if path == 'validate-yaml':
            raise ValueError  # there is a card: none is sent
        other.push_to_hub('me/head', token='hf_writer')
    assert 'was made' not in str(caught.value) and 'hf_writer' not in str(caught.value)
    assert hub.files('me/head') == before


def test_bad_heads_are_not_sent(hub, one):
    with torch.no_grad():
        one.neck[0].weight.fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite'):
        one.push_to_hub('me/head', token='hf_writer')
    with pytest.raises(ValueError, match='Linear has no DL2PAHead'):
        push_head_to_hub(torch.nn.Linear(2, 3), 'me/head', token='hf_writer')
    assert not hub.requests


def test_truncated_and_corrupted_downloads(hub, one, tmp_path):
    one.push_to_hub('me/head', token='hf_writer')
    hub.faults[:] = [('GET', 'model.safetensors', 'corrupted')]
    # The client asks for the metadata by HEAD, and for the content by GET.
    with pytest.raises(ValueError, match=r'sha256 differs. Download it again \(force_download=True\)'):
        load_head('me/head')
    assert not hub.faults
    assert same(one, load_head('me/head', force_download=True))
    hub.faults[:] = [('GET', 'model.safetensors', 'truncated')] * 20
    with pytest.raises(Exception) as caught:
        load_head('me/head', cache_dir=tmp_path / 'other')
    hub.faults.clear()
    assert not isinstance(caught.value, AssertionError)
    assert same(one, load_head('me/head', cache_dir=tmp_path / 'other'))


def test_repositories_that_hold_no_head(hub, one):
    hub.put('me/pickle', {'config.json': json.dumps({}).encode(), 'pytorch_model.bin': b'evil'})
    with pytest.raises(ValueError, match=r'me/pickle has its weights only as a pickle \(pytorch_model.bin\)'):
        load_head('me/pickle')
    assert not any(path.endswith('pytorch_model.bin') for _, path in hub.requests)
    hub.put('me/empty', {})
    with pytest.raises(ValueError, match=r'me/empty has no config\.json'):
        load_head('me/empty')
    with pytest.raises(errors.RepositoryNotFoundError):
        load_head('me/nothing')


def test_the_server_refuses_what_it_does_not_know(hub):
    import urllib.error
    import urllib.request
    with pytest.raises(urllib.error.HTTPError, match='501'):
        urllib.request.urlopen(f'{hub.url}/api/spaces')
    with pytest.raises(urllib.error.HTTPError, match='400'):
        urllib.request.urlopen(urllib.request.Request(f'{hub.url}/lfs/{"0" * 64}', b'x', method='PUT'))
    hub.put('me/head', {'a': b'a'})
    commit = [json.dumps({'key': 'header', 'value': {'summary': '', 'parentCommit': 'f' * 40}}).encode()]
    request = urllib.request.Request(f'{hub.url}/api/models/me/head/commit/main', b'\n'.join(commit), method='POST',
                                     headers={'Authorization': 'Bearer hf_writer'})
    with pytest.raises(urllib.error.HTTPError, match='412'):
        urllib.request.urlopen(request)


@pytest.mark.slow
def test_with_the_environment_variable_alone(hub, one, tmp_path):
    """An unmodified client in a process of its own."""
    one.push_to_hub('me/head', token='hf_writer')
    script = "from timm_dl2pa import load_head; print(load_head('me/head'))"
    assert 'num_classes=6' in python(script, environment=hub.environment(tmp_path))
