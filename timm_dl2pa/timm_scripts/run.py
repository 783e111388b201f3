"""The command `timm-dl2pa run SCRIPT ...`: runs a script of timm with the DL2PA options among its flags."""
import argparse
import ast
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

from ..flags import make_flags, read_flags
from ..options import PluginOptions
from ..values import shown
from .creation import check_times
from .hooks import plugged_in

__all__ = ['run_script']

_FLAG = '--model-kwargs'
# The program of a restart. Its arguments are the import path and the arguments of the command.
_RESTART = 'import ast, sys; sys.path[:] = ast.literal_eval(sys.argv[1]); ' \
           'from timm_dl2pa.timm_scripts.run import run_script; run_script(sys.argv[2:], is_restarted=True)'


def run_script(arguments: Sequence[str], *, is_restarted: bool = False) -> None:
    """Run a script of timm with the plugin installed, with `sys.argv` and `sys.path` as Python sets them for a script.

    The options are passed in the script's `--model-kwargs`, together with those on the command line or in its
    `--config` file. If the script has no such flag, they apply to the first model that it creates.

    Args:
        arguments: The arguments of the command: DL2PA options, the path of the script, and its arguments.
        is_restarted: Whether this process was started by this function, so that it does not start another one.

    Raises:
        SystemExit: Raised by the script; or with the status 2 and a line on stderr if the script or its config file
            cannot be read, an option is invalid, or the timm in the script's folder cannot be imported.
    """
    given, rest = read_flags(arguments)
    parser = make_flags()
    script, argv = Path(rest[0]), rest[1:]
    if not os.path.isfile(script):  # also where the name is too long for a file's
        parser.exit(2, f'timm-dl2pa run: {script}: no such file. The first argument that is not a DL2PA option must be '
                       f'the path of the script.\n')
    try:
        values = {name: _parse_value(value) for name, value in given.items()}
        plugin_options = PluginOptions.from_mapping(values) if values else None
        if plugin_options:
            check_times(plugin_options)
    except ValueError as error:
        parser.exit(2, f'timm-dl2pa run: {error}\n')

    first_model = None
    try:
        _use_adjacent_timm(script, arguments, is_restarted)
        text = script.read_text(encoding='utf-8', errors='replace')
        if given and 'create_model' not in text:
            print(f'timm-dl2pa run: {script.name} makes no model: the DL2PA options have no effect.', file=sys.stderr)
        elif given and _FLAG in text:
            argv = _with_model_kwargs(argv, given)
        elif given:
            first_model = plugin_options
    except (ValueError, OSError) as error:
        parser.exit(2, f'timm-dl2pa run: {error}\n')

    original = sys.argv, list(sys.path)
    sys.argv = [str(script), *argv]
    # Python adds the folder of a script. It precedes the entry that Python added for this command.
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with plugged_in(first_model):
            runpy.run_path(str(script), run_name='__main__')
    finally:
        sys.argv, sys.path[:] = original
        if {'-h', '--help'} & set(argv):
            print()
            print(parser.format_help().partition('\n\n')[2].partition('\n\n')[2], end='')


def _use_adjacent_timm(script: Path, arguments: Sequence[str], is_restarted: bool) -> None:
    """Restart this command with the timm in the script's folder, if there is one and another one was imported.

    In a checkout of timm's repository, `python train.py` uses the checkout's timm, which the script was written for.
    This command has imported the installed timm by then.

    Args:
        script: The path of the script.
        arguments: The arguments of the command.
        is_restarted: Whether this process is such a restart already.

    Raises:
        ValueError: The restart has imported another timm too.
    """
    folder = script.resolve().parent
    adjacent = folder / 'timm' / '__init__.py'
    if not adjacent.is_file() or adjacent.samefile(timm.__file__):
        return
    if is_restarted:
        raise ValueError(f'{script} needs the timm in its folder, but {timm.__file__} is imported in its place: '
                         f'uninstall that one, or move the script.')
    # PYTHONPATH cannot hold a folder with a colon in its name, and comes after the working directory of `python -m`.
    os.execv(sys.executable, [sys.executable, '-c', _RESTART, repr([str(folder), *sys.path]), *arguments])


def _parse_value(value: str) -> Any:
    """Parse a value as `--model-kwargs` does."""
    from timm.utils import ParseKwargs
    namespace = argparse.Namespace()
    ParseKwargs([], dest='kwargs')(None, namespace, [f'value={_quoted(value)}'])
    return namespace.kwargs['value']


def _quoted(value: str) -> str:
    """Return a value in quotes if it is not a Python expression ('2 epochs'): older timm refuses it without."""
    try:
        ast.literal_eval(value)
    except ValueError:
        pass  # a word, which timm takes as text
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        return repr(value)
    return value


def _with_model_kwargs(argv: Sequence[str], given: dict[str, str]) -> list[str]:
    """Return the script's arguments with the given options added to its --model-kwargs.

    argparse uses only the last --model-kwargs, which also hides those of the config file. All values are therefore
    collected in one flag at the end, where it does not consume positional arguments.
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
            kwargs = [value] if equals else []  # argparse uses only the last one
            from_command_line = True
            while not equals and argv and not argv[0].startswith('-'):
                kwargs.append(argv.pop(0))
        else:
            kept.append(word)
    path = config.parse_known_args(kept)[0].config
    if path and not from_command_line:
        values = _config_model_kwargs(path)
        kwargs = [f'{name}={_quoted(value) if isinstance(value, str) else repr(value)}'
                  for name, value in values.items() if name not in given]
    kwargs = [word for word in kwargs if word.partition('=')[0] not in given]
    return [*kept, _FLAG, *kwargs, *(f'{name}={_quoted(value)}' for name, value in given.items()), *tail]


def _config_model_kwargs(path: str) -> dict[str, Any]:
    """Return the `model_kwargs` of a script's config file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a mapping in YAML, or its model_kwargs are not one.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f'--config {path} is not YAML: {str(error).splitlines()[0]}.') from error
    values = (config.get('model_kwargs') or {}) if isinstance(config, dict) else config or {}
    if not isinstance(values, dict):
        raise ValueError(f'--config {path}: model_kwargs must be a mapping (model_kwargs: {{drop_rate: 0.1}}), not '
                         f'{shown(values)}.')
    return values
