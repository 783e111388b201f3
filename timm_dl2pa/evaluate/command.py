"""The flow of `timm-dl2pa evaluate`: model, images, embeddings, measures, tables and files."""
import json
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn as nn
from tqdm import tqdm

from ..embed.model import embed_batches, load_any
from ..files.folder import replace_files
from ..files.html import page, paragraph
from ..files.html import table as html_table
from ..finetune.backbone import find_device
from ..finetune.images import UnreadableImageError
from ..finetune.report import text_table
from ..finetune.training import make_loader
from ..head import heads_of
from ..prototypes.files import staging_folder
from ..values import whole_number
from ..version import __version__
from .data import LabelledImages, class_places, open_images
from .measure import Measures, measure
from .pictures import confused_images, reliability_diagram
from .report import as_json, sections

__all__ = ['run_evaluate']

_METRICS, _REPORT = 'metrics.json', 'report.html'


def run_evaluate(
        source: str,
        data: str,
        *,
        split: str = 'validation',
        data_dir: str | None = None,
        download: bool = False,
        class_map: str | None = None,
        output: str = 'dl2pa-evaluation',
        batch_size: int = 64,
        image_size: int | None = None,
        queries: int = 20_000,
        neighbours: int = 20,
        seed: int = 0,
        device: str | None = None,
        workers: int = 4,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> dict[str, Any]:
    """Measure a model on labelled images, print tables, and write `metrics.json` and `report.html`.

    The arguments are the options of the command.

    Args:
        source: See `embed.model.load_any`.
        data: See `open_images`.
        split: See `open_images`.
        data_dir: See `open_images`.
        download: See `open_images`.
        class_map: See `open_images`.
        output: The folder for both files.
        batch_size: B.
        image_size: The side of the images in pixels. Default: the model's.
        queries: The most images that are searched among all.
        neighbours: The number of neighbours that vote.
        seed: Of the images that the temperature is fitted on, and of the queries.
        device: The device of the model. Default: a GPU if there is one.
        workers: The number of processes that prepare images.
        model: See `load_any`.
        model_kwargs: See `load_any`.
        use_ema: See `load_any`.

    Returns:
        The contents of `metrics.json`.

    Raises:
        ValueError: An option is out of range, the model is none, the classes are not the model's, or an image cannot be
            read.
        OSError: Model or images cannot be read, or the output cannot be written. Older files are as they were.
    """
    for name, value, least in (('--batch-size', batch_size, 1), ('--workers', workers, 0), ('--queries', queries, 1),
                               ('--neighbours', neighbours, 1), ('--seed', seed, 0), ('--image-size', image_size, 1)):
        if value is not None:
            whole_number(name, value, least)
    torch_device, folder = find_device(device), Path(output)
    network = load_any(source, torch_device, model=model, model_kwargs=model_kwargs, use_ema=use_ema)
    config = timm.data.resolve_data_config({'img_size': image_size}, model=network)
    images = open_images(data, config, split=split, data_dir=data_dir, download=download, class_map=class_map)
    heads, own_names = heads_of(network), getattr(network, 'label_names', None)
    head = heads[0]
    places = class_places(images.names, own_names, head.num_classes)
    names = own_names or (images.names if images.names and len(images.names) == head.num_classes else
                          [str(index) for index in range(head.num_classes)])
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        model=Path(source).name if Path(source).exists() else source,
        backbone=network.pretrained_cfg.get('architecture'), data=images.title, split=split, dim=head.dim,
        num_classes=head.num_classes, batch_size=batch_size, image_size=config['input_size'][-1], seed=seed,
        device=str(torch_device))
    print(f'{settings["model"]} on {images.title}: {head.num_classes:,} classes, d = {head.dim}, on {torch_device}',
          flush=True)
    try:
        embeddings, labels = _embed(network, images, batch_size, workers, torch_device)
    except UnreadableImageError as error:
        raise ValueError(error.one_line()) from None
    if places is not None:
        labels = torch.tensor(places)[labels]
    _check_labels(labels, head.num_classes)
    measures = measure(head, embeddings, labels, queries=queries, voters=neighbours, seed=seed)
    notes = []
    if len(heads) > 1:
        notes.append(f'The model averages the logits of {len(heads)} heads: these are the measures of the main one '
                     f'alone.')
    if own_names and images.names and places is None:
        notes.append(f'The data have other names for the classes than the model ({images.names[0]}, not '
                     f'{own_names[0]}): the classes were taken in their order.')
    _print(measures, names, notes)
    metrics = {**as_json(measures, names), 'notes': notes, 'settings': settings,
               'versions': {'timm_dl2pa': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}}
    title = f'{settings["model"]} on {images.title}'
    with staging_folder(folder) as stage:
        (stage / _METRICS).write_text(json.dumps(metrics, indent=1) + '\n', encoding='utf-8')
        (stage / _REPORT).write_text(_page(title, measures, names, images, config, settings, notes), encoding='utf-8')
        replace_files({folder / name: stage / name for name in (_METRICS, _REPORT)})
    print(f'\nThe numbers are in {folder / _METRICS}, and with pictures in {folder / _REPORT}.')
    return metrics


def _embed(network: nn.Module, images: LabelledImages, batch_size: int, workers: int, device: torch.device
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings (N, d) of all images, and their labels (N,) int64."""
    loader = make_loader(images.dataset, batch_size, workers, device)
    embeddings = torch.empty(images.count or batch_size, heads_of(network)[0].dim)
    labels = torch.empty(len(embeddings), dtype=torch.int64)
    done = 0
    with tqdm(total=images.count, desc='evaluate', unit='image', disable=None) as bar:
        for rows, own in embed_batches(network, loader, device):
            while done + len(rows) > len(embeddings):  # of a stream, whose length was not known
                embeddings, labels = torch.cat([embeddings, embeddings]), torch.cat([labels, labels])
            embeddings[done:done + len(rows)], labels[done:done + len(rows)] = rows, own
            done += len(rows)
            bar.update(len(rows))
    if not done:
        raise ValueError(f'{images.title} has no images.')
    return embeddings[:done], labels[:done]


def _check_labels(labels: torch.Tensor, num_classes: int) -> None:
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f'the labels of the data go from {low} to {high}, and the model has the classes 0 to '
                         f'{num_classes - 1}: give data with its classes, or --class-map.')


def _print(measures: Measures, names: list[str], notes: list[str]) -> None:
    for title, columns, rows, sentence in sections(measures, names):
        if rows:
            print('', f'{title}:', *text_table(columns, rows), sep='\n')
        if sentence:
            print(sentence)
    for note in notes:
        print(note)


def _page(title: str, measures: Measures, names: list[str], images: LabelledImages, config: dict[str, Any],
          settings: dict[str, Any], notes: list[str]) -> str:
    """Return the report as HTML."""
    parts = [paragraph(', '.join(f'{name.replace("_", " ")}: {value}' for name, value in settings.items()) + '.'),
             *map(paragraph, notes)]
    for heading, columns, rows, sentence in sections(measures, names):
        if rows:
            parts += [paragraph(heading, 'h2'), html_table(columns, rows)]
        if sentence:
            parts.append(paragraph(sentence))
        if heading == 'In short' and measures.calibration:
            parts.append(reliability_diagram(measures.calibration))
        if heading == 'Most frequent confusions' and rows and images.has_pictures:
            parts += confused_images(measures, names, lambda index: images.dataset[index][0], config['mean'],
                                     config['std'])
    return page(title, parts)
