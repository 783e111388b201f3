"""Checkpoints that are no good, in each command that reads one: a line on stderr; nothing is executed or written."""
import copy
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.stand_in import make_model
from timm_dl2pa import AssignmentUpdate
from timm_dl2pa.cli import main
from timm_dl2pa.timm_scripts import plugged_in
from timm_dl2pa.timm_scripts.conversion import load_wrapped

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore')]

UPDATE = asdict(AssignmentUpdate(step=4, epoch=1, moved=2, objective_before=1.0, objective=2.0, seconds=0.1))


@pytest.fixture(scope='module')
def good():
    """What train.py writes, by the plugin."""
    with plugged_in():
        state = make_model(dl2pa_dim=3).state_dict()
    scheduler = {'clock': {'batches': 4, 'epochs': 1, 'epoch_began': 4, 'epoch_length': 4, 'settled_batch': 0,
                           'settled_epoch': 0}, 'due': False,
                 'resolver': {'history': [UPDATE]},
                 'class_means': {'sums': torch.ones(5, 3)}}
    return {'state_dict': state, 'epoch': 1, 'metric': 50.0, 'args': Namespace(model='test_resnet', model_kwargs={}),
            'task_state': {'dl2pa': {'options': {'dim': 3}, 'batches': 0, 'scheduler': scheduler}}}


def nested(depth=30):
    """A list whose text has 2^depth entries."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def claimed(*shape):
    """A tensor of one entry in the file that claims to have many."""
    return torch.ones(1).expand(shape)


def change(**entries):
    """Return a function that sets entries; a name may be a path: `args__model`."""
    def apply(checkpoint):
        for path, value in entries.items():
            *parents, name = path.split('__')
            target = checkpoint
            for parent in parents:
                target = vars(target)[parent] if isinstance(target, Namespace) else target[parent]
            if isinstance(target, Namespace):
                target = vars(target)
            target[name] = value
    return apply


def head(**tensors):
    def apply(checkpoint):
        for name, value in tensors.items():
            checkpoint['state_dict'][f'fc.{name}'] = value
    return apply


SCHEDULER = 'task_state__dl2pa__scheduler'
BAD = {
    'state': (change(state_dict=[1, 2]), 'state_dict must hold tensors'),
    'names': (change(state_dict={1: torch.ones(1)}), 'state_dict must hold tensors'),
    'no head': (change(state_dict={}), 'has no DL2PA head'),
    'prototypes': (head(prototypes=3), 'fc.prototypes must be a tensor, not a int'),
    'claimed': (head(assignment=claimed(2 ** 40)), 'must be a dense tensor with all of its'),
    'claimed rows': (head(prototypes=claimed(2 ** 20, 2 ** 20)), 'must be a dense tensor with all of its'),
    'meta': (head(prototypes=torch.ones(5, 3, device='meta')), 'must be a dense tensor'),
    'sparse': (head(prototypes=torch.eye(5).to_sparse()), 'must be a dense tensor'),
    'complex': (head(prototypes=torch.ones(5, 3, dtype=torch.complex64)), 'fc.prototypes'),
    'no classes': (head(assignment=torch.zeros(0, dtype=torch.int64)), 'at least two classes'),
    'unsigned': (head(assignment=torch.full((5,), 9, dtype=torch.uint16)), 'DL2PA head that is no good'),
    'scale': (head(log_scale=torch.ones(3)), 'fc.log_scale must be one number'),
    'model': (change(args__model=['test_resnet']), 'args.model must be the name of a model'),
    'model kwargs': (change(args__model_kwargs=['dl2pa_dim=3']), 'args.model_kwargs must be a mapping'),
    'aliased args': (change(args__betas=nested()), 'args holds more than'),
    'aliased kwargs': (change(args__model_kwargs={'dl2pa_dim': nested()}), 'args holds more than'),
    'aliased options': (change(task_state__dl2pa__options={'dim': nested()}), 'task_state.dl2pa.options holds more'),
    'scheduler': (change(**{SCHEDULER: [1]}), 'is not the state of an AssignmentScheduler'),
    'steps': (change(**{f'{SCHEDULER}__clock__batches': 'four'}), 'it must count batches'),
    'history': (change(**{f'{SCHEDULER}__resolver__history': [{**UPDATE, 'objective': None}]}),
                'update 0 of its history must have objective, of the type float'),
    'class sums': (change(**{f'{SCHEDULER}__class_means__sums': claimed(2 ** 30, 2 ** 30)}), 'class_means.sums must'),
}
BAD_TO_BUILD = {
    'other source': (change(args__model='hf-hub:user/model'), "not in timm's registry: give --model"),
    'folder': (change(args__model_kwargs={'dl2pa_backbone': 'local-dir:x'}), "not in timm's registry: give --model"),
    'no such argument': (change(args__model_kwargs={'depth': 3}), "does not fit 'test_resnet'"),
    'argument': (change(args__in_chans='three'), "does not fit 'test_resnet'"),
    'deep': (change(args__model='resnet18', args__model_kwargs={'layers': [10 ** 6] * 4}), 'far more is being made'),
    'wide': (change(args__model='vit_tiny_patch16_224', args__model_kwargs={'depth': 1, 'mlp_ratio': 10 ** 9}),
             'numbers, and holds'),
    'option': (change(args__model_kwargs={'dl2pa_dimension': 3}), 'dl2pa_dimension: no such option'),
}


def said_by(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith('timm-dl2pa') and said.count('\n') == 1 and len(said) < 1000
    return said


@pytest.mark.parametrize('case', [*BAD, *BAD_TO_BUILD])
def test_checkpoints_that_are_no_good(case, good, tmp_path, capsys):
    if case == 'unsigned' and torch.__version__ < '2.6':
        pytest.skip('torch 2.5 saves no unsigned numbers')
    checkpoint = copy.deepcopy({**good, 'state_dict': dict(good['state_dict'])})
    apply, message = {**BAD, **BAD_TO_BUILD}[case]
    apply(checkpoint)
    file, out = tmp_path / 'x.pth.tar', tmp_path / 'out.pth'
    torch.save(checkpoint, file)
    commands = [('fold', file, out), ('push', file, 'user/name'), *([('inspect', file)] if case in BAD else [])]
    for command in commands:
        assert message in said_by(capsys, *command)
    assert not out.exists()


def test_the_unchanged_checkpoint_is_good(good, tmp_path, capsys):
    torch.save(good, tmp_path / 'x.pth.tar')
    assert main(['inspect', str(tmp_path / 'x.pth.tar')]) == 0
    assert '1 re-solves in 4 batches, 1 epochs\n' in capsys.readouterr().out
    assert main(['fold', str(tmp_path / 'x.pth.tar'), str(tmp_path / 'out.pth')]) == 0
    assert set(torch.load(tmp_path / 'out.pth')) == set(make_model().state_dict())


@pytest.mark.parametrize('name, content, message', [
    ('empty.pth', b'', 'the file is empty'), ('empty.safetensors', b'', 'the file is empty'),
    ('text.pth', b'accuracy: 0.9\n', 'cannot be read'), ('text.safetensors', b'accuracy: 0.9\n', 'cannot be read'),
    ('number.pth', b'\x80\x02K\x01.', 'cannot be read'), ('cut.pth', None, 'cannot be read')])
def test_files_that_are_no_checkpoints(name, content, message, good, tmp_path, capsys):
    file = tmp_path / name
    if content is None:
        torch.save(good, file)
        content = file.read_bytes()[:-2000]
    file.write_bytes(content)
    for command in (('inspect', file), ('fold', file, tmp_path / 'out.pth'), ('push', file, 'user/name')):
        assert message in said_by(capsys, *command)


def test_the_report_sends_no_control_characters(good, tmp_path, capsys):
    checkpoint = copy.deepcopy(good)
    checkpoint['args'].model = '\x1b[2Jmodel'
    checkpoint['task_state']['dl2pa']['options'] = {'dim\n': '\x07'}
    torch.save(checkpoint, tmp_path / 'x.pth')
    assert main(['inspect', str(tmp_path / 'x.pth')]) == 0
    assert capsys.readouterr().out.replace('\n', '').isprintable()


def test_a_checkpoint_names_no_other_weights(good, tmp_path, monkeypatch):
    """What its arguments say of weights is ignored."""
    def refuse(*_, **__):
        raise AssertionError('weights were loaded')

    monkeypatch.setattr('timm.models._builder.load_pretrained', refuse)
    monkeypatch.setattr('timm.models._factory.load_checkpoint', refuse)
    checkpoint = copy.deepcopy(good)
    checkpoint['args'].model_kwargs = {
        'dl2pa_dim': 3, 'checkpoint_path': '/other.pth', 'pretrained': True, 'num_classes': 7,
        'pretrained_cfg_overlay': {'file': '/other.pth'}}
    torch.save(checkpoint, tmp_path / 'x.pth')
    model, name, arguments = load_wrapped(tmp_path / 'x.pth')
    assert name == 'test_resnet' and arguments == {} and model.num_classes == 5


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_fold_that_cannot_be_written_leaves_nothing(suffix, good, tmp_path, capsys):
    resource = pytest.importorskip('resource')
    save_file(good['state_dict'], tmp_path / 'x.safetensors')
    command = ['fold', tmp_path / 'x.safetensors', tmp_path / f'out{suffix}', '--model', 'test_resnet']
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # as a full disk: part of the file is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        assert 'cannot be written' in said_by(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ['x.safetensors']
    command[2] = tmp_path / 'x.safetensors' / f'out{suffix}'
    assert 'cannot be written' in said_by(capsys, *command)
    command[2] = tmp_path / f'out{suffix}'
    assert main([str(word) for word in command]) == 0


@pytest.mark.parametrize('given', ['[1, 2]', 'img_size', '=3', '3=4', 'a={[]: 1}'])
@pytest.mark.parametrize('command', [('fold', 'x.pth', 'y.pth'), ('push', 'x.pth', 'user/name')])
def test_model_kwargs_that_are_none(given, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, '--model-kwargs', given])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and 'error: argument --model-kwargs: ' in said and 'Traceback' not in said


def test_prototypes_that_cannot_be_written(tmp_path, capsys):
    for folder in (tmp_path / 'none', tmp_path / 'file'):
        (tmp_path / 'file').touch()
        assert str(folder) in said_by(capsys, 'prototypes', '-k', 4, '-d', 3, '--no-recipe', '--out',
                                      folder / 'x.safetensors')


@pytest.mark.parametrize('scales, word', [([9.0], 'set by prime'), ([None], 'learned'), ('nine', 'learned')])
def test_a_scale_that_prime_has_set_is_known_to_be_so(good, tmp_path, capsys, scales, word):
    contents = copy.deepcopy(good)
    contents['task_state']['dl2pa']['scheduler']['held_scales'] = scales
    contents['state_dict']['fc.log_scale'] = torch.tensor([9.0]).log()
    torch.save(contents, tmp_path / 'last.pth.tar')
    model, _, _ = load_wrapped(tmp_path / 'last.pth.tar')
    assert model.get_classifier().config.held_scale == (pytest.approx(9) if word == 'set by prime' else None)
    main(['inspect', str(tmp_path / 'last.pth.tar')])
    assert f'9 ({word})' in capsys.readouterr().out
