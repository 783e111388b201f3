"""The flow of `timm-dl2pa finetune`: images, model, `prime`, training, report and files."""
import json
import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from ..head import heads_of
from ..models import save_model, wrap_dl2pa
from ..options import PluginOptions
from ..recipes import DEFAULT_RECIPE
from ..scheduling import AssignmentScheduler, prime
from ..timm_scripts.criterion import make_criterion
from ..values import real_number, whole_number
from ..version import __version__
from .backbone import find_device, make_backbone, size_arguments
from .images import ImageFiles, Images, UnreadableImageError, find_images
from .report import confusions, draw_confusions, per_class, report_lines
from .training import Best, Epoch, Plan, fine_tune, make_loader, set_mode

__all__ = ['default_dim', 'default_rate', 'run_finetune']


def default_dim(num_classes: int) -> int:
    """Return d: C - 1, in which all classes are equally far from one another, from 16 to 128."""
    return min(128, max(16, num_classes - 1))


def default_rate(pretrained: bool, freeze: bool) -> float:
    """Return AdamW's learning rate: small for a pretrained backbone that is trained, which forgets."""
    return 1e-4 if pretrained and not freeze else 1e-3


def run_finetune(
        data: str,
        *,
        model: str = 'efficientnet_b0.ra4_e3600_r224_in1k',
        weights: str | None = None,
        pretrained: bool = True,
        dim: int | None = None,
        recipe: str = DEFAULT_RECIPE,
        epochs: int = 20,
        lr: float | None = None,
        freeze: bool = False,
        train_batch_norm: bool = False,
        batch_size: int = 64,
        image_size: int | None = None,
        patience: int = 5,
        output: str = 'dl2pa-finetune',
        device: str | None = None,
        seed: int = 0,
        workers: int = 4,
) -> dict[str, Any]:
    """Fine-tune a pretrained timm model with a DL2PA head, print how it goes, and write model, metrics and report.

    The arguments are the options of the command. The global seeds of torch and Python are set. The model is saved
    whenever it is the best so far, so that an interruption loses nothing but the epochs after that.

    Args:
        data: A folder of images, see `find_images`.
        model: The name of a timm model.
        weights: A file of its weights, in place of timm's.
        pretrained: Whether the backbone starts from pretrained weights. Otherwise the head is not primed, the batch
            norms are trained, and the learning rate is higher.
        dim: d, the dimension of the embeddings. Default: `default_dim`.
        recipe: 'placed', 'even' or 'paper'.
        epochs: The number of epochs. 0: the head is primed, and nothing is trained.
        lr: The learning rate of AdamW. Default: `default_rate`.
        freeze: Whether the head alone is trained.
        train_batch_norm: Whether the batch norms of a pretrained backbone normalise by the batch in training.
        batch_size: The number of images of a batch, at least 2.
        image_size: The side of the images in pixels. Default: the model's.
        patience: After how many epochs without a higher validation accuracy the training ends.
        output: The folder for `model/`, `metrics.json`, `report.txt` and, with matplotlib, `confusions.png`.
        device: The device of the training. Default: a GPU if there is one.
        seed: Seed of the weights, the order of the images, the images held out, and the prototypes.
        workers: The number of processes that prepare images.

    Returns:
        The contents of `metrics.json`.

    Raises:
        ValueError: An option is out of range, the model or device is unknown, there are fewer than two classes, an
            image cannot be read, or the loss is not finite any more.
        OSError: A folder does not exist or is empty, weights cannot be loaded, or the output cannot be written.
        KeyboardInterrupt: It came before anything could be saved.
    """
    for name, value, least in (('--epochs', epochs, 0), ('--batch-size', batch_size, 2), ('--patience', patience, 1),
                               ('--workers', workers, 0), ('--seed', seed, 0), ('--image-size', image_size, 1),
                               ('--dim', dim, 1)):
        if value is not None:
            whole_number(name, value, least)
    pretrained = pretrained or weights is not None
    if freeze and not pretrained:
        raise ValueError('--freeze with --no-pretrained would train a head on random features: leave one of them out.')
    if lr is not None and not 0 < real_number('--lr', lr) < float('inf'):
        raise ValueError(f'--lr must be above 0, not {lr}.')
    plan = Plan(epochs, default_rate(pretrained, freeze) if lr is None else lr, freeze,
                keep_statistics=pretrained and not train_batch_norm)
    torch_device, folder = find_device(device), Path(output)
    files = find_images(data, seed)
    options = PluginOptions(recipe=recipe, dim=default_dim(len(files.names)) if dim is None else dim, seed=seed)

    random.seed(seed)  # timm's augmentation
    torch.manual_seed(seed)
    network = make_backbone(model, len(files.names), pretrained=pretrained, weights=weights, image_size=image_size)
    model_args = size_arguments(network, image_size)
    config = timm.data.resolve_data_config({'img_size': image_size}, model=network)
    wrap_dl2pa(network, **options.head_arguments()).to(torch_device)
    network.pretrained_cfg['input_size'] = config['input_size']  # which `save_model` records
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        data=Path(data).resolve().name, model=model, weights=weights and Path(weights).name, pretrained=pretrained,
        dim=options.dim, recipe=recipe, epochs=epochs, lr=plan.lr, freeze=freeze,
        train_batch_norm=not plan.keep_statistics and not freeze, batch_size=batch_size,
        image_size=config['input_size'][-1], patience=patience, seed=seed, device=str(torch_device))
    print(_introduction(files, settings), flush=True)

    def loader(part: list[tuple[str, int]], augment: bool = False) -> DataLoader:
        return make_loader(Images(part, config, augment), batch_size, workers, torch_device, seed if augment else None)

    def save() -> None:
        save_model(network, folder / 'model', model_args=model_args or None, label_names=files.names)

    train = loader(files.train, augment=True)
    scheduler = AssignmentScheduler(network, total=max(1, epochs * len(train)))
    criterion, _ = make_criterion(nn.CrossEntropyLoss(), options, heads_of(network)[0])
    try:
        set_mode(network, plan)  # which prime looks at
        primed = prime(network, loader(files.train), scheduler) if pretrained else None
        best, history = _keep_best(fine_tune(network, scheduler, criterion, train, loader(files.validation), plan),
                                   network, save, patience)
    except UnreadableImageError as error:
        raise ValueError(error.one_line()) from None
    best.restore(network)
    save()
    evaluation = best.epoch.evaluation
    lines = list(report_lines(evaluation, heads_of(network)[0].class_prototypes.cpu(), files.names))
    metrics = {
        'val_top1': round(evaluation.top1, 2), 'best_epoch': best.epoch.number,
        'primed_top1_left_out': primed and round(100 * primed, 2), 'epochs': history,
        'images': {'train': len(files.train), 'validation': len(files.validation), 'held_out': files.held_out},
        'classes': {name: {'right': right, 'images': count}
                    for name, (right, count) in zip(files.names, per_class(evaluation, len(files.names)))},
        'confusions': [{'class': files.names[label], 'predicted': files.names[predicted], 'images': count}
                       for label, predicted, count in confusions(evaluation)],
        'settings': settings,
        'versions': {'timm_dl2pa': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
    }
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=1) + '\n', encoding='utf-8')
    (folder / 'report.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('\n' + '\n'.join(lines) + f'\n\nThe best epoch is {best.epoch.number} with a validation top-1 of '
          f'{evaluation.top1:.2f} %.')
    try:
        draw_confusions(folder / 'confusions.png', evaluation, files.names)
    except ModuleNotFoundError as error:
        print(f'There is no picture, which needs {error.name}: pip install "timm-dl2pa[demo]"')
    weights_name = network.pretrained_cfg.get('hf_hub_id') if pretrained and weights is None else None
    print(_conclusion(folder, weights_name))
    return metrics


def _introduction(files: ImageFiles, settings: dict[str, Any]) -> str:
    start = 'random weights' if not settings['pretrained'] else settings['weights'] or "timm's pretrained weights"
    trained = 'the head alone is trained' if settings['freeze'] else \
        'all is trained' + ('' if settings['train_batch_norm'] else ', batch norms keep their statistics')
    return (f'{settings["data"]}: {len(files.train):,} training and {len(files.validation):,} validation images'
            f'{" (held out, a fifth of each class)" if files.held_out else ""}, {len(files.names):,} classes\n'
            f'{settings["model"]} from {start}, d = {settings["dim"]}, images of {settings["image_size"]} pixels, on '
            f'{settings["device"]}\n{trained}, AdamW at {settings["lr"]:g}, at most {settings["epochs"]} epochs')


def _keep_best(epochs: Iterator[Epoch], network: nn.Module, save: Callable[[], None], patience: int
               ) -> tuple[Best, list[dict[str, Any]]]:
    """Go through the epochs, save the model whenever it is the best, and stop early.

    Returns:
        The best epoch with its weights, and the numbers of all epochs.

    Raises:
        KeyboardInterrupt: It came before the first evaluation was over.
    """
    best, history = Best(), []
    try:
        for epoch in epochs:
            is_best = best.offer(epoch, network)
            if is_best:
                save()
            history.append(epoch.record())
            print(f'{epoch}{"  best so far" if is_best and epoch.number else ""}', flush=True)
            if best.stale >= patience:
                print(f'The accuracy has not risen for {patience} epochs: the training ends.')
                break
    except KeyboardInterrupt:
        if best.epoch is None:
            raise
        print(f'\nInterrupted: the best epoch so far, {best.epoch.number}, is kept.', flush=True)
    return best, history


def _conclusion(folder: Path, weights_name: str | None) -> str:
    """Return where the files are, and how the model is loaded and pushed."""
    base_model = f' --base-model {weights_name}' if weights_name else ''
    return (f'The model is in {folder / "model"}, the numbers in {folder / "metrics.json"}. To load it:\n'
            f'    model = timm_dl2pa.load_model({str(folder / "model")!r})\n'
            f'To push it to the Hugging Face Hub, with your names:\n'
            f'    timm-dl2pa push {shlex.quote(str(folder / "model"))} USER/NAME{base_model}')
