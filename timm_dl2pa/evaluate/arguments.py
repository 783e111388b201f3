"""The options of `timm-dl2pa evaluate`."""
import argparse
from typing import Any

__all__ = ['add_evaluate']


def add_evaluate(commands: Any, key_values: type[argparse.Action]) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `timm-dl2pa`; `key_values` reads KEY=VALUE options."""
    parser = commands.add_parser(
        'evaluate',
        help='measure a model: accuracy, calibration, confusions, retrieval; with a report for the browser',
        description='Measures a DL2PA model on images with labels: top-1 and top-5, class by class, calibration before '
                    'and after a temperature, confusions and whether they go to near prototypes, recall@k, mAP@R and '
                    'nearest neighbours. Prints tables, and writes metrics.json and report.html. No matrix of all '
                    'images by all classes is made.',
        epilog='example: timm-dl2pa evaluate dl2pa-finetune/model photos --split val',
    )
    parser.add_argument('source', metavar='MODEL',
                        help="a checkpoint of timm's train.py, a folder of save_model, or hf-hub:USER/NAME")
    parser.add_argument('data', metavar='DATA',
                        help="a folder with a folder for each class, or with one for each split; or timm's name of a "
                             "data set, such as torch/cifar100 or hfds/USER/NAME")
    parser.add_argument('--split', default='validation', metavar='NAME',
                        help='default: %(default)s, under any of its names (val, valid, test, ...)')
    parser.add_argument('--data-dir', metavar='DIR', help="where a data set of timm's lies")
    parser.add_argument('--download', action='store_true', help="download a data set of timm's, if that can be")
    parser.add_argument('--class-map', metavar='FILE',
                        help="timm's file of class names by index, where the model does not know its classes")
    parser.add_argument('--output', default='dl2pa-evaluation', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='default: %(default)s')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="default: the model's")
    parser.add_argument('--queries', type=int, default=20_000, metavar='N',
                        help='retrieval: images that are searched among all, drawn at random where there are more '
                             '(default: %(default)s)')
    parser.add_argument('--neighbours', type=int, default=20, metavar='N',
                        help='retrieval: neighbours that vote on the class (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of the half that the temperature is fitted on, and of the queries (default: %(default)s)')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--workers', type=int, default=4, metavar='N',
                        help='processes that prepare images (default: %(default)s)')
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of a checkpoint')
    parser.add_argument('--model', metavar='NAME', help='the backbone, if the checkpoint does not name it')
    parser.add_argument('--model-kwargs', nargs='*', action=key_values, metavar='KEY=VALUE', default={},
                        help='arguments of the backbone and dl2pa_... options that the checkpoint lacks')
    return parser
