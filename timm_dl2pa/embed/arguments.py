"""The options of `timm-dl2pa embed`."""
import argparse
from typing import Any

__all__ = ['add_embed']


def add_embed(commands: Any, key_values: type[argparse.Action]) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `timm-dl2pa`; `key_values` reads KEY=VALUE options."""
    parser = commands.add_parser(
        'embed',
        help='write the embeddings of a folder of images to one file',
        description='Writes the unit embeddings of all images of a folder, with file names and labels (the folders '
                    'that they lie in), to one file, for search and clustering. What is done is kept beside it until '
                    'it is complete: the same command goes on after an interruption.',
        epilog='example: timm-dl2pa embed dl2pa-finetune/model photos --out embeddings.safetensors',
    )
    parser.add_argument('source', metavar='MODEL',
                        help="a checkpoint of timm's train.py, a folder of save_model, or hf-hub:USER/NAME")
    parser.add_argument('images', metavar='IMAGES', help='a folder of images, however nested')
    parser.add_argument('--out', required=True, metavar='FILE',
                        help='the file: .safetensors, or .parquet (needs pyarrow)')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='default: %(default)s')
    parser.add_argument('--image-size', type=int, metavar='PIXELS', help="default: the model's")
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    parser.add_argument('--workers', type=int, default=4, metavar='N',
                        help='processes that prepare images (default: %(default)s)')
    parser.add_argument('--restart', action='store_true', help='discard what an interrupted run left')
    parser.add_argument('--use-ema', action='store_true', help='use the averaged weights of a checkpoint')
    parser.add_argument('--model', metavar='NAME', help='the backbone, if the checkpoint does not name it')
    parser.add_argument('--model-kwargs', nargs='*', action=key_values, metavar='KEY=VALUE', default={},
                        help='arguments of the backbone and dl2pa_... options that the checkpoint lacks')
    return parser
