"""The command `timm-dl2pa`."""
import argparse
import sys
from collections.abc import Sequence

from timm.utils import ParseKwargs

from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return 0; where an argument is no good, exit with 2 and a line on stderr."""
    parser = argparse.ArgumentParser(
        prog='timm-dl2pa', description='Classifier heads on fixed prototypes for timm models (DL2PA, CVPR 2024).')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    demo = commands.add_parser(
        'demo',
        help='train three heads on real images side by side, in under a minute',
        description='Trains the same timm backbone with its linear classifier, with fixed prototypes under a static '
                    'assignment, and with DL2PA; prints a table, and writes the trained model, the table as JSON and a '
                    'picture. Without --data-dir the images are scikit-learn\'s handwritten digits.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument('--data-dir', metavar='DIR',
                      help='an ImageFolder: DIR/<class>/*, of which a fifth is held out, or DIR/train/<class>/* and '
                           'DIR/val/<class>/* (also validation, test)')
    demo.add_argument('--model', default='test_resnet', metavar='NAME', help='any timm model')
    demo.add_argument('--dim', type=int, default=3, metavar='D', help='dimension of the embeddings')
    demo.add_argument('--epochs', type=int, default=8, metavar='N')
    demo.add_argument('--seed', type=int, default=0, metavar='N',
                      help='of the weights, the order of the images and the prototypes')
    demo.add_argument('--device', default=None, metavar='DEVICE', help='cpu, cuda, cuda:1, ...; default: a GPU if any')
    demo.add_argument('--output', default='dl2pa-demo', metavar='DIR', help='where model, table and picture go')
    commands.add_parser(
        'run', add_help=False,
        help="run a script of timm's, unmodified, with the DL2PA options among its flags (run --help)")
    inspect = commands.add_parser(
        'inspect',
        help='show what is in a checkpoint',
        description='Prints config, metric, history of the assignment and angular margins of a checkpoint of timm\'s '
                    'train.py, a state dict, a safetensors file or a folder of save_model\'s. Nothing is unpickled but '
                    'tensors and plain types.',
    )
    inspect.add_argument('checkpoint', metavar='CHECKPOINT')
    inspect.add_argument('--all', action='store_true', dest='all_classes', help='list the margins of all classes')

    prototypes = commands.add_parser(
        'prototypes',
        help='make prototypes, and measure them beside what the sphere allows',
        description="Makes K prototypes in d dimensions and prints their quality beside the proven bound and the "
                    "authors' recipe. The file serves as `prototypes=` of wrap_dl2pa and as --dl2pa-prototypes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    prototypes.add_argument('-k', dest='num_prototypes', type=int, required=True, metavar='K', help='how many')
    prototypes.add_argument('-d', dest='dim', type=int, required=True, metavar='D', help='dimensions')
    prototypes.add_argument('--objective', default='uniform', metavar='NAME',
                            help="'uniform', the paper's energy, or 'separated', the smallest maximal cosine")
    prototypes.add_argument('--method', default='auto', metavar='NAME',
                            help='auto, simplex, polygon, simplices, kerdock, bch, weil, cross_polytopes, optimise '
                                 'or sgd')
    prototypes.add_argument('--seed', type=int, default=0, metavar='N')
    prototypes.add_argument('--effort', type=float, default=1.0, metavar='X',
                            help='factor on the work that optimise may do')
    prototypes.add_argument('--device', default='cpu', metavar='DEVICE', help='where optimise computes')
    prototypes.add_argument('--out', metavar='FILE', help='write the points to this safetensors file')
    prototypes.add_argument('--plot', metavar='FILE', help='draw a picture (needs matplotlib)')
    prototypes.add_argument('--no-recipe', action='store_false', dest='recipe',
                            help="leave the authors' recipe out, which takes seconds to minutes")
    fold = commands.add_parser(
        'fold',
        help='make the checkpoint of a plain timm model from that of a DL2PA model',
        description='Multiplies neck and prototypes to one linear layer, as timm makes it, which ranks the classes of '
                    'every image as before (probabilities differ). The result needs timm alone.',
    )
    fold.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="of timm's train.py, a state dict, or a folder of save_model's")
    fold.add_argument('output', metavar='OUT', help='a new file: .safetensors, or .pth')
    fold.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    fold.add_argument('--normalize', action='store_true', help='keep the exact logits, in a classifier of three layers')
    fold.add_argument('--model', metavar='NAME', help='the backbone, where the checkpoint does not say')
    fold.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, metavar='KEY=VALUE', default={},
                      help='its arguments and the dl2pa_... options, where the checkpoint does not say')

    push = commands.add_parser(
        'push',
        help="upload a checkpoint's model to the Hugging Face Hub",
        description='Uploads backbone and head, the head alone, or the plain timm model that they fold to, in one '
                    'commit of safetensors, with a model card.',
    )
    push.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="of timm's train.py, or a folder of save_model's")
    push.add_argument('repo_id', metavar='ME/NAME')
    kind = push.add_mutually_exclusive_group()
    kind.add_argument('--head-only', action='store_true', help='the head alone')
    kind.add_argument('--folded', action='store_true', help='the plain timm model')
    push.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    push.add_argument('--model', metavar='NAME', help='the backbone, where the checkpoint does not say')
    push.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, metavar='KEY=VALUE', default={},
                      help='its arguments and the dl2pa_... options, where the checkpoint does not say')
    push.add_argument('--base-model', metavar='NAME', help='for the card: what it was trained from')
    push.add_argument('--license', metavar='NAME', help='for the card')
    push.add_argument('--revision', metavar='BRANCH')
    push.add_argument('--private', action='store_true', default=None, help='for a new repository')
    push.add_argument('--create-pr', action='store_true', help='open a pull request')

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ['run']:
        # Its options may stand anywhere among the script's, which argparse's subcommands do not know.
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
        except (ValueError, OSError, RuntimeError) as error:
            prototypes.exit(2, f'timm-dl2pa prototypes: {error}\n')
        return 0
    if command == 'fold':
        from .timm_scripts.conversion import fold_checkpoint
        try:
            print(fold_checkpoint(options.pop('checkpoint'), **options))
        except (ValueError, OSError) as error:
            fold.exit(2, f'timm-dl2pa fold: {error}\n')
        return 0
    if command == 'push':
        from .timm_scripts.conversion import push_checkpoint
        try:
            print(push_checkpoint(options.pop('checkpoint'), options.pop('repo_id'), **options))
        except (ValueError, OSError, RuntimeError) as error:
            push.exit(2, f'timm-dl2pa push: {error}\n')
        return 0
    if command == 'inspect':
        from .timm_scripts.inspection import inspect_checkpoint
        try:
            for line in inspect_checkpoint(options['checkpoint'], options['all_classes']):
                print(line)
        except (ValueError, OSError) as error:
            inspect.exit(2, f'timm-dl2pa inspect: {error}\n')
        return 0
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        demo.exit(2, f'timm-dl2pa demo needs {error.name}: pip install "timm-dl2pa[demo]"\n')
    try:
        run_demo(**options)
    except (ValueError, OSError) as error:
        demo.exit(2, f'timm-dl2pa demo: {error}\n')
    return 0
