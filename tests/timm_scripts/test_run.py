"""`timm-dl2pa run`: the options among a script's flags."""
import ast
import os
import sys
from pathlib import Path

import pytest
import timm
import timm.models._factory as factory

import timm_dl2pa
from tests.helpers import processes
from timm_dl2pa.cli import main
from timm_dl2pa.timm_scripts.run import run_script

pytestmark = pytest.mark.timm

WITH_KWARGS = '''
import argparse, json
import timm
from timm import utils
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='?')
parser.add_argument('-c', '--config', default='')
parser.add_argument('--model', default='test_resnet')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
args = parser.parse_args()
if __name__ == '__main__':
    model = timm.create_model(args.model, num_classes=5, **args.model_kwargs)
    print('RESULT', (args.data, args.model_kwargs, type(model.get_classifier()).__name__))
'''
WITHOUT_KWARGS = '''
from timm.models import create_model
print('RESULT', [type(create_model('test_resnet', num_classes=5).get_classifier()).__name__ for _ in range(2)])
'''
NO_MODEL = '''
import sys, pathlib
print('RESULT', (sys.argv[1:], pathlib.Path(sys.argv[0]).name, sys.path[0] == str(pathlib.Path(__file__).parent)))
'''
ARGUMENTS = '''
# This one makes its model by create_model with its --model-kwargs.
import sys
print('RESULT', sys.argv[1:])
'''
FAILS = '''
import timm
timm.create_model('test_resnet', num_classes=5)
raise KeyError('of the script')
'''


@pytest.fixture
def start(tmp_path, capsys):
    def run(text, *arguments):
        script = tmp_path / 'script.py'
        script.write_text(text)
        before, path = list(sys.argv), list(sys.path)
        original = factory.model_entrypoint
        try:
            assert main(['run', *(str(script) if word == 'SCRIPT' else word for word in arguments)]) == 0
        finally:
            assert sys.argv == before and sys.path == path and factory.model_entrypoint is original
        printed = capsys.readouterr()
        return ast.literal_eval(printed.out.partition('RESULT ')[2]), printed.err
    return run


def test_options_may_stand_anywhere_and_travel_in_model_kwargs(start):
    for arguments in (['--dl2pa-dim', '3', 'SCRIPT', 'images'], ['SCRIPT', 'images', '--dl2pa-dim=3'],
                      ['SCRIPT', '--dl2pa-dim', '3', 'images']):
        assert start(WITH_KWARGS, *arguments)[0] == ('images', {'dl2pa_dim': 3}, 'DL2PAHead')
    result, _ = start(WITH_KWARGS, 'SCRIPT', '--dl2pa-dim', '3', '--dl2pa-learn-scale', '--dl2pa-scale', '7.5',
                      '--dl2pa-interval', 'epoch', '--model-kwargs', 'zero_init_last=False', 'dl2pa_dim=4')
    assert result[1] == {'zero_init_last': False, 'dl2pa_dim': 3, 'dl2pa_learn_scale': True, 'dl2pa_scale': 7.5,
                         'dl2pa_interval': 'epoch'}
    assert start(WITH_KWARGS, 'SCRIPT', 'images')[0] == ('images', {}, 'Linear')
    # The plugin is there for options that come by the script's own flag.
    assert start(WITH_KWARGS, 'SCRIPT', '--model-kwargs', 'dl2pa_dim=3')[0][2] == 'DL2PAHead'


def test_texts_that_are_no_python_travel_in_quotes(start):
    """timm before 1.0.31 refuses others."""
    given = start(ARGUMENTS, '--dl2pa-warmup-length', '2 epochs', '--dl2pa-interval', '100:1000,1000', 'SCRIPT')[0]
    assert given == ['--model-kwargs', "dl2pa_warmup_length='2 epochs'", "dl2pa_interval='100:1000,1000'"]


def test_the_config_files_model_kwargs_are_kept(start, tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('lr: 0.1\nmodel_kwargs:\n  dl2pa_dim: 64\n  act: relu\n  sizes: [1, 2]\n')
    for flag in ('-c', '--config'):
        assert start(ARGUMENTS, '--dl2pa-dim', '3', 'SCRIPT', flag, str(config), 'x')[0] == [
            flag, str(config), 'x', '--model-kwargs', 'act=relu', 'sizes=[1, 2]', 'dl2pa_dim=3']
    spaced = tmp_path / 'spaced.yaml'
    spaced.write_text('model_kwargs:\n  dl2pa_warmup_length: 5 epochs\n')
    assert start(ARGUMENTS, '--dl2pa-dim', '3', 'SCRIPT', '--config', str(spaced))[0] == [
        '--config', str(spaced), '--model-kwargs', "dl2pa_warmup_length='5 epochs'", 'dl2pa_dim=3']
    # As in argparse, what stands on the command line hides the file's, and the last one counts.
    given = ['--config', str(config), '--model-kwargs', 'a=1', '--model-kw', 'b=2', 'c=3', '--lr', '1', '--', 'x']
    assert start(ARGUMENTS, '--dl2pa-dim', '3', 'SCRIPT', *given)[0] == [
        '--config', str(config), '--lr', '1', '--model-kwargs', 'b=2', 'c=3', 'dl2pa_dim=3', '--', 'x']
    assert start(ARGUMENTS, '--dl2pa-dim', '3', 'SCRIPT', '--model-kwargs=a=1', '--model', 'm')[0] == [
        '--model', 'm', '--model-kwargs', 'a=1', 'dl2pa_dim=3']


def test_a_script_without_model_kwargs_gets_them_at_its_first_model(start):
    assert start(WITHOUT_KWARGS, 'SCRIPT', '--dl2pa-dim', '3')[0] == ['DL2PAHead', 'Linear']
    assert start(WITHOUT_KWARGS, 'SCRIPT')[0] == ['Linear', 'Linear']


def test_a_script_that_makes_no_model_is_run_and_says_so(start):
    result, said = start(NO_MODEL, 'SCRIPT', '--dl2pa-dim', '3', '-n', '2')
    assert result == (['-n', '2'], 'script.py', True) and 'script.py makes no model' in said
    assert 'makes no model' not in start(NO_MODEL, 'SCRIPT')[1]


def test_a_scripts_error_is_its_own_and_leaves_nothing_behind(start):
    with pytest.raises(KeyError, match='of the script'):
        start(FAILS, '--dl2pa-dim', '3', 'SCRIPT')


@pytest.mark.parametrize('arguments, said', [
    (['nowhere.py'], 'nowhere.py: no such file'),
    (['--dl2pa-dim', 'three', 'SCRIPT'], "dl2pa_dim must be int, not 'three'"),
    (['--dl2pa-dimm', '3', 'SCRIPT'], '--dl2pa-dimm: no such'),
    (['--dl2pa-loss', 'cosine', 'SCRIPT'], 'dl2pa_loss must be one of'),
    (['--dl2pa-dim', '3', 'SCRIPT', '--config', 'nowhere.yaml'], "No such file or directory: 'nowhere.yaml'"),
    (['--dl2pa-dim', '3', 'SCRIPT', '--config', 'CONFIG'], 'model_kwargs must be a mapping'),
    (['--dl2pa-dim', '3', 'SCRIPT', '--config', 'SCRIPT'], 'is not YAML'),
])
def test_arguments_that_are_no_good(start, capsys, tmp_path, arguments, said):
    config = tmp_path / 'list.yaml'
    config.write_text('model_kwargs: [dl2pa_dim=3]')
    with pytest.raises(SystemExit) as stopped:
        start(WITH_KWARGS, *(str(config) if word == 'CONFIG' else word for word in arguments))
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_help_shows_the_scripts_flags_and_ours(start, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(WITH_KWARGS, 'SCRIPT', '--help')
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and '--config' in printed and '--dl2pa-interval' in printed
    with pytest.raises(SystemExit) as stopped:
        main(['run', '--help'])
    assert stopped.value.code == 0 and '--dl2pa-interval' in capsys.readouterr().out


# A timm of another folder, with the modules of the installed one.
OTHER_TIMM = f'''
__path__ = [{str(Path(timm.__file__).parent)!r}]
with open({timm.__file__!r}) as file:
    exec(file.read())
'''
WHICH_TIMM = '''
import sys, timm
print('RESULT', (timm.__file__, sys.argv[1:]))
'''


def put_timm(folder):
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm' / '__init__.py').write_text(OTHER_TIMM)
    return folder


@pytest.mark.slow
def test_the_timm_in_the_scripts_folder_comes_before_all_others(tmp_path):
    """Also before that of the working directory, and where PYTHONPATH cannot name the folder."""
    script = put_timm(tmp_path / 'with:colon') / 'script.py'
    script.write_text(WHICH_TIMM)
    command = [sys.executable, '-m', 'timm_dl2pa', 'run', str(script), '--x', 'y']
    root = str(Path(timm_dl2pa.__file__).parents[1])
    out = processes.run(command, cwd=put_timm(tmp_path / 'here'), environment={'PYTHONPATH': root}).stdout
    expected = str(script.parent / 'timm' / '__init__.py'), ['--x', 'y']
    assert ast.literal_eval(out.partition('RESULT ')[2]) == expected


def test_a_restart_starts_no_other(tmp_path, monkeypatch, capsys):
    script = put_timm(tmp_path) / 'script.py'
    script.write_text(WHICH_TIMM)
    started = []
    monkeypatch.setattr(os, 'execv', lambda *arguments: started.append(arguments))
    with pytest.raises(SystemExit) as stopped:
        run_script([str(script)], is_restarted=True)
    assert stopped.value.code == 2 and not started
    assert 'needs the timm in its folder, but' in capsys.readouterr().err
