"""Whole models on a hub: by our function, and by timm's own."""
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import errors
from stand_in import train
from test_hub_heads import LABELS, hub  # noqa: F401  the fixture

from timm_dl2pa import fold_dl2pa, load_head, push_head_to_hub, push_model_to_hub, wrap_dl2pa
from timm_dl2pa.cli import main
from timm_dl2pa.training import plugged_in

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore:.*HTTP upload')]
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


@pytest.mark.parametrize('name', MODELS)
def test_round_trip(hub, name, monkeypatch):  # noqa: F811
    arguments = MODELS[name]
    model = make(name, arguments)
    expected, state = logits(model, arguments), torch.get_rng_state()
    push_model_to_hub(model, 'me/model', label_names=LABELS, model_args=arguments, token='hf_writer')
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(logits(model, arguments), expected)
    files = hub.files('me/model')
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads(files['config.json'])
    assert config['architecture'] == 'dl2pa' and config['label_names'] == LABELS
    assert "timm.create_model('hf-hub:me/model', pretrained=True)" in files['README.md'].decode()
    monkeypatch.setattr('timm_dl2pa.head.make_prototypes', None)  # none are computed
    found = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    assert torch.equal(logits(found, arguments), expected)
    # And once more, from what was loaded.
    push_model_to_hub(found, 'me/again', model_args=arguments, token='hf_writer')
    assert torch.equal(logits(timm.create_model('hf-hub:me/again', pretrained=True).eval(), arguments), expected)


@pytest.mark.skipif(not RECORDS, reason='this timm does not record the arguments of a model')
def test_timms_own_push(hub):  # noqa: F811
    for name in ('test_resnet', 'test_vit'):
        model = make(name, MODELS[name])
        timm.models.push_to_hf_hub(model, 'me/model', token='hf_writer', safe_serialization=True)
        found = timm.create_model('hf-hub:me/model', pretrained=True).eval()
        assert torch.equal(logits(found, MODELS[name]), logits(model, MODELS[name]))


def test_another_number_of_classes(hub, caplog):  # noqa: F811
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/model', token='hf_writer')
    found = timm.create_model('hf-hub:me/model', pretrained=True, num_classes=7, dl2pa_num_prototypes=7).eval()
    assert 'its head starts anew, on the neck that was loaded' in caplog.text
    assert torch.equal(found.fc.neck[0].weight, model.fc.neck[0].weight) and logits(found, {}).shape == (2, 7)
    gram = found.fc.prototypes @ found.fc.prototypes.t()
    assert gram.fill_diagonal_(0).max() < 0.9  # spread, not those that stood in for the file's


def test_folded_needs_timm_alone(hub, tmp_path):  # noqa: F811
    model = make('test_resnet', {})
    push_model_to_hub(model, 'me/plain', folded=True, label_names=LABELS, token='hf_writer')
    config = json.loads(hub.files('me/plain')['config.json'])
    assert config['architecture'] == 'test_resnet' and 'dl2pa' not in json.dumps(config)
    script = ("import sys, timm, torch; sys.modules['timm_dl2pa'] = None\n"
              "model = timm.create_model('hf-hub:me/plain', pretrained=True).eval()\n"
              "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
              "print(model(x).argsort().tolist())")
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120, env={
        **os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path), 'HF_HUB_DISABLE_XET': '1'})
    assert done.stdout.strip() == str(logits(model, {}).argsort().tolist()), done.stderr


def test_wrong_arguments_are_found_before_anything_is_sent(hub):  # noqa: F811
    model = make('test_vit', dict(img_size=32))
    with pytest.raises(ValueError, match=r'Give model_args, those of timm\.create_model'):
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


def test_a_model_that_would_come_back_changed_is_not_sent(hub, monkeypatch):  # noqa: F811
    model, create_model = make('test_resnet', {}), timm.create_model

    def change(*args, **kwargs):
        again = create_model(*args, **kwargs)
        if not args[0].startswith('local-dir:'):
            return again  # the backbone
        again.fc.assignment.copy_(again.fc.assignment.flip(0))
        return again

    monkeypatch.setattr(timm, 'create_model', change)
    with pytest.raises(ValueError, match=r'timm makes another model, .*fc\.assignment differs'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert not hub.requests


def test_a_failed_upload(hub):  # noqa: F811
    model = make('test_resnet', {})
    hub.faults[:] = [('POST', '/commit/', 403)] * 20
    with pytest.raises(RuntimeError, match='me/model was made, but the upload failed'):
        push_model_to_hub(model, 'me/model', token='hf_writer')
    assert hub.files('me/model') == {}
    with pytest.raises(errors.HfHubHTTPError):
        push_model_to_hub(model, 'me/model', token='hf_writer')


def test_the_head_of_a_model_alone(hub):  # noqa: F811
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


def test_command_pushes_a_training(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
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
