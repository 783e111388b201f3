"""Whole models on a hub: by our function, and by timm's own."""
import json
import sys

import pytest
import timm
import torch
from huggingface_hub import errors

from tests.helpers.processes import python, run
from tests.helpers.stand_in import train
from timm_dl2pa import fold_dl2pa, load_head, load_model, push_head_to_hub, push_model_to_hub, save_model, wrap_dl2pa
from timm_dl2pa.cli import main
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore:.*HTTP upload')]
LABELS = list('abcdef')
RECORDS = tuple(map(int, timm.__version__.split('.')[:3])) >= (1, 0, 31)  # whether timm knows a model's arguments
MODELS = {
    'test_resnet': dict(in_chans=1),
    'test_vit': dict(img_size=32),
    'deit_tiny_distilled_patch16_224': dict(img_size=32, depth=1),
    'levit_128s': dict(img_size=32),
}


def make(name, arguments, **kwargs):
    torch.manual_seed(0)
    model = wrap_dl2pa(timm.create_model(name, num_classes=6, **arguments), 4, neck='linear_bn', learn_scale=True,
                       num_prototypes=9, **kwargs)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    order, head = torch.randperm(9)[:6], model.get_classifier()
    for one in head if isinstance(head, tuple) else (head,):
        one.assign(order, one.prototypes @ rotation)
    model.train()(torch.randn(5, arguments.get('in_chans', 3), 32, 32))
    return model.eval()


def logits(model, arguments):
    with torch.no_grad():
        return model(torch.randn(2, arguments.get('in_chans', 3), 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_round_trip(hub, name, refuse_prototypes):
    arguments = MODELS[name]
    model = make(name, arguments)
    expected, state = logits(model, arguments), torch.get_rng_state()
    push_model_to_hub(model, 'me/model', label_names=LABELS, model_args=arguments, token='hf_writer')
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(logits(model, arguments), expected)
    files = hub.files('me/model')
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors', 'prototypes.png']
    config = json.loads(files['config.json'])
    assert config['architecture'] == 'dl2pa' and config['label_names'] == LABELS
    assert "timm.create_model('hf-hub:me/model', pretrained=True)" in files['README.md'].decode()
    refuse_prototypes()
    found = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    assert torch.equal(logits(found, arguments), expected) and found.label_names == LABELS
    for source in ('me/model', 'hf-hub:me/model@main'):
        again = load_model(source)
        assert torch.equal(logits(again, arguments), expected) and again.label_names == LABELS and not again.training
    # And once more, from what was loaded.
    push_model_to_hub(found, 'me/again', model_args=arguments, token='hf_writer')
    assert torch.equal(logits(timm.create_model('hf-hub:me/again', pretrained=True).eval(), arguments), expected)


@pytest.mark.skipif(not RECORDS, reason='this timm does not record the arguments of a model')
def test_timms_own_push(hub):
    for name in ('test_resnet', 'test_vit'):
        model = make(name, MODELS[name])
        timm.models.push_to_hf_hub(model, 'me/model', token='hf_writer', safe_serialization=True)
        found = timm.create_model('hf-hub:me/model', pretrained=True).eval()
        assert torch.equal(logits(found, MODELS[name]), logits(model, MODELS[name]))
        assert torch.equal(logits(load_model('me/model'), MODELS[name]), logits(model, MODELS[name]))


def test_a_hostile_config_without_its_weights(hub):
    model = make('test_vit', MODELS['test_vit'])
    push_model_to_hub(model, 'me/model', model_args=MODELS['test_vit'], token='hf_writer')
    found = timm.create_model('hf-hub:me/model')
    assert found.get_classifier().num_classes == 6
    files = dict(hub.files('me/model'))
    config = json.loads(files['config.json'])
    config['model_args']['depth'] = 10 ** 7
    hub.put('me/model', {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises(ValueError, match='a tensor of 10000000 numbers is being made'):
        timm.create_model('hf-hub:me/model')


def test_both_files_are_of_one_commit(hub, monkeypatch, tmp_path):
    """Somebody pushes between the two downloads."""
    import huggingface_hub
    first, second = make('test_resnet', {}), wrap_dl2pa(timm.create_model('test_resnet', num_classes=6), 3).eval()
    push_model_to_hub(second, 'me/model', token='hf_writer')
    other = dict(hub.files('me/model'))
    hub.repositories.clear()
    push_model_to_hub(first, 'me/model', token='hf_writer')
    download = huggingface_hub.hf_hub_download

    def pushed_after(repository, name, **kwargs):
        path = download(repository, name, **kwargs)
        if name == 'config.json':
            hub.put('me/model', other)
        return path

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', pushed_after)
    assert torch.equal(logits(load_model('me/model', cache_dir=tmp_path), {}), logits(first, {}))
    assert torch.equal(logits(load_model('me/model', cache_dir=tmp_path), {}), logits(second, {}))


def test_what_is_refused_before_a_repository_is_made(hub):
    model = make('test_resnet', {})
    for options, message in ((dict(revision='none'), "revision='none' names a branch of me/model, which does not"),
                             (dict(commit_message=''), "commit_message must be a line of text, not ''"),
                             (dict(metrics={'accuracy': float('nan')}), "metrics: accuracy must be finite, not nan")):
        for push in (push_model_to_hub, push_head_to_hub):
            with pytest.raises(ValueError, match=message):
                push(model, 'me/model', token='hf_writer', **options)
    assert not hub.repositories
    push_model_to_hub(model, 'me/model', token='hf_writer')
    before = dict(hub.files('me/model'))
    with pytest.raises(errors.HfHubHTTPError):
        push_model_to_hub(model, 'me/model', token='hf_writer', revision='none')
    assert hub.files('me/model') == before


@pytest.mark.parametrize('token', ['hf_writer\n', ' hf_writer', 'hf_\twriter', 'hf_wr\u00eeter', '', b'hf_writer'])
def test_a_token_that_is_none_is_not_shown(hub, token):
    model = make('test_resnet', {})
    for door in (lambda: push_model_to_hub(model, 'me/model', token=token),
                 lambda: push_head_to_hub(model, 'me/model', token=token), lambda: load_head('me/model', token=token),
                 lambda: load_model('me/model', token=token)):
        with pytest.raises(ValueError, match=r'token (is empty, or has spaces|must be a string)') as caught:
            door()
        assert 'writer' not in str(caught.value) and caught.value.__context__ is None
    assert not hub.requests


def test_another_number_of_classes(hub, caplog):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    found = timm.create_model('hf-hub:me/model', pretrained=True, num_classes=20).eval()
    assert caplog.text.count('its prototypes and assignment are new, and its neck was loaded') == 1
    assert torch.equal(found.fc.neck[0].weight, model.fc.neck[0].weight) and logits(found, {}).shape == (2, 20)
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(found.forward_features(x), model.forward_features(x))
    assert len(found.fc.prototypes) == 20
    gram = found.fc.prototypes @ found.fc.prototypes.t()
    assert gram.fill_diagonal_(0).max() < 0.95  # spread, not those that stood in for the file's


@pytest.mark.slow
def test_folded_needs_timm_alone(hub, tmp_path):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/plain', folded=True, label_names=LABELS, token='hf_writer')
    config = json.loads(hub.files('me/plain')['config.json'])
    assert config['architecture'] == 'test_resnet' and 'dl2pa' not in json.dumps(config)
    script = ("import sys, timm, torch; sys.modules['timm_dl2pa'] = None\n"
              "model = timm.create_model('hf-hub:me/plain', pretrained=True).eval()\n"
              "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
              "print(model(x).argsort().tolist())")
    assert python(script, environment=hub.environment(tmp_path)).strip() == str(logits(model, {}).argsort().tolist())


def test_wrong_arguments_are_found_before_anything_is_sent(hub):
    model = make('test_vit', dict(img_size=32))
    with pytest.raises(ValueError, match=r'Give model_args, the arguments of timm\.create_model'):
        push_model_to_hub(model, 'me/model', model_args=dict(img_size=32, patch_size=8), token='hf_writer')
    with pytest.raises(ValueError, match='label_names must be 6 names'):
        push_model_to_hub(model, 'me/model', label_names=['a'], token='hf_writer')
    with pytest.raises(ValueError, match='has no DL2PAHead'):
        push_model_to_hub(fold_dl2pa(model), 'me/model', token='hf_writer')
    with torch.no_grad():
        next(model.parameters()).fill_(float('inf'))
    with pytest.raises(ValueError, match='is not finite'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert not hub.requests


def test_a_model_that_would_come_back_changed_is_not_sent(hub, monkeypatch):
    model, create_model = make('test_resnet', {}), timm.create_model

    def change(*args, **kwargs):
        again = create_model(*args, **kwargs)
        if not args[0].startswith('local-dir:'):
            return again  # the backbone
        again.fc.assignment.copy_(again.fc.assignment.flip(0))
        return again

    monkeypatch.setattr(timm, 'create_model', change)
    with pytest.raises(ValueError, match=r'timm makes another model .*fc\.assignment differs'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert not hub.requests


def test_a_failed_upload(hub):
    model = make('test_resnet', {})
    hub.faults[:] = [('POST', '/commit/', 403)] * 20
    with pytest.raises(RuntimeError, match='me/model was created, but the upload failed'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert hub.files('me/model') == {}
    with pytest.raises(errors.HfHubHTTPError):
        push_model_to_hub(model, 'me/model', token='hf_writer')


@pytest.mark.slow
@pytest.mark.parametrize('method, path, status', [
    ('POST', '/preupload/', 500), ('POST', '/objects/batch', 429),
    ('PUT', '/lfs/', 403), ('PUT', '/lfs/', 503), ('PUT', '/lfs/', 'cut'), ('POST', '/lfs/verify', 404),
    ('POST', '/commit/', 409), ('POST', '/commit/', 412)])
def test_a_failed_upload_leaves_what_was_there(hub, method, path, status):
    push_model_to_hub(make('test_resnet', {}), 'me/model', token='hf_writer')
    before = dict(hub.files('me/model'))
    other = wrap_dl2pa(timm.create_model('test_resnet', num_classes=6), 3)
    hub.faults[:] = [(method, path, status)] * 20
    with pytest.raises(Exception) as caught:
        push_model_to_hub(other, 'me/model', token='hf_writer')
    assert len(hub.faults) < 20, 'the client did not ask for that'
    assert 'hf_writer' not in str(caught.value) and 'was made' not in str(caught.value)
    assert hub.files('me/model') == before
    hub.faults.clear()
    push_model_to_hub(other, 'me/model', token='hf_writer')
    assert load_model('me/model').fc.dim == 3


def timms_loader(source):
    return timm.create_model(f'hf-hub:{source}', pretrained=True)


@pytest.mark.parametrize('load', [load_model, timms_loader])
def test_a_pickle_alone_is_refused(hub, load, monkeypatch):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    files = {**hub.files('me/model'), 'pytorch_model.bin': b'evil'}
    hub.put('me/pickle', {name: content for name, content in files.items() if name != 'model.safetensors'})
    monkeypatch.setattr('torch.load', None)
    hub.requests.clear()
    with pytest.raises(ValueError, match=r'me/pickle has its weights only as a pickle \(pytorch_model\.bin\)'):
        load('me/pickle')
    assert not any(path.endswith('.bin') for _, path in hub.requests)
    hub.put('me/both', files)
    assert torch.equal(logits(load('me/both').eval(), {}), logits(model, {}))
    assert not any(path.endswith('.bin') for _, path in hub.requests)


def test_corrupted_and_truncated_downloads(hub, tmp_path):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    hub.faults[:] = [('GET', 'model.safetensors', 'corrupted')]
    with pytest.raises(ValueError, match=r'its sha256 differs. Download it again \(force_download=True\)'):
        load_model('me/model')
    with pytest.raises(ValueError, match='its sha256 differs'):  # which is what is kept now
        timm.create_model('hf-hub:me/model', pretrained=True)
    assert torch.equal(logits(load_model('me/model', force_download=True), {}), logits(model, {}))
    hub.faults[:] = [('GET', 'model.safetensors', 'truncated')] * 20
    with pytest.raises(Exception) as caught:
        load_model('me/model', cache_dir=tmp_path / 'other')
    assert len(hub.faults) < 20 and not isinstance(caught.value, AssertionError)
    hub.faults.clear()
    assert torch.equal(logits(load_model('me/model', cache_dir=tmp_path / 'other'), {}), logits(model, {}))


def test_revisions_private_repositories_and_pull_requests(hub, tmp_path):
    first, second = make('test_resnet', {}), wrap_dl2pa(timm.create_model('test_resnet', num_classes=6), 3).eval()
    push_model_to_hub(first, 'me/model', token='hf_writer', private=True)
    commit = hub.repositories['me/model'].branches['main']
    address = push_model_to_hub(second, 'me/model', token='hf_writer', create_pr=True)
    assert address == f'{hub.url}/me/model/discussions/1'
    hub.repositories['me/model'].branches['v2'] = hub.repositories['me/model'].branches['refs/pr/1']
    with pytest.raises(errors.RepositoryNotFoundError) as caught:
        load_model('me/model')
    assert '401' in str(caught.value)
    reading = dict(token='hf_reader', cache_dir=tmp_path / 'kept')
    for revision, model in ((None, first), (commit, first), ('v2', second), ('refs/pr/1', second)):
        found = load_model('me/model', revision=revision, **reading)
        assert torch.equal(logits(found, {}), logits(model, {}))
    assert (tmp_path / 'kept').exists()
    with pytest.raises(errors.RevisionNotFoundError):
        load_model('me/model', revision='none', **reading)
    with pytest.raises(errors.RepositoryNotFoundError):
        load_model('me/nothing', **reading)
    push_model_to_hub(first, 'me/model', token='hf_writer', revision='v2')
    assert torch.equal(logits(load_model('me/model@v2', token='hf_reader', force_download=True), {}), logits(first, {}))
    for token, status in ((None, 401), ('hf_reader', 403), ('hf_wrong', 401)):
        with pytest.raises(errors.HfHubHTTPError) as caught:
            push_model_to_hub(first, 'me/other', token=token)
        assert caught.value.response.status_code == status and 'hf_' not in str(caught.value)
    assert 'me/other' not in hub.repositories


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_busy_hub(hub, status):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    hub.faults[:] = [('HEAD', 'config.json', status)] * 20
    with pytest.raises(errors.LocalEntryNotFoundError, match=f'the request to the Hub failed .*{status}'):
        load_model('me/model')


@pytest.mark.slow
def test_no_token_is_logged(hub, tmp_path):
    script = """
import logging, timm, timm_dl2pa
logging.basicConfig(level=logging.DEBUG)
model = timm_dl2pa.wrap_dl2pa(timm.create_model('test_resnet', num_classes=6), 3)
timm_dl2pa.push_model_to_hub(model, 'me/model', token='hf_writer', private=True)
timm_dl2pa.push_head_to_hub(model, 'me/head', token='hf_writer')
timm_dl2pa.load_model('me/model', token='hf_reader')
for push in (timm_dl2pa.push_model_to_hub, timm_dl2pa.push_head_to_hub):
    try:
        push(model, 'me/other', token='hf_reader')
    except Exception:
        logging.exception('refused')
"""
    done = run([sys.executable, '-c', script], environment=hub.environment(tmp_path))
    assert done.stderr.count('refused') == 2, done.stderr
    assert 'hf_writer' not in done.stdout + done.stderr and 'hf_reader' not in done.stdout + done.stderr


@pytest.mark.slow
def test_offline(hub, tmp_path):
    """HF_HUB_OFFLINE in the environment of a process of its own."""
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    push_head_to_hub(model, 'me/head', token='hf_writer')
    loads = """
import sys, timm, timm_dl2pa, torch
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(timm_dl2pa.load_head(sys.argv[1] + 'head').dim)
for found in (timm_dl2pa.load_model(sys.argv[1] + 'model'),
              timm.create_model('hf-hub:' + sys.argv[1] + 'model', pretrained=True).eval()):
    print(found(x).tolist())
"""
    fails = """
import timm, timm_dl2pa
for load in (timm_dl2pa.load_head, timm_dl2pa.load_model):
    try:
        load('me/other')
    except Exception as error:
        print(type(error).__name__, error)
"""
    environment = hub.environment(tmp_path)
    online = python(loads, 'me/', environment=environment)
    assert str(logits(model, {}).tolist()) in online
    hub.requests.clear()
    offline = python(loads + fails, 'me/', environment={**environment, 'HF_HUB_OFFLINE': '1'})
    missing = 'The cache has no config.json of me/other, and HF_HUB_OFFLINE is set'
    assert offline.startswith(online) and offline.count(missing) == 2
    assert not hub.requests


def test_a_folder_is_what_the_hub_has(hub, tmp_path):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer', label_names=LABELS)
    save_model(model, tmp_path / 'model', label_names=LABELS)
    files = {path.name: path.read_bytes() for path in (tmp_path / 'model').iterdir()}
    sent = hub.files('me/model')
    assert sent.keys() - files.keys() == {'README.md', 'prototypes.png'}
    assert files == {name: sent[name] for name in ('config.json', 'model.safetensors')}


def test_a_repository_that_cannot_be_seen_was_not_made(hub):
    model = make('test_resnet', {})
    hub.put('me/model', {'a': b'a'})
    hub.faults[:] = [('GET', '/api/models/me/model$', 'unseen'), ('POST', '/preupload/', 403)]
    with pytest.raises(errors.HfHubHTTPError) as caught:  # creation answers 409
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert not hub.faults and caught.value.response.status_code == 403 and 'was made' not in str(caught.value)
    # Nor one whose creation failed.
    hub.faults[:] = [('POST', '/api/repos/create', 500)] * 20
    with pytest.raises(errors.HfHubHTTPError) as caught:
        push_model_to_hub(model, 'me/other', token='hf_writer')
    assert 'was made' not in str(caught.value) and 'me/other' not in hub.repositories


def test_the_head_of_a_model_alone(hub):
    model = make('test_resnet', {})
    push_head_to_hub(model, 'me/head', label_names=LABELS, token='hf_writer')
    twin = timm.create_model('test_resnet', num_classes=2)
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith('fc.')},
                         strict=False)
    wrap_dl2pa(twin, head='me/head')
    assert torch.equal(logits(twin.eval(), {}), logits(model, {})) and twin.label_names == LABELS
    assert load_head('me/head').config == model.fc.config
    with pytest.raises(ValueError, match='not that of a DL2PA head'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
        load_head('me/model')


def test_a_models_registry_name_comes_and_goes():
    model = timm.create_model('test_resnet.r160_in1k', num_classes=6)
    cfg = dict(model.pretrained_cfg)
    wrap_dl2pa(model, 4)
    assert model.pretrained_cfg['architecture'] == 'dl2pa'
    assert model._model_args['dl2pa_backbone'] == 'test_resnet.r160_in1k'
    wrap_dl2pa(model, 5)
    assert model._model_args['dl2pa_backbone'] == 'test_resnet.r160_in1k' and model._model_args['dl2pa_dim'] == 5
    assert fold_dl2pa(model).pretrained_cfg == cfg
    model.reset_classifier(0)
    assert model.pretrained_cfg == cfg
    model.reset_classifier(3)
    assert model.pretrained_cfg['architecture'] == 'dl2pa'


def test_other_channels(hub):
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    found = timm.create_model('hf-hub:me/model', pretrained=True, in_chans=1).eval()
    assert torch.allclose(found.conv1[0].weight, model.conv1[0].weight.sum(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(found.fc.assignment, model.fc.assignment) and logits(found, dict(in_chans=1)).shape == (2, 6)


def test_command_pushes_a_folder(hub, tmp_path, capsys, monkeypatch):
    model = make('test_vit', MODELS['test_vit'])
    folder = str(save_model(model, tmp_path / 'model', model_args=MODELS['test_vit'], label_names=LABELS))
    monkeypatch.setenv('HF_TOKEN', 'hf_reader')
    with pytest.raises(SystemExit) as stopped:
        main(['push', folder, 'me/model'])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith('timm-dl2pa push: ') and '403' in said
    assert 'hf_reader' not in said and 'Traceback' not in said and not hub.repositories
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    main(['push', folder, 'me/model', '--private'])
    assert hub.repositories['me/model'].private
    found = load_model('me/model', token='hf_reader')
    assert torch.equal(logits(found, {}), logits(model, {})) and found.label_names == LABELS
    main(['push', folder, 'me/head', '--head-only'])
    assert load_head('me/head').label_names == LABELS


def test_a_closed_door_is_said_in_words(hub):
    """The client's own words: none of ours hide them."""
    model = make('test_resnet', {})
    hub.repositories.clear()
    push_model_to_hub(model, 'me/model', token='hf_writer')
    for status in (403, 404):
        hub.faults[:] = [('HEAD', 'config.json', status)] * 20
        with pytest.raises((errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ValueError), match=str(status)):
            load_model('me/model')


def test_command_pushes_a_training(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    with plugged_in():
        task = train(tmp_path, dl2pa_dim=3, dl2pa_neck='linear_bn')
    trained = task.get_trainable_module().eval()
    start, options = ['push', str(tmp_path / 'last.pth.tar')], ['--model', 'test_resnet', '--license', 'mit']
    x = torch.randn(4, 3, 32, 32)
    assert main([*start, 'me/model', *options]) == 0
    assert capsys.readouterr().out.startswith(f'{hub.url}/me/model/commit/')
    assert torch.equal(timm.create_model('hf-hub:me/model', pretrained=True).eval()(x), trained(x))
    assert 'license: mit' in hub.files('me/model')['README.md'].decode()
    main([*start, 'me/head', '--head-only', *options])
    assert load_head('me/head').config.dim == 3
    main([*start, 'me/plain', '--folded', '--create-pr', *options])
    assert 'discussions/1' in capsys.readouterr().out and hub.files('me/plain') == {}
    assert b'"test_resnet"' in hub.files('me/plain', 'refs/pr/1')['config.json']
    with pytest.raises(SystemExit):
        main(['push', str(tmp_path / 'none.pth.tar'), 'me/none'])
    assert 'timm-dl2pa push' in capsys.readouterr().err
