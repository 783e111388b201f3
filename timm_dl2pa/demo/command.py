"""`run_demo`: the command `timm-dl2pa demo` from the images to the report."""
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..finetune.backbone import find_device
from ..finetune.report import text_table
from ..head import heads_of
from ..models import save_model
from .data import BATCH_SIZE, Data, load_data
from .heads import HEADS, make_models
from .pictures import draw_accuracy, draw_neighbours
from .report import write_report
from .sphere import draw_sphere, embed, fit_sphere, groups_of
from .table import COLUMNS, claims, table_rows
from .training import Run, right_answers, train

__all__ = ['run_demo']


def run_demo(
        data_dir: str | None = None,
        model: str = 'test_byobnet',
        dim: int = 64,
        epochs: int = 10,
        seed: int = 0,
        device: str | None = None,
        output: str = 'dl2pa-demo',
        classes: int = 300,
) -> list[Run]:
    """Train a model with five heads side by side, print a table, and write model, report and pictures to a folder.

    The arguments are the options of the command. The state of torch's global generator stays as it was.

    Args:
        data_dir: A folder of images, one sub-folder for each class, or `train/` and `val/` with such sub-folders.
            Default: letters, as the faces of DejaVu draw them that matplotlib carries.
        model: The name of a timm model.
        dim: d, the dimension of the embeddings.
        epochs: The number of epochs, at least 1.
        seed: Seed of the weights, the order and warps of the images and the prototypes.
        device: The device of the training. Default: a GPU if there is one.
        output: The folder for `report.html`, its pictures, `results.json` and `model/`.
        classes: The number of letters.

    Returns:
        The results of the heads, in the order of `HEADS`.

    Raises:
        ValueError: An option is out of range, or the model or device is unknown.
        OSError: The images cannot be read, or the output cannot be written.
    """
    if epochs < 1:
        raise ValueError(f'--epochs must be at least 1, not {epochs}.')
    torch_device, began = find_device(device), time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        data = load_data(data_dir, classes, model, seed, torch_device)
        # All models are made before the first is trained, so that an invalid option is reported at once.
        models = make_models(model, len(data.names), dim, seed, letters=data_dir is None)
        for network in models.values():
            network.to(torch_device)
        setting = (f'{model} with d = {dim}, on {data.source}: {len(data.names)} classes, {data.num_train:,} training '
                   f'and {data.num_test:,} test images, {epochs} epochs, seed {seed}, on {torch_device}')
        print(setting)
        torch.manual_seed(seed)
        runs = train(models, data, epochs, torch_device)
        right = {kind: right_answers(network, data.test, torch_device) for kind, network in models.items()}
        save_model(models['dl2pa'], folder / 'model', label_names=data.names)
        pictures = _draw(folder, models, runs, data, torch_device, seed)
    rows, said = list(table_rows(runs)), claims(runs, right)
    code = f'model = timm_dl2pa.load_model({str(folder / "model")!r})'
    print('', *text_table(COLUMNS, rows), '', *said, sep='\n')
    write_report(folder / 'report.html', 'DL2PA beside other heads', setting + '.', COLUMNS, rows,
                 list(runs).index('dl2pa'), said, pictures, code)
    (folder / 'results.json').write_text(json.dumps(dict(
        images=data.source, classes=data.names, model=model, dim=dim, epochs=epochs, seed=seed,
        device=str(torch_device), batch_size=BATCH_SIZE, test_images=data.num_test,
        seconds=round(time.perf_counter() - began, 1), runs=[asdict(run) for run in runs.values()], claims=said,
        versions=dict(torch=str(torch.__version__), timm=timm.__version__)), indent=1) + '\n', encoding='utf-8')
    print(f'\nwrote {folder}/report.html with its pictures, results.json and the trained model; to load it:\n'
          f'    {code}')
    return list(runs.values())


def _draw(folder: Path, models: dict[str, nn.Module], runs: dict[str, Run], data: Data, device: torch.device, seed: int
          ) -> list[tuple[Path, str]]:
    """Draw the pictures; return their files with captions."""
    head = heads_of(models['dl2pa'])[0]
    shown = {kind: heads_of(models[kind])[0].class_prototypes.cpu() for kind in ('dl2pa', 'static')}
    draw_neighbours(folder / 'neighbours.png', shown, data.pictures)
    groups = groups_of(shown['dl2pa'])
    place = torch.full((len(data.names),), -1)
    place[[label for group in groups for label in group]] = torch.arange(sum(map(len, groups)))
    parts: list[Any] = []
    for batches in (data.train, data.test):
        embeddings, labels = embed(models['dl2pa'], head, batches, device)
        chosen = place[labels] >= 0
        parts += [embeddings[chosen], place[labels[chosen]]]
    sphere = fit_sphere(parts[0], parts[1], sum(map(len, groups)), seed)
    draw_sphere(folder / 'sphere.png', sphere, parts[2], parts[3], groups, data.pictures)
    draw_accuracy(folder / 'accuracy.png', runs)
    return [
        (folder / 'neighbours.png', f'Classes in even steps through all, and beside each the classes whose prototypes '
                                    f'are nearest: {HEADS["dl2pa"]}, and {HEADS["static"]}, which know nothing of the '
                                    f'images.'),
        (folder / 'sphere.png', 'Some classes in three dimensions: a second head with d = 3 was trained on the '
                                'embeddings of the default one.'),
        (folder / 'accuracy.png', 'Top-1 of the test images after each epoch.')]
