"""`timm-dl2pa run SCRIPT ...`: a script of timm's with the DL2PA options among its flags."""
import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import timm
import yaml

from ..options import PREFIX, PluginOptions
from .hooks import plugged_in

__all__ = ['run_script']

_FLAG = '--model-kwargs'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-dl2pa run',
        usage='timm-dl2pa run [DL2PA options] SCRIPT [options of the script and of DL2PA]',
        description="Runs a script of timm's (train.py, validate.py, inference.py, onnx_export.py, benchmark.py, ...), "
                    'unmodified, with a DL2PA head on the model that it makes. Under torchrun: '
                    'torchrun --nproc-per-node 4 -m timm_dl2pa run train.py ...',
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group('DL2PA options')
    for spec in fields(PluginOptions):
        flag = '--' + (PREFIX + spec.name).replace('_', '-')
        # Strings: they are read as --model-kwargs reads them, wherever they came in.
        kind: dict[str, Any] = {'action': 'store_const', 'const': 'True'} if bool in spec.metadata['kinds'] else \
            {'metavar': spec.name.rpartition('_')[2].upper()}
        group.add_argument(flag, dest=PREFIX + spec.name, default=argparse.SUPPRESS, help=_help(spec), **kind)
    return parser


def _help(spec: Field) -> str:
    """Return an option's help with its default; argparse takes % for a placeholder."""
    default = '' if spec.default is None else f' (default: {spec.default})'
    return (spec.metadata['help'] + default).replace('%', '%%')


def run_script(arguments: Sequence[str]) -> None:
    """Run a script with `sys.argv` and `sys.path` as Python would set them, and the plugin installed while it runs.

    The options travel in the script's `--model-kwargs`, added to those given on the command line or in its `--config`
    file. Where a script has no such flag they are put in when it makes its first model.

    Raises:
        SystemExit: The script's own; or 2 with a line on stderr, where there is no script or an option is no good.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    given = vars(options)
    if not rest or rest[0] in ('-h', '--help'):
        parser.print_help()
        raise SystemExit(0 if rest else 2)
    script, argv = Path(rest[0]), rest[1:]
    if not script.is_file():
        parser.exit(2, f'timm-dl2pa run: {script}: no such file. The first argument that is no DL2PA option is the '
                       f"script's path.\n")
    try:
        checked = PluginOptions.from_mapping({name: _read(value) for name, value in given.items()}) if given else None
    except ValueError as error:
        parser.exit(2, f'timm-dl2pa run: {error}\n')

    _use_timm_beside(script, arguments)
    text = script.read_text(encoding='utf-8', errors='replace')
    first_model = None
    if given and 'create_model' not in text:
        print(f'timm-dl2pa run: {script.name} makes no model: the DL2PA options have no effect.', file=sys.stderr)
    elif given and _FLAG in text:
        argv = _with_model_kwargs(argv, given)
    elif given:
        first_model = checked

    saved = sys.argv, list(sys.path)
    sys.argv = [str(script), *argv]
    # As Python does for a script; in front of the folder that Python put there for this command.
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with plugged_in(first_model):
            runpy.run_path(str(script), run_name='__main__')
    finally:
        sys.argv, sys.path[:] = saved
        if {'-h', '--help'} & set(argv):
            print()
            print(parser.format_help().partition('\n\n')[2].partition('\n\n')[2], end='')


def _use_timm_beside(script: Path, arguments: Sequence[str]) -> None:
    """Start over with the timm that lies beside the script, if another one was imported.

    In a checkout of timm's repository `python train.py` takes the checkout's own timm, which the script was written
    for; by the time that this command runs, the installed one has been imported.
    """
    folder = script.resolve().parent
    beside = folder / 'timm' / '__init__.py'
    if beside.is_file() and not beside.samefile(timm.__file__):
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get('PYTHONPATH')]))
        if os.environ.get('PYTHONPATH') == path:
            raise SystemExit(f'timm-dl2pa run: {script} is for the timm beside it, but {timm.__file__} comes first.')
        command = [sys.executable, '-m', 'timm_dl2pa', 'run', *arguments]
        os.execve(sys.executable, command, {**os.environ, 'PYTHONPATH': path})


def _read(value: str) -> Any:
    """Read a value as `--model-kwargs` does."""
    from timm.utils import ParseKwargs
    namespace = argparse.Namespace()
    ParseKwargs([], dest='kwargs')(None, namespace, [f'value={value}'])
    return namespace.kwargs['value']


def _with_model_kwargs(argv: Sequence[str], given: dict[str, str]) -> list[str]:
    """Return the script's arguments with `given` among its model's.

    argparse takes the last --model-kwargs alone, and it hides the config file's: so all are gathered in one, at the
    end, where it swallows no positional argument.
    """
    argv, kwargs, from_command_line = list(argv), [], False
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument('-c', '--config', default='')
    end = argv.index('--') if '--' in argv else len(argv)
    argv, tail = argv[:end], argv[end:]
    kept: list[str] = []
    while argv:
        word = argv.pop(0)
        name, equals, value = word.partition('=')
        if len(name) > len('--model') + 1 and _FLAG.startswith(name):
            kwargs = [value] if equals else []  # the last one counts, as in argparse
            from_command_line = True
            while not equals and argv and not argv[0].startswith('-'):
                kwargs.append(argv.pop(0))
        else:
            kept.append(word)
    path = config.parse_known_args(kept)[0].config
    if path and not from_command_line:
        with open(path, encoding='utf-8') as file:
            values = (yaml.safe_load(file) or {}).get('model_kwargs') or {}
        kwargs = [f'{name}={value}' if isinstance(value, str) else f'{name}={value!r}'
                  for name, value in values.items() if name not in given]
    kwargs = [word for word in kwargs if word.partition('=')[0] not in given]
    return [*kept, _FLAG, *kwargs, *(f'{name}={value}' for name, value in given.items()), *tail]
