"""The parsers of the command `timm-dl2pa`. They import neither torch nor timm, so that its help is quick."""
import argparse
from typing import Any

from .recipes import DEFAULT_RECIPE, RECIPES
from .version import __version__

__all__ = ['make_parser']


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help where it has one that is a value, and leaves examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_value = action.default is not None and not isinstance(action.default, (bool, dict))
        return super()._get_help_string(action) if is_value else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith('example:') else super()._fill_text(text, width, indent)


class _KeyValues(argparse.Action):
    """timm's reading of KEY=VALUE arguments, with an error of argparse where one of them is none."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        from timm.utils import ParseKwargs
        for value in values:
            if not value.partition('=')[0].isidentifier() or '=' not in value:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, such as img_size=64, not {value!r}')
        try:
            ParseKwargs(self.option_strings, self.dest)(parser, namespace, values, option_string)
        except Exception as error:  # of a value that is no valid Python expression
            raise argparse.ArgumentError(self, f'cannot be read ({error}): put texts in quotes') from error


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command, and those of its sub-commands by their names."""
    parser = argparse.ArgumentParser(
        prog='timm-dl2pa', description='Classifier heads on fixed prototypes for timm models (DL2PA, CVPR 2024).')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    _add_demo(commands)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_embed(commands)
    commands.add_parser(
        'run', add_help=False,
        help='run an unmodified script of timm with the DL2PA options among its flags (run --help)')
    _add_inspect(commands)
    _add_prototypes(commands)
    _add_fold(commands)
    _add_push(commands)
    return parser, dict(commands.choices)


def _add(commands: Any, name: str, help: str, description: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=f'example:\n  timm-dl2pa {name} {example}',
        formatter_class=HelpFormatter)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _add(
        commands, 'demo',
        help='train five heads on real images side by side, in about a minute',
        description='Trains the same small timm backbone with a linear classifier, with a linear classifier after the '
                    'neck of a DL2PA head, with static prototypes, with the paper\'s rule, and with the default. '
                    'Prints a table, and writes a report for the browser (report.html), its pictures, the table as '
                    'JSON and the trained default model. Without --data-dir, the images are letters as the faces of '
                    'DejaVu draw them that matplotlib carries.',
        example='--data-dir photos --model resnet18 --dim 32')
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


def _add_finetune(commands: Any) -> None:
    parser = _add(
        commands, 'finetune',
        help='fine-tune a pretrained timm model with a DL2PA head on a folder of images',
        description='Sets the head by the features of a pretrained timm model (prime), then trains model and head, '
                    'and keeps the epoch of the highest validation accuracy. Writes the model, the metrics as JSON, '
                    'what is confused with what as a table and, with matplotlib, as a picture. Ctrl-C ends the '
                    'training and keeps the best epoch so far.',
        example='pets --model resnet50.a1_in1k --epochs 30 --output my-pets')
    parser.add_argument('data', metavar='DATA',
                        help='an ImageFolder: DATA/train/<class>/* and DATA/val/<class>/* (or valid, validation, '
                             'test); or DATA/<class>/*, of which a fifth of each class is held out for validation')
    parser.add_argument('--model', default='efficientnet_b0.ra4_e3600_r224_in1k', metavar='NAME', help='any timm model')
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--weights', metavar='FILE',
                       help="the model's weights under timm's names (.safetensors, .pth), in place of timm's download")
    start.add_argument('--no-pretrained', action='store_false', dest='pretrained', help='start from random weights')
    parser.add_argument('--dim', type=int, metavar='D',
                        help='dimension of the embeddings (default: one less than there are classes, from 16 to 128)')
    parser.add_argument('--recipe', choices=list(RECIPES), default=DEFAULT_RECIPE, help='how the head is trained')
    parser.add_argument('--epochs', type=int, default=20, metavar='N',
                        help='passes over the training images; 0: set the head by the features and train nothing')
    parser.add_argument('--lr', type=float, metavar='X',
                        help='learning rate of AdamW at the start (default: 1e-4; 1e-3 with --freeze or from random '
                             'weights)')
    parser.add_argument('--freeze', action='store_true', help='train the head alone, on the backbone as it is')
    parser.add_argument('--train-batch-norm', action='store_true',
                        help="let the backbone's batch norms use the statistics of the batch; by default they keep "
                             "those of the pretraining")
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images of a batch')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="side of the images (default: the model's)")
    parser.add_argument('--patience', type=int, default=5, metavar='N',
                        help='stop when the validation accuracy has not risen for N epochs')
    parser.add_argument('--output', default='dl2pa-finetune', metavar='DIR', help='folder for all that is written')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of the weights, the order of the images, the images held out and the prototypes')
    parser.add_argument('--workers', type=int, default=4, metavar='N', help='processes that prepare images')


def _add_evaluate(commands: Any) -> None:
    parser = _add(
        commands, 'evaluate',
        help='measure a model: accuracy, calibration, confusions, retrieval; with a report for the browser',
        description='Measures a DL2PA model on images with labels: top-1 and top-5, class by class, calibration before '
                    'and after a temperature, confusions and whether they go to near prototypes, recall@k, mAP@R and '
                    'nearest neighbours. Prints tables, and writes metrics.json and report.html. No matrix of all '
                    'images by all classes is made.',
        example='dl2pa-finetune/model photos --split val')
    parser.add_argument('source', metavar='MODEL',
                        help="a checkpoint of timm's train.py, a folder of save_model, or hf-hub:USER/NAME")
    parser.add_argument('data', metavar='DATA',
                        help="a folder with a folder for each class, or with one for each split; or timm's name of a "
                             "data set, such as torch/cifar100 or hfds/USER/NAME")
    parser.add_argument('--split', default='validation', metavar='NAME',
                        help='the part that is measured, under any of its names (val, valid, test, ...)')
    parser.add_argument('--data-dir', metavar='DIR', help="where a data set of timm's lies")
    parser.add_argument('--download', action='store_true', help="download a data set of timm's, if that can be")
    parser.add_argument('--class-map', metavar='FILE',
                        help="timm's file of class names by index, where the model does not know its classes")
    parser.add_argument('--output', default='dl2pa-evaluation', metavar='DIR', help='folder for all that is written')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images of a batch')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="side of the images (default: the model's)")
    parser.add_argument('--queries', type=int, default=20_000, metavar='N',
                        help='retrieval: images that are searched among all, drawn at random where there are more')
    parser.add_argument('--neighbours', type=int, default=20, metavar='N',
                        help='retrieval: neighbours that vote on the class')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of the half that the temperature is fitted on, and of the queries')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--workers', type=int, default=4, metavar='N', help='processes that prepare images')
    _add_checkpoint_options(parser)


def _add_embed(commands: Any) -> None:
    parser = _add(
        commands, 'embed',
        help='write the embeddings of a folder of images to one file',
        description='Writes the unit embeddings of all images of a folder, with file names and labels (the folders '
                    'that they lie in), to one file, for search and clustering. What is done is kept beside it until '
                    'it is complete: the same command goes on after an interruption.',
        example='dl2pa-finetune/model photos --out embeddings.safetensors')
    parser.add_argument('source', metavar='MODEL',
                        help="a checkpoint of timm's train.py, a folder of save_model, or hf-hub:USER/NAME")
    parser.add_argument('images', metavar='IMAGES', help='a folder of images, however nested')
    parser.add_argument('--out', required=True, metavar='FILE',
                        help='the file: .safetensors, or .parquet (needs pyarrow)')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images of a batch')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="side of the images (default: the model's)")
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--workers', type=int, default=4, metavar='N', help='processes that prepare images')
    parser.add_argument('--restart', action='store_true', help='discard what an interrupted run left')
    _add_checkpoint_options(parser)


def _add_inspect(commands: Any) -> None:
    inspect = _add(
        commands, 'inspect',
        help='show the contents of a checkpoint',
        description='Prints config, metric, history of the assignment and angular margins of a checkpoint of timm\'s '
                    'train.py, a state dict, a safetensors file or a folder of save_model. Only tensors and plain '
                    'types are unpickled.',
        example='output/train/my-run/model_best.pth.tar --all')
    inspect.add_argument('checkpoint', metavar='CHECKPOINT', help='the file or folder')
    inspect.add_argument('--all', action='store_true', dest='all_classes', help='list the margins of all classes')


def _add_prototypes(commands: Any) -> None:
    prototypes = _add(
        commands, 'prototypes',
        help='make prototypes, and compare their quality with the proven bound',
        description="Makes K prototypes in d dimensions and compares their quality with the proven bound and with the "
                    "authors' recipe. wrap_dl2pa (prototypes=) and --dl2pa-prototypes read the file.",
        example='-k 1000 -d 128 --no-recipe --out prototypes.safetensors')
    prototypes.add_argument('-k', dest='num_prototypes', type=int, required=True, metavar='K',
                            help='number of prototypes')
    prototypes.add_argument('-d', dest='dim', type=int, required=True, metavar='D', help='number of dimensions')
    prototypes.add_argument('--objective', default='uniform', metavar='NAME',
                            help="'uniform', the paper's energy, or 'separated', the smallest maximal cosine")
    prototypes.add_argument('--method', default='auto', metavar='NAME',
                            help='auto, quick (what a new head begins with), simplex, polygon, simplices, kerdock, '
                                 'bch, weil, cross_polytopes, optimise or sgd')
    prototypes.add_argument('--seed', type=int, default=0, metavar='N',
                            help='of orientations, subsets of codes and starts of the optimisation')
    prototypes.add_argument('--effort', type=float, default=1.0, metavar='X',
                            help='factor on the work budget of optimise')
    prototypes.add_argument('--device', default='cpu', metavar='DEVICE', help='device of optimise')
    prototypes.add_argument('--out', metavar='FILE', help='write the points to this safetensors file')
    prototypes.add_argument('--plot', metavar='FILE', help='write a plot to this image file (needs matplotlib)')
    prototypes.add_argument('--no-recipe', action='store_false', dest='recipe',
                            help="skip the authors' recipe, which takes seconds to minutes")


def _add_fold(commands: Any) -> None:
    fold = _add(
        commands, 'fold',
        help='convert the checkpoint of a DL2PA model to one of a plain timm model',
        description='Folds neck and prototypes into one linear layer of a plain timm model, which ranks the classes of '
                    'every image in the same order (probabilities differ). The result needs timm alone.',
        example='model_best.pth.tar plain.safetensors --use-ema')
    fold.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="a checkpoint of timm's train.py, a state dict, or a folder of save_model")
    fold.add_argument('output', metavar='OUT', help='the new file, .safetensors or .pth')
    fold.add_argument('--normalize', action='store_true', help='keep the exact logits, in a classifier of three layers')
    _add_checkpoint_options(fold)


def _add_push(commands: Any) -> None:
    push = _add(
        commands, 'push',
        help="upload a checkpoint's model to the Hugging Face Hub",
        description='Uploads the whole model, the head alone, or the folded plain timm model in one commit, as '
                    'safetensors with a model card.',
        example='dl2pa-finetune/model me/pets-resnet50 --license apache-2.0')
    push.add_argument('checkpoint', metavar='CHECKPOINT',
                      help="a checkpoint of timm's train.py, or a folder of save_model")
    push.add_argument('repo_id', metavar='USER/NAME', help='the repository, created if necessary')
    kind = push.add_mutually_exclusive_group()
    kind.add_argument('--head-only', action='store_true', help='upload the head alone')
    kind.add_argument('--folded', action='store_true', help='upload the folded plain timm model')
    _add_checkpoint_options(push)
    push.add_argument('--base-model', metavar='NAME', help='for the card: the model that was fine-tuned')
    push.add_argument('--license', metavar='NAME', help='for the card: the licence of the repository')
    push.add_argument('--revision', metavar='BRANCH', help='the branch (default: main)')
    push.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    push.add_argument('--create-pr', action='store_true', help='open a pull request')


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights')
    parser.add_argument('--model', metavar='NAME', help='the backbone, if the checkpoint does not name it')
    parser.add_argument('--model-kwargs', nargs='*', action=_KeyValues, metavar='KEY=VALUE', default={},
                        help='arguments of the backbone and dl2pa_... options that the checkpoint lacks')
