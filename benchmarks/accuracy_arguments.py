"""The arguments of `accuracy.py`, and the recipe that they say."""
import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from accuracy_queue import QUEUES
from accuracy_recipe import SIZES, Recipe
from results_file import RESULTS

__all__ = ['make_parser', 'recipe_of']


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command: one option for each field of a recipe, and where data and results are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir')
    parser.add_argument('--arrays')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=RESULTS / 'accuracy')
    parser.add_argument('--queue', choices=QUEUES, help='run a list of runs, one after the other')
    parser.add_argument('--parallel', type=int, default=1, help='runs of a list side by side, on a large GPU')
    parser.add_argument('--until', type=float, default=math.inf, metavar='UNIX_TIME',
                        help='end by then with a checkpoint, from which the next call goes on; exit status 3')
    parser.add_argument('--size', choices=tuple(SIZES), help='a set of defaults')
    parser.add_argument('--dl2pa', nargs='*', default=[], metavar='NAME=VALUE', help='arguments of AssignmentScheduler')
    for name, value in asdict(Recipe()).items():
        flag = '--' + name.replace('_', '-')
        if isinstance(value, bool):
            parser.add_argument(flag, action='store_true', default=None)
        elif name != 'dl2pa':
            kinds = {'scale': float, 'loss_weight': float, 'imbalance': float, 'image_size': int, 'neck': str,
                     'start_from': str, 'dl2pa_recipe': str}
            parser.add_argument(flag, type=kinds.get(name) or type(value))
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe of parsed arguments: the defaults, the size's, and what was given."""
    given = {name: getattr(args, name) for name in asdict(Recipe()) if name != 'dl2pa'}
    given = {name: value for name, value in given.items() if value is not None}
    options = {}
    for pair in args.dl2pa:
        name, _, value = pair.partition('=')
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return Recipe(**{**SIZES.get(args.size, {}), **given, 'dl2pa': options})
