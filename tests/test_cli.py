"""The command: its help is quick, and says what is so."""
import argparse
import inspect
import shlex
import sys
from pathlib import Path

import pytest

import timm_dl2pa
from tests.helpers.processes import run
from timm_dl2pa.cli import main
from timm_dl2pa.demo import run_demo
from timm_dl2pa.embed.command import run_embed
from timm_dl2pa.evaluate.command import run_evaluate
from timm_dl2pa.finetune import run_finetune
from timm_dl2pa.finetune.command import default_dim, default_rate
from timm_dl2pa.flags import read_flags
from timm_dl2pa.parsers import make_parser
from timm_dl2pa.prototypes import METHODS, OBJECTIVES
from timm_dl2pa.prototypes.report import report_prototypes
from timm_dl2pa.timm_scripts.conversion import fold_checkpoint, push_checkpoint
from timm_dl2pa.timm_scripts.inspection import inspect_checkpoint

COMMANDS = list(make_parser()[1])
CALLED = {'demo': run_demo, 'finetune': run_finetune, 'evaluate': run_evaluate, 'embed': run_embed,
          'inspect': inspect_checkpoint, 'prototypes': report_prototypes, 'fold': fold_checkpoint,
          'push': push_checkpoint}
STARTS = [[str(Path(sys.executable).parent / 'timm-dl2pa')], [sys.executable, '-m', 'timm_dl2pa']]
HEAVY = ('torch', 'timm', 'scipy', 'numpy', 'tqdm', 'huggingface_hub')


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, '--help'])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('start', STARTS, ids=['script', 'module'])
@pytest.mark.parametrize('arguments', [['--version'], ['--help'], *([command, '--help'] for command in COMMANDS)])
def test_help_needs_neither_torch_nor_timm(start, arguments, tmp_path):
    if not Path(start[0]).exists():
        pytest.skip('the package is not installed')
    for name in HEAVY:
        (tmp_path / f'{name}.py').write_text(f'raise AssertionError("{name} was imported")')
    root = Path(timm_dl2pa.__file__).parent.parent
    out = run([*start, *arguments], environment={'PYTHONPATH': f'{tmp_path}:{root}'}).stdout
    assert out.startswith('timm-dl2pa ' if arguments == ['--version'] else 'usage: timm-dl2pa')


USES_THE_PACKAGE = '''
import pickle
import timm
from timm_dl2pa import *
import timm_dl2pa
assert timm.is_model('dl2pa')
assert all(name in globals() and hasattr(timm_dl2pa, name) for name in timm_dl2pa.__all__)
assert pickle.loads(pickle.dumps(DL2PAConfig)) is timm_dl2pa.DL2PAConfig and not hasattr(timm_dl2pa, 'nothing')
print(type(timm.create_model('dl2pa', dl2pa_backbone='test_resnet', dl2pa_dim=4, num_classes=5)).__name__)
'''


@pytest.mark.slow
@pytest.mark.timm
def test_a_script_that_the_command_runs_finds_everything(tmp_path):
    """Though the command does not import it at its start."""
    script = tmp_path / 'script.py'
    script.write_text(USES_THE_PACKAGE)
    assert run([*STARTS[1], 'run', str(script)]).stdout == 'ResNet\n'


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_has_an_example_that_it_understands(command, capsys):
    given = help_of(command, capsys)
    line = given.partition('example:\n')[2].splitlines()[0]
    program, *arguments = shlex.split(line)
    assert program == 'timm-dl2pa' and arguments[0] == command and len(arguments) > 1
    if command == 'run':
        given, rest = read_flags(arguments[1:])
        assert given and rest[0].endswith('.py')
    else:
        assert make_parser()[0].parse_args(arguments).command == command


@pytest.mark.parametrize('command', CALLED)
def test_defaults_are_shown_and_those_of_what_runs(command, capsys):
    parser, shown = make_parser()[1][command], ' '.join(help_of(command, capsys).split())
    defaults = {name: parameter.default for name, parameter in inspect.signature(CALLED[command]).parameters.items()}
    for action in parser._actions:
        assert action.help, action.dest
        default = action.default
        if default == argparse.SUPPRESS:  # not given to what runs
            default = None
        elif isinstance(default, (int, float, str)) and not isinstance(default, bool):
            # argparse breaks long words at hyphens.
            assert f'(default:{default})' in shown.replace(' ', ''), action.dest
        if defaults.get(action.dest, inspect.Parameter.empty) is not inspect.Parameter.empty:
            assert default == defaults[action.dest] or default == {}, action.dest


def test_what_the_help_says_in_words_is_so(capsys):
    shown = ' '.join(help_of('finetune', capsys).split())
    assert '1e-4; 1e-3 with --freeze or from random weights' in shown
    assert [default_rate(*given) for given in ((True, False), (True, True), (False, False))] == [1e-4, 1e-3, 1e-3]
    assert 'one less than there are classes, from 16 to 128' in shown
    assert [default_dim(number) for number in (5, 50, 500)] == [16, 49, 128]
    shown = help_of('prototypes', capsys)
    assert all(word in shown for word in (*METHODS, *OBJECTIVES))
