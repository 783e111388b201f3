"""Model cards: metadata, figures, picture; and what they take from a training."""
import io
import logging
import re
import sys
import unicodedata

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.stand_in import train
from timm_dl2pa import DL2PAHead, push_head_to_hub, push_model_to_hub, wrap_dl2pa
from timm_dl2pa.cli import main
from timm_dl2pa.files import card as card_module
from timm_dl2pa.files.card import Facts, Training, card_files
from timm_dl2pa.files.card_picture import plane_of
from timm_dl2pa.files.markdown import escaped
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore:.*HTTP upload')]
NAMES = ['cat', 'dog|wolf', '$a$', 'emu', 'fox']


@pytest.fixture
def head():
    torch.manual_seed(0)
    return DL2PAHead(12, 5, 3, num_prototypes=6)


def card_of(head, kind='model', **facts):
    files = card_files(head, 'me/name', Facts(**facts), kind=kind)
    text = files['README.md'].decode()
    return ModelCard(text), text


def test_metadata(head):
    card, _ = card_of(head, metrics={'accuracy': 0.75, 'top-5 accuracy': 0.9}, backbone_license='mit',
                      base_model='timm/resnet18.a1_in1k', backbone='resnet18.a1_in1k')
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'mit')
    assert {'timm', 'timm_dl2pa', 'dl2pa'} <= set(data.tags) and data.base_model == 'timm/resnet18.a1_in1k'
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in data.eval_results] == [
        ('accuracy', 'accuracy', 0.75), ('accuracy', 'top-5 accuracy', 0.9)]
    assert data.metrics == ['accuracy'] and data.model_name == 'name'
    data = card_of(head)[0].data
    assert data.license is None and data.eval_results is None and data.base_model is None
    assert card_of(head, 'head', backbone_license='mit')[0].data.license is None  # the backbone is not in it
    assert card_of(head, 'head')[0].data.library_name == 'timm_dl2pa'
    assert 'timm_dl2pa' not in card_of(head, 'folded')[0].data.tags


@pytest.mark.parametrize('value', [np.float64(0.75), np.float32(0.75), torch.tensor(0.75), np.array(0.75),
                                   torch.nn.Parameter(torch.tensor(0.75, dtype=torch.float64)), np.float16(0.75)])
def test_metrics_are_plain_numbers(head, value):
    card, text = card_of(head, metrics={np.str_('accuracy'): value, 'images': np.int64(5000)})
    assert '!!python' not in text and yaml.safe_load(text.split('---')[1])['metrics'] == ['accuracy', 'images']
    assert [result.metric_value for result in card.data.eval_results] == [0.75, 5000]
    assert '| accuracy | 0.75 |' in text and '| images | 5000 |' in text


@pytest.mark.parametrize('metrics, message', [
    ({'accuracy': float('nan')}, 'metrics: accuracy must be finite, not nan'),
    ({'accuracy': torch.tensor([0.5])}, 'metrics: accuracy must be int or float, not tensor'),
    ({'accuracy': '0.5'}, "metrics: accuracy must be int or float, not '0.5'"),
    ({'accuracy': True}, 'metrics: accuracy must be int or float, not True'),
    ({5: 0.5}, 'the name of a metric must be str, not 5'), ([0.5], 'metrics must be a mapping')])
def test_what_is_no_metric(head, metrics, message):
    with pytest.raises(ValueError, match=message):
        card_of(head, metrics=metrics)


EVIL = ['# head\nline', '![a](http://a.b/c.png)', '<script>alert(1)</script>', '`code` *bold* __bold__ ~~gone~~',
        '| a | b |\x00\x1b[1m $x$ &amp; www.evil.com @me :smile: \\']


def test_texts_of_others_are_no_markup(head):
    training = Training(settings={'opt': EVIL[0], 'aa': EVIL[2], 'sched': [EVIL[1]]}, history=[
        dict(event=EVIL[1], epoch=EVIL[2], step=[EVIL[3]], moved=1, objective_before=1.0, objective=2.5)])
    text = card_of(head, label_names=EVIL, training=training, backbone=EVIL[2], backbone_license=EVIL[1],
                   metrics={EVIL[3]: 0.5})[1]
    body = text.split('---\n', 2)[2]
    ours = card_of(head, label_names=list('abcde'), backbone='resnet18', backbone_license='mit',
                   metrics={'metric': 0.5}, training=Training(settings={'opt': 'a', 'aa': 'b', 'sched': 'c'}, history=[
                       dict(event='a', epoch=0, step=0, moved=1, objective_before=1.0, objective=2.5)]))[1]
    plain = ours.split('---\n', 2)[2]
    # What is left without the escapes has the markup that the card has of its own.
    left = re.sub(r'\\[!-/:-@\[-`{-~]', '', body)
    for mark in '<>![$&*~@:':
        assert left.count(mark) == plain.count(mark), mark
    for row in body.splitlines():
        assert not row.startswith('#') or row in plain
    tables = [re.sub(r'\\.', '', row).count('|') for row in body.splitlines() if row.startswith('|')]
    assert tables == [row.count('|') for row in plain.splitlines() if row.startswith('|')]
    assert '\x00' not in body and '\x1b' not in body


@given(text=st.text(max_size=30))
@settings(deadline=None, max_examples=50)
def test_escaped_texts_read_as_they_are(text):
    shown = re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', escaped(text))
    assert shown.split() == ''.join(' ' if unicodedata.category(one) == 'Cc' else one for one in text).split()


@pytest.mark.parametrize('given, backbone, license, name', [
    (None, 'apache-2.0', 'apache-2.0', None), (None, 'fastvit-license', 'other', 'fastvit-license'),
    (None, 'unknown', None, None), ('mit', 'apache-2.0', 'mit', None), ('', 'apache-2.0', None, None)])
def test_license(head, given, backbone, license, name):
    data = card_of(head, license=given, backbone_license=backbone)[0].data
    assert (data.license, data.get('license_name')) == (license, name)


def test_loading_lines_run(head, hub, monkeypatch):
    torch.manual_seed(0)
    model = wrap_dl2pa(timm.create_model('test_resnet.r160_in1k', num_classes=5), 3).eval()
    push_model_to_hub(model, 'me/model', token='hf_writer')
    push_model_to_hub(model, 'me/folded', token='hf_writer', folded=True)
    push_head_to_hub(model, 'me/head', token='hf_writer', base_model='timm/test_resnet.r160_in1k')
    x = torch.randn(2, 3, 32, 32)
    create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kwargs: create_model(
        name, pretrained=pretrained and not name.startswith('test_resnet'), **kwargs))  # timm's weights are far away
    for name in ('model', 'folded', 'head'):
        text = hub.files(f'me/{name}')['README.md'].decode()
        lines = text.split('```python\n')[1].split('```')[0]
        assert len(lines.strip().splitlines()) <= 6
        found = {}
        exec(lines, found)
        if name == 'head':
            assert torch.equal(found['model'].fc.prototypes, model.fc.prototypes)
        else:
            assert torch.equal(found['model'].eval()(x).argsort(), model(x).argsort())
        assert 'license: apache-2.0' in text or name == 'head'
    assert '| backbone | `test_resnet.r160_in1k` |' in hub.files('me/head')['README.md'].decode()


def test_nearest_classes(head):
    means = torch.nn.functional.normalize(torch.tensor([[1, 0, 0], [0, 1, 0], [1, .1, 0], [0, 0, 0], [0, 0, 1.]]))
    _, text = card_of(head, class_means=means, label_names=NAMES)
    assert 'by the mean directions of their embeddings' in text and r'| cat | \$a\$ | 5.7 |' in text
    table = text.split('Nearest classes')[1].split('## ')[0]
    assert 'emu' not in table and r'dog\|wolf' in table  # no embedding of an emu was seen
    assert 'by their prototypes' in card_of(head, label_names=NAMES)[1]
    with pytest.raises(ValueError, match=r'must have the shape \(5, 3\), one row for each class, not \(4, 3\)'):
        card_of(head, class_means=means[:4])


def test_the_picture(head):
    from matplotlib.image import imread
    rows = [{'epoch': float(epoch), 'train_loss': 2.0 - epoch, 'eval_top1': 10.0 * epoch} for epoch in range(3)]
    means = torch.nn.functional.normalize(torch.randn(5, 3))
    pictures = [card_files(head, 'me/name', facts, kind='model')['prototypes.png'] for facts in (
        Facts(), Facts(class_means=means), Facts(class_means=means, label_names=NAMES),
        Facts(class_means=means, label_names=NAMES, training=Training(epochs=rows)))]
    sizes = [imread(io.BytesIO(picture), format='png').shape for picture in pictures]
    assert len(set(pictures)) == 4 and sizes[3][1] > sizes[2][1]
    again = card_files(head, 'me/name', Facts(class_means=means), kind='model')['prototypes.png']
    assert again == pictures[1]
    for classes, dim in ((3, 1), (4, 2), (60, 5)):
        other = DL2PAHead(8, max(classes, 2), dim, prototypes=torch.nn.functional.normalize(torch.randn(classes, dim)))
        assert card_files(other, 'me/name', Facts(), kind='head')['prototypes.png'][:4] == b'\x89PNG'


def test_the_plane_is_that_of_the_largest_spread(generator):
    points = torch.randn(200, 5, generator=generator) * torch.tensor([0.1, 3.0, 0.2, 5.0, 0.1])
    axes = plane_of(points)
    assert torch.allclose(axes @ axes.T, torch.eye(2), atol=1e-5)
    assert axes[0, 3] > 0.99 and axes[1, 1] > 0.99


def test_without_matplotlib(head, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    card_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            files = card_files(head, 'me/name', Facts(), kind='model')
            assert list(files) == ['README.md'] and b'.png' not in files['README.md']
    assert caplog.text.count('The model card has no picture, which needs matplotlib') == 1
    card_module._warn_once.cache_clear()


def test_long_trainings_are_shortened(head):
    rows = [{'epoch': float(epoch), 'train_loss': 1.0} for epoch in range(300)]
    history = [dict(event='resolve' if epoch else 'placed', epoch=epoch, step=epoch, moved=1, objective_before=1.0,
                    objective=2.5) for epoch in range(300)]
    text = card_of(head, training=Training(epoch=17, epochs=rows, history=history, settings={'lr': 0.1}))[1]
    table = [line for line in text.splitlines() if line.startswith(('|  |', '| **this**'))]
    assert '| **this** | 17 | 1 |' in table and '|  | 0 | 1 |' in table and '|  | 299 | 1 |' in table
    assert len(table) < 15 and 'recomputed 299 times' in text and '| 0.2000 | 0.5000 |' in text and 'lr 0.1.' in text


@pytest.fixture
def trained(tmp_path):
    with plugged_in():
        task = train(tmp_path / 'run', dl2pa_dim=3, epochs=4)
    return task, tmp_path / 'run'


def change(path, **values):
    checkpoint = torch.load(path, weights_only=False)
    for name, value in values.items():
        if name in checkpoint:
            checkpoint[name] = value
        else:
            setattr(checkpoint['args'], name, value)
    torch.save(checkpoint, path)


def pushed(hub, path, *options):
    hub.repositories.pop('me/model', None)
    main(['push', str(path), 'me/model', '--model', 'test_resnet.r160_in1k', *options])
    files = hub.files('me/model')
    return files['README.md'].decode(), ModelCard(files['README.md'].decode()).data


@pytest.mark.slow
def test_a_checkpoints_training(hub, trained, monkeypatch, caplog):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    task, run = trained
    path = run / 'last.pth.tar'
    top1 = float((run / 'summary.csv').read_text().splitlines()[-1].rpartition(',')[2])
    change(path, eval_metric='top1', lr=0.05, opt='sgd', data_dir='drive/somebody', dataset='drive/data')
    for options in ((), ('--head-only',), ('--folded',)):
        text, data = pushed(hub, path, *options)
        assert data.eval_results[0].metric_value == pytest.approx(top1 / 100)
        assert f'| **this** | 3 | {task.losses[-1]:.4g} | {top1:.4g} |' in text
        assert 'lr 0.05' in text and 'opt sgd' in text and 'drive' not in text
        assert f'recomputed {len(task.assignment_scheduler.history) - 1} times' in text and '| placed |' in text
        assert 'by the mean directions of their embeddings' in text and 'prototypes.png' in hub.files('me/model')
    assert data.license == 'apache-2.0' and data.base_model is None
    # What was trained from timm's weights says so; what was not carries no licence of theirs.
    change(path, pretrained=True)
    assert pushed(hub, path)[1].base_model == 'timm/test_resnet.r160_in1k'
    change(path, pretrained=False)
    assert pushed(hub, path)[1].license is None
    # Figures of the averaged weights are not those of the others.
    state = torch.load(path, weights_only=False)
    torch.save({**state, 'state_dict_ema': state['state_dict']}, path)
    assert pushed(hub, path)[1].eval_results is None
    assert pushed(hub, path, '--use-ema')[1].eval_results[0].metric_value == pytest.approx(top1 / 100)
    # A summary of another run is left out.
    (run / 'summary.csv').write_text('epoch,train_loss,eval_top1\n3,1.0,99.5\n')
    text, data = pushed(hub, path, '--use-ema')
    assert 'is not of the same run' in caplog.text and '99.5' not in text
    assert data.eval_results[0].metric_value == pytest.approx(top1 / 100)


def test_a_checkpoint_measured_otherwise(hub, trained, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    _, run = trained
    path = run / 'last.pth.tar'
    change(path, eval_metric='loss', metric=1.5)
    lines = (run / 'summary.csv').read_text().splitlines()
    values = iter((9.0, 9.0, 9.0, 1.5))
    lines = [lines[0] + ',eval_top5,eval_loss', *(f'{line},80.0,{next(values)}' for line in lines[1:])]
    (run / 'summary.csv').write_text('\n'.join(lines))
    results = pushed(hub, path)[1].eval_results
    assert [result.metric_name for result in results] == ['accuracy', 'top-5 accuracy']
    assert results[1].metric_value == 0.8


def test_args_yaml_serves_where_the_checkpoint_has_none(hub, trained, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    _, run = trained
    path = run / 'last.pth.tar'
    state = torch.load(path, weights_only=False)
    torch.save({name: value for name, value in state.items() if name != 'args'}, path)
    (run / 'args.yaml').write_text('opt: lamb\neval_metric: top1\ndata_dir: drive/somebody\n')
    text, _ = pushed(hub, path)
    assert 'opt lamb' in text and 'somebody' not in text
    (run / 'args.yaml').write_text('!!python/object/apply:os.system ["true"]')
    assert 'opt' not in pushed(hub, path)[0].split('## Training')[1].split('|')[0]
