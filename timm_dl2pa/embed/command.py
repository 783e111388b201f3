"""The flow of `timm-dl2pa embed`: model, images, embeddings batch by batch, one file."""
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from tqdm import tqdm

from ..finetune.backbone import find_device
from ..finetune.images import Images, UnreadableImageError
from ..finetune.training import make_loader
from ..head import heads_of
from ..values import whole_number
from ..version import __version__
from .images import list_images
from .model import digest_of, embed_batches, load_any
from .partial import PartialEmbeddings
from .table import Embeddings, check_output, write_embeddings

__all__ = ['run_embed']


def run_embed(
        source: str,
        images: str,
        *,
        out: str,
        batch_size: int = 64,
        image_size: int | None = None,
        device: str | None = None,
        workers: int = 4,
        restart: bool = False,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> Path:
    """Write the embeddings of all images of a folder to one file.

    The arguments are the options of the command. What is done is kept beside the file until it is complete: called
    again after an interruption, the run goes on, and the file is the same.

    Args:
        source: See `load_any`.
        images: A folder of images, see `list_images`.
        out: The file, .safetensors or .parquet.
        batch_size: B.
        image_size: The side of the images in pixels. Default: the model's.
        device: The device of the model. Default: a GPU if there is one.
        workers: The number of processes that prepare images.
        restart: Whether what an earlier run left is discarded.
        model: See `load_any`.
        model_kwargs: See `load_any`.
        use_ema: See `load_any`.

    Returns:
        The file.

    Raises:
        ValueError: An option is out of range, the model is none, an image cannot be read, parquet is not installed, or
            the part beside the file is of another run.
        OSError: Model, images or output cannot be read or written. An older file is as it was.
    """
    whole_number('--batch-size', batch_size, 1)
    whole_number('--workers', workers, 0)
    if image_size is not None:
        whole_number('--image-size', image_size, 1)
    target = Path(out)
    check_output(target)
    torch_device = find_device(device)
    found = list_images(images)
    network = load_any(source, torch_device, model=model, model_kwargs=model_kwargs, use_ema=use_ema)
    config = timm.data.resolve_data_config({'img_size': image_size}, model=network)
    dim = heads_of(network)[0].dim
    about = {'model_sha256': digest_of(network), 'backbone': network.pretrained_cfg.get('architecture'), 'dim': dim,
             'preparation': {name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct',
                                                             'crop_mode')},
             'versions': {'timm_dl2pa': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}}
    if restart:
        PartialEmbeddings.discard(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = PartialEmbeddings(target, {**about, 'device': torch_device.type}, found.entries(), dim, batch_size)
    try:
        if part.done:
            print(f'{part.done:,} of {part.count:,} images are done.', flush=True)
        loader = make_loader(Images(found.files[part.done:], config), batch_size, workers, torch_device)
        with tqdm(total=part.count, initial=part.done, desc='embed', unit='image', disable=None) as bar:
            for embeddings, _ in embed_batches(network, loader, torch_device):
                part.add(embeddings)
                bar.update(len(embeddings))
        write_embeddings(target, Embeddings(part.embeddings(), torch.tensor(found.labels), found.names,
                                            found.label_names, about))
        part.remove()
    except UnreadableImageError as error:
        raise ValueError(f'{error.one_line()} The same command then goes on after the {part.done:,} images that are '
                         f'done.') from None
    finally:
        part.close()
    print(f'{target}: {part.count:,} embeddings in {dim} dimensions. To read it:\n'
          + (f'    found = timm_dl2pa.embed.read_embeddings({str(target)!r})' if target.suffix == '.safetensors' else
             f'    table = pyarrow.parquet.read_table({str(target)!r})'))
    return target
