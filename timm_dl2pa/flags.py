"""The table of options as flags of `timm-dl2pa run`, and its help."""
import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from .options import PREFIX, PluginOptions

__all__ = ['make_flags', 'read_flags']


def make_flags() -> argparse.ArgumentParser:
    """Return a parser of the DL2PA options, which leaves the arguments of the script alone."""
    parser = argparse.ArgumentParser(
        prog='timm-dl2pa run',
        usage='timm-dl2pa run [DL2PA options] SCRIPT [options of the script and of DL2PA]',
        description='Runs an unmodified script of timm (train.py, validate.py, inference.py, onnx_export.py, '
                    'benchmark.py, ...) with a DL2PA head on the model that it creates.',
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group('DL2PA options')
    for spec in fields(PluginOptions):
        flag = '--' + (PREFIX + spec.name).replace('_', '-')
        # Strings, which are all parsed in the same way as the values of --model-kwargs.
        kind: dict[str, Any] = {'action': 'store_const', 'const': 'True'} if bool in spec.metadata['kinds'] else \
            {'metavar': spec.name.rpartition('_')[2].upper()}
        group.add_argument(flag, dest=PREFIX + spec.name, default=argparse.SUPPRESS, help=_help(spec), **kind)
    return parser


_EXAMPLES = '''
example:
  timm-dl2pa run train.py --dl2pa-dim 128 --model resnet50 --data-dir images
  torchrun --nproc-per-node 4 -m timm_dl2pa run train.py --data-dir images
'''


def _help(spec: 'Field[Any]') -> str:
    """Return an option's help with its default; argparse takes % for a placeholder."""
    default = '' if spec.default is None or spec.default is False else f' (default: {spec.default})'
    return (spec.metadata['help'] + default).replace('%', '%%')


def read_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read the DL2PA options among the arguments of the command.

    Args:
        arguments: Those after `timm-dl2pa run`: DL2PA options, the path of the script, and its arguments.

    Returns:
        The values of the options by their dl2pa_... names, and the other arguments: the script is the first of them.

    Raises:
        SystemExit: There is no script. The help was printed; with the status 0 if it was asked for, otherwise 2.
    """
    parser = make_flags()
    options, rest = parser.parse_known_args(list(arguments))
    if not rest or rest[0] in ('-h', '--help'):
        parser.print_help()
        print(_EXAMPLES, end='')
        raise SystemExit(0 if rest else 2)
    return vars(options), rest
