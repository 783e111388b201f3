"""The command `timm-dl2pa`. Its help needs neither torch nor timm: what a sub-command needs is imported to run it."""
import sys
from collections.abc import Sequence
from typing import Any

from .flags import read_flags
from .parsers import make_parser

__all__ = ['main']

# What inputs, disks and devices lead to.
_ERRORS = (ValueError, OSError, RuntimeError)
# What is said where a module of an extra is missing, and after Ctrl-C.
_NEEDS = {'demo': 'demo', 'prototypes': 'prototypes --plot'}
_INTERRUPTED = {'finetune': 'interrupted before there was a model to save',
                'evaluate': 'interrupted: nothing was written',
                'embed': 'interrupted: the same command goes on where it stopped'}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command-line arguments. Default: `sys.argv[1:]`.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: With the status 2 and a line on stderr if an argument is invalid or the command fails.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ['run']:
        # The DL2PA options may be anywhere among those of the script, which the subcommands of argparse do not support.
        read_flags(arguments[1:])  # shows the help
        options: dict[str, Any] = {'arguments': arguments[1:]}
        command, parsers = 'run', {}
    else:
        parser, parsers = make_parser()
        options = vars(parser.parse_args(arguments))
        command = options.pop('command')
    from .models import registry  # noqa: F401  as `import timm_dl2pa` does, save in this command
    if command == 'run':
        from .timm_scripts.run import run_script
        run_script(options['arguments'])
        return 0
    try:
        _run(command, options)
    except ModuleNotFoundError as error:
        if command not in _NEEDS:
            raise
        parsers[command].exit(2, f'timm-dl2pa {_NEEDS[command]} needs {error.name}: pip install "timm-dl2pa[demo]"\n')
    except KeyboardInterrupt:
        if command not in _INTERRUPTED:
            raise
        parsers[command].exit(130, f'timm-dl2pa {command}: {_INTERRUPTED[command]}\n')
    except _ERRORS as error:
        parsers[command].exit(2, f'timm-dl2pa {command}: {error}\n')
    return 0


def _run(command: str, options: dict[str, Any]) -> None:
    if command == 'demo':
        from .demo import run_demo
        run_demo(**options)
    elif command == 'finetune':
        from .finetune import run_finetune
        run_finetune(options.pop('data'), **options)
    elif command == 'evaluate':
        from .evaluate.command import run_evaluate
        run_evaluate(options.pop('source'), options.pop('data'), **options)
    elif command == 'embed':
        from .embed.command import run_embed
        run_embed(options.pop('source'), options.pop('images'), **options)
    elif command == 'inspect':
        from .timm_scripts.inspection import inspect_checkpoint
        for line in inspect_checkpoint(options['checkpoint'], options['all_classes']):
            print(line)
    elif command == 'prototypes':
        from .prototypes.report import report_prototypes
        for line in report_prototypes(**options):
            print(line, flush=True)
    elif command == 'fold':
        from .timm_scripts.conversion import fold_checkpoint
        print(fold_checkpoint(options.pop('checkpoint'), **options))
    elif command == 'push':
        from .timm_scripts.conversion import push_checkpoint
        print(push_checkpoint(options.pop('checkpoint'), options.pop('repo_id'), **options))
