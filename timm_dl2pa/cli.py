"""The command `timm-dl2pa`."""
import argparse
import sys
from collections.abc import Sequence
from typing import Any

from timm.utils import ParseKwargs

from .embed.arguments import add_embed
from .evaluate.arguments import add_evaluate
from .recipes import DEFAULT_RECIPE, RECIPES
from .version import __version__

# What inputs, disks and devices lead to.
_ERRORS = (ValueError, OSError, RuntimeError)


class _KeyValues(ParseKwargs):
    """timm's reading of KEY=VALUE arguments, with an error of argparse where one of them is none."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Sequence[str],
                 option_string: str | None = None) -> None:
        for value in values:
            if not value.partition('=')[0].isidentifier() or '=' not in value:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, such as img_size=64, not {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except Exception as error:  # of a value that is no valid Python expression
            raise argparse.ArgumentError(self, f'cannot be read ({error}): put texts in quotes') from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command-line arguments. Default: `sys.argv[1:]`.

    Returns:
        The exit status 0.

    Raises:
        SystemExit: With the status 2 and a line on stderr if an argument is invalid or the command fails.
    """
    parser = argparse.ArgumentParser(
        prog='timm-dl2pa', description='Classifier heads on fixed prototypes for timm models (DL2PA, CVPR 2024).')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    demo = commands.add_parser(
        'demo',
        help='train five heads on real images side by side, in about a minute',
        description='Trains the same small timm backbone with a linear classifier, with a linear classifier after the '
                    'neck of a DL2PA head, with static prototypes, with the paper\'s rule, and with the default. '
                    'Prints a table, and writes a report for the browser (report.html), its pictures, the table as '
                    'JSON and the trained default model. Without --data-dir, the images are letters as the faces of '
                    'DejaVu draw them that matplotlib carries.',
        epilog='example: timm-dl2pa demo --data-dir photos --model resnet18 --dim 32',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument('--data-dir', metavar='DIR', default=argparse.SUPPRESS,
                      help='an ImageFolder: DIR/<class>/*, of which a fifth is held out for testing, or '
                           'DIR/train/<class>/* and DIR/val/<class>/* (or valid, validation, test)')
    demo.add_argument('--model', default='test_byobnet', metavar='NAME', help='any timm model')
    demo.add_argument('--dim', type=int, default=64, metavar='D', help='dimension of the embeddings')
    demo.add_argument('--epochs', type=int, default=10, metavar='N', help='passes over the training images')
    demo.add_argument('--classes', type=int, default=300, metavar='C', help='number of letters; not with --data-dir')
    demo.add_argument('--seed', type=int, default=0, metavar='N',
                      help='seed of the weights, the order and warps of the images and the prototypes')
    demo.add_argument('--device', default=argparse.SUPPRESS, metavar='DEVICE',
                      help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    demo.add_argument('--output', default='dl2pa-demo', metavar='DIR', help='folder for all that is written')
    finetune = _add_finetune(commands)
    evaluate = add_evaluate(commands, _KeyValues)
    embed = add_embed(commands, _KeyValues)
    commands.add_parser(
        'run', add_help=False,
        help='run an unmodified script of timm with the DL2PA options among its flags (run --help)')
    inspect = commands.add_parser(
        'inspect',
        help='show the contents of a checkpoint',
        description='Prints config, metric, history of the assignment and angular margins of a checkpoint of timm\'s '
                    'train.py, a state dict, a safetensors file or a folder of save_model. Only tensors and plain '
                    'types are unpickled.',
    )
    inspect.add_argument('checkpoint', metavar='CHECKPOINT')
    inspect.add_argument('--all', action='store_true', dest='all_classes', help='list the margins of all classes')

    prototypes = commands.add_parser(
        'prototypes',
        help='make prototypes, and compare their quality with the proven bound',
        description="Makes K prototypes in d dimensions and compares their quality with the proven bound and with the "
                    "authors' recipe. wrap_dl2pa (prototypes=) and --dl2pa-prototypes read the file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    prototypes.add_argument('-k', dest='num_prototypes', type=int, required=True, metavar='K',
                            help='number of prototypes')
    prototypes.add_argument('-d', dest='dim', type=int, required=True, metavar='D', help='number of dimensions')
    prototypes.add_argument('--objective', default='uniform', metavar='NAME',
                            help="'uniform', the paper's energy, or 'separated', the smallest maximal cosine")
    prototypes.add_argument('--method', default='auto', metavar='NAME',
                            help='auto, quick (what a new head begins with), simplex, polygon, simplices, kerdock, '
                                 'bch, weil, cross_polytopes, optimise or sgd')
    prototypes.add_argument('--seed', type=int, default=0, metavar='N')
    prototypes.add_argument('--effort', type=float, default=1.0, metavar='X',
                            help='factor on the work budget of optimise')
    prototypes.add_argument('--device', default='cpu', metavar='DEVICE', help='device of optimise')
    prototypes.add_argument('--out', metavar='FILE', help='write the points to this safetensors file')
    prototypes.add_argument('--plot', metavar='FILE', help='write a plot to this image file (needs matplotlib)')
    prototypes.add_argument('--no-recipe', action='store_false', dest='recipe',
                            help="skip the authors' recipe, which takes seconds to minutes")
    fold = commands.add_parser(
        'fold',
        help='convert the checkpoint of a DL2PA model to one of a plain timm model',
        description='Folds neck and prototypes into one linear layer of a plain timm model, which ranks the classes of '
                    'every image in the same order (probabilities differ). The result needs timm alone.',
    )
    fold.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="a checkpoint of timm's train.py, a state dict, or a folder of save_model")
    fold.add_argument('output', metavar='OUT', help='the new file, .safetensors or .pth')
    fold.add_argument('--use-ema', action='store_true', help='use the averaged weights')
    fold.add_argument('--normalize', action='store_true', help='keep the exact logits, in a classifier of three layers')
    fold.add_argument('--model', metavar='NAME', help='the backbone, if the checkpoint does not name it')
    fold.add_argument('--model-kwargs', nargs='*', action=_KeyValues, metavar='KEY=VALUE', default={},
                      help='arguments of the backbone and dl2pa_... options that the checkpoint lacks')

    push = commands.add_parser(
        'push',
        help="upload a checkpoint's model to the Hugging Face Hub",
        description='Uploads the whole model, the head alone, or the folded plain timm model in one commit, as '
                    'safetensors with a model card.',
    )
    push.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="a checkpoint of timm's train.py, or a folder of save_model")
    push.add_argument('repo_id', metavar='USER/NAME', help='the repository, created if necessary')
    kind = push.add_mutually_exclusive_group()
    kind.add_argument('--head-only', action='store_true', help='upload the head alone')
    kind.add_argument('--folded', action='store_true', help='upload the folded plain timm model')
    push.add_argument('--use-ema', action='store_true', help='use the averaged weights')
    push.add_argument('--model', metavar='NAME', help='the backbone, if the checkpoint does not name it')
    push.add_argument('--model-kwargs', nargs='*', action=_KeyValues, metavar='KEY=VALUE', default={},
                      help='arguments of the backbone and dl2pa_... options that the checkpoint lacks')
    push.add_argument('--base-model', metavar='NAME', help='for the card: the model that was fine-tuned')
    push.add_argument('--license', metavar='NAME', help='for the card: the licence of the repository')
    push.add_argument('--revision', metavar='BRANCH', help='the branch; default: main')
    push.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    push.add_argument('--create-pr', action='store_true', help='open a pull request')

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ['run']:
        # The DL2PA options may be anywhere among those of the script, which the subcommands of argparse do not support.
        from .timm_scripts.run import run_script
        run_script(arguments[1:])
        return 0
    options = vars(parser.parse_args(arguments))
    command = options.pop('command')
    if command == 'prototypes':
        from .prototypes.report import report_prototypes
        try:
            for line in report_prototypes(**options):
                print(line, flush=True)
        except ModuleNotFoundError as error:
            prototypes.exit(2, f'timm-dl2pa prototypes --plot needs {error.name}: pip install "timm-dl2pa[demo]"\n')
        except _ERRORS as error:
            prototypes.exit(2, f'timm-dl2pa prototypes: {error}\n')
        return 0
    if command == 'fold':
        from .timm_scripts.conversion import fold_checkpoint
        try:
            print(fold_checkpoint(options.pop('checkpoint'), **options))
        except _ERRORS as error:
            fold.exit(2, f'timm-dl2pa fold: {error}\n')
        return 0
    if command == 'push':
        from .timm_scripts.conversion import push_checkpoint
        try:
            print(push_checkpoint(options.pop('checkpoint'), options.pop('repo_id'), **options))
        except _ERRORS as error:
            push.exit(2, f'timm-dl2pa push: {error}\n')
        return 0
    if command == 'inspect':
        from .timm_scripts.inspection import inspect_checkpoint
        try:
            for line in inspect_checkpoint(options['checkpoint'], options['all_classes']):
                print(line)
        except _ERRORS as error:
            inspect.exit(2, f'timm-dl2pa inspect: {error}\n')
        return 0
    if command == 'finetune':
        from .finetune import run_finetune
        try:
            run_finetune(options.pop('data'), **options)
        except KeyboardInterrupt:
            finetune.exit(130, 'timm-dl2pa finetune: interrupted before there was a model to save\n')
        except _ERRORS as error:
            finetune.exit(2, f'timm-dl2pa finetune: {error}\n')
        return 0
    if command == 'evaluate':
        from .evaluate.command import run_evaluate
        try:
            run_evaluate(options.pop('source'), options.pop('data'), **options)
        except _ERRORS as error:
            evaluate.exit(2, f'timm-dl2pa evaluate: {error}\n')
        return 0
    if command == 'embed':
        from .embed.command import run_embed
        try:
            run_embed(options.pop('source'), options.pop('images'), **options)
        except KeyboardInterrupt:
            embed.exit(130, 'timm-dl2pa embed: interrupted: the same command goes on where it stopped\n')
        except _ERRORS as error:
            embed.exit(2, f'timm-dl2pa embed: {error}\n')
        return 0
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        demo.exit(2, f'timm-dl2pa demo needs {error.name}: pip install "timm-dl2pa[demo]"\n')
    try:
        run_demo(**options)
    except _ERRORS as error:
        demo.exit(2, f'timm-dl2pa demo: {error}\n')
    return 0


def _add_finetune(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        'finetune',
        help='fine-tune a pretrained timm model with a DL2PA head on a folder of images',
        description='Sets the head by the features of a pretrained timm model (prime), then trains model and head, '
                    'and keeps the epoch of the highest validation accuracy. Writes the model, the metrics as JSON, '
                    'what is confused with what as a table and, with matplotlib, as a picture. Ctrl-C ends the '
                    'training and keeps the best epoch so far.',
    )
    parser.add_argument('data', metavar='DATA',
                        help='an ImageFolder: DATA/train/<class>/* and DATA/val/<class>/* (or valid, validation, '
                             'test); or DATA/<class>/*, of which a fifth of each class is held out for validation')
    parser.add_argument('--model', default='efficientnet_b0.ra4_e3600_r224_in1k', metavar='NAME',
                        help='any timm model (default: %(default)s)')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--weights', metavar='FILE',
                       help="the model's weights under timm's names (.safetensors, .pth), in place of timm's download")
    start.add_argument('--no-pretrained', action='store_false', dest='pretrained', help='start from random weights')
    parser.add_argument('--dim', type=int, metavar='D',
                        help='dimension of the embeddings (default: one less than there are classes, from 16 to 128)')
    parser.add_argument('--recipe', choices=list(RECIPES), default=DEFAULT_RECIPE, help='default: %(default)s')
    parser.add_argument('--epochs', type=int, default=20, metavar='N',
                        help='default: %(default)s; 0: set the head by the features and train nothing')
    parser.add_argument('--lr', type=float, metavar='X',
                        help='learning rate of AdamW at the start (default: 1e-4; 1e-3 with --freeze or from random '
                             'weights)')
    parser.add_argument('--freeze', action='store_true', help='train the head alone, on the backbone as it is')
    parser.add_argument('--train-batch-norm', action='store_true',
                        help="let the backbone's batch norms use the statistics of the batch; by default they keep "
                             "those of the pretraining")
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='default: %(default)s')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="default: the model's")
    parser.add_argument('--patience', type=int, default=5, metavar='N',
                        help='stop when the validation accuracy has not risen for N epochs (default: %(default)s)')
    parser.add_argument('--output', default='dl2pa-finetune', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of the weights, the order of the images, the images held out and the prototypes')
    parser.add_argument('--workers', type=int, default=4, metavar='N',
                        help='processes that prepare images (default: %(default)s)')
    return parser
