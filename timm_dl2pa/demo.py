"""The command `timm-dl2pa demo`: trains one small backbone with three heads on real images."""
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.figure
import numpy as np
import timm
import timm.data
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from .finetune.backbone import find_device
from .head import DL2PAHead
from .models import save_model, wrap_dl2pa
from .scheduling import AssignmentScheduler

BATCH_SIZE = 64
DIGITS_SIZE = 32
# Classes change their prototypes mostly in the first epochs, and the training is short: re-solve several times per
# epoch.
RESOLVES_PER_EPOCH = 8
HEADS = {
    'linear': 'linear classifier',
    'static': 'fixed prototypes, static',
    'dl2pa': 'DL2PA',
}


@dataclass
class Run:
    """The results of one head: a row of the table.

    Attributes:
        head: A key of `HEADS`.
        top1: The test accuracy in percent.
        head_parameters: The number of parameters of the head.
        step_milliseconds: The median time of a training step.
        moved: The number of classes that moved at each re-solve.
        losses: The mean training loss of each epoch.
    """
    head: str
    top1: float = 0.0
    head_parameters: int = 0
    step_milliseconds: float = 0.0
    moved: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run_demo(
        data_dir: str | None = None,
        model: str = 'test_resnet',
        dim: int = 3,
        epochs: int = 8,
        seed: int = 0,
        device: str | None = None,
        output: str = 'dl2pa-demo',
) -> list[Run]:
    """Train a model with three heads in turn, print a table, and write model, table and plot to a folder.

    The arguments are the options of the command. torch's global seed is set.

    Args:
        data_dir: A folder of images, one sub-folder for each class, or `train/` and `val/` with such sub-folders.
            Default: scikit-learn's digits.
        model: The name of a timm model.
        dim: d, the dimension of the embeddings.
        epochs: The number of epochs, at least 1.
        seed: Seed of the weights, the order of the images and the prototypes.
        device: The device of the training. Default: a GPU if there is one.
        output: The folder for `model/`, `results.json` and `embeddings.png`.

    Returns:
        The results of the heads, in the order of `HEADS`.

    Raises:
        ValueError: An option is out of range, or the model or device is unknown.
        OSError: The images cannot be read, or the output cannot be written.
    """
    if epochs < 1:
        raise ValueError(f'--epochs must be at least 1, not {epochs}.')
    torch_device = find_device(device)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    train_set, test_set, names, source = _load_images(data_dir, model, seed)

    print(f'{source}: {len(train_set)} training and {len(test_set)} test images, {len(names)} classes; '
          f'{model}, d = {dim}, on {torch_device}')
    # All models are made before the first is trained, so that an invalid option is reported at once.
    runs, models, initial_prototypes = [], {}, {}
    for kind in HEADS:
        torch.manual_seed(seed)
        models[kind] = _create_model(model, num_classes=len(names)).to(torch_device)
        if kind != 'linear':
            wrap_dl2pa(models[kind], dim, seed=seed)
            initial_prototypes[kind] = _main_head(models[kind]).class_prototypes.cpu()
    for kind, title in HEADS.items():
        torch.manual_seed(seed)
        run, network = Run(kind), models[kind]
        _train(network, run, title, train_set, epochs, seed, torch_device)
        run.top1 = _top1(network, test_set, torch_device)
        runs.append(run)

    print('\n' + _format_table(runs))
    save_model(models['dl2pa'], folder / 'model', label_names=names)
    _write_json(folder / 'results.json', dict(
        images=source, classes=names, model=model, dim=dim, epochs=epochs, seed=seed, device=str(torch_device),
        batch_size=BATCH_SIZE, runs=[asdict(run) for run in runs],
        versions=dict(torch=str(torch.__version__), timm=timm.__version__)))
    _plot_embeddings(folder / 'embeddings.png', models, initial_prototypes, runs, test_set, names, torch_device)
    print(f'\nwrote {folder}/embeddings.png, {folder}/results.json and {folder}/model; to load the model:\n'
          f'    model = timm_dl2pa.load_model({str(folder / "model")!r})')
    return runs


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except RuntimeError as error:
        raise ValueError(f'--model {name!r} cannot be made ({error}): timm.list_models() lists the names.') from None


def _main_head(model: nn.Module) -> DL2PAHead:
    return next(module for module in model.modules() if isinstance(module, DL2PAHead))


# ---- images


def _load_images(data_dir: str | None, model: str, seed: int) -> tuple[Dataset, Dataset, list[str], str]:
    """Return the training set, the test set, the class names and the name of the data."""
    network = _create_model(model)
    config = timm.data.resolve_data_config({}, model=network)
    if data_dir is None:
        # Models with a fixed input size need that size. For other models the digits are enlarged to DIGITS_SIZE.
        size = config['input_size'][-2:] if network.pretrained_cfg.get('fixed_input_size') else (DIGITS_SIZE,) * 2
        return *_digits(size, seed), [str(digit) for digit in range(10)], "scikit-learn's digits"
    root = Path(data_dir)
    test_root = next((root / name for name in ('val', 'validation', 'test') if (root / name).is_dir()), None)
    train_transform = timm.data.create_transform(**config, is_training=True)
    test_transform = timm.data.create_transform(**config)
    if (root / 'train').is_dir() and test_root:
        train_set, test_set = ImageFolder(root / 'train', train_transform), ImageFolder(test_root, test_transform)
        if train_set.classes != test_set.classes:
            raise ValueError(f'--data-dir: {root / "train"} and {test_root} do not have the same classes.')
        return train_set, test_set, train_set.classes, str(root.name)
    train_set, test_set = ImageFolder(root, train_transform), ImageFolder(root, test_transform)
    train, test = _split(np.array(train_set.targets), seed)
    return Subset(train_set, train), Subset(test_set, test), train_set.classes, str(root.name)


def _split(labels: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the training and test images. A fifth of each class is for testing."""
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return train.tolist(), test.tolist()


def _digits(size: tuple[int, int], seed: int) -> tuple[Dataset, Dataset]:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged to (3, H, W), in -1..1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)

    def part(indices: list[int]) -> Dataset:
        enlarged = F.interpolate(images[indices], size=size, mode='bilinear', align_corners=False)
        return TensorDataset(enlarged.expand(-1, 3, -1, -1), labels[indices])

    train, test = _split(digits.target, seed)
    return part(train), part(test)


def _loader(images: Dataset, device: torch.device, **kwargs: Any) -> DataLoader:
    in_memory = isinstance(images, TensorDataset)
    return DataLoader(images, BATCH_SIZE, num_workers=0 if in_memory else 2, pin_memory=device.type == 'cuda', **kwargs)


# ---- training


def _train(network: nn.Module, run: Run, title: str, images: Dataset, epochs: int, seed: int, device: torch.device):
    """Train a model in place and fill in its results, except for the accuracy."""
    loader = _loader(images, device, shuffle=True, generator=torch.Generator().manual_seed(seed),
                     drop_last=len(images) > BATCH_SIZE)
    head = None if run.head == 'linear' else _main_head(network)
    scheduler = None
    if run.head == 'dl2pa':
        scheduler = AssignmentScheduler(
            network,
            interval=max(1, len(loader) // RESOLVES_PER_EPOCH),
            total=epochs * len(loader),
        )
    classifiers = network.get_classifier()
    classifiers = [classifiers] if isinstance(classifiers, nn.Module) else list(classifiers)
    run.head_parameters = sum(p.numel() for module in classifiers for p in module.parameters())
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(loader))
    network.train()
    times = []
    with tqdm(total=epochs * len(loader), desc=f'{title:24}', unit='step') as bar:
        for _ in range(epochs):
            losses = []
            for batch, labels in loader:
                batch, labels = batch.to(device), labels.to(device)
                began = _now(device)
                loss = criterion(network(batch), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                update = scheduler.step(labels) if scheduler else None
                times.append(_now(device) - began)
                schedule.step()
                if update and update.event != 'placed':
                    run.moved.append(update.moved)
                losses.append(loss.item())
                bar.update()
            run.losses.append(round(float(np.mean(losses)), 4))
            bar.set_postfix(loss=f'{run.losses[-1]:.3f}', **({'moved': sum(run.moved)} if head and scheduler else {}))
    run.step_milliseconds = round(1000 * median(times), 2)


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _top1(network: nn.Module, images: Dataset, device: torch.device) -> float:
    """Return the accuracy in percent."""
    network.eval()
    correct = sum((network(batch.to(device)).argmax(1).cpu() == labels).sum().item()
                  for batch, labels in tqdm(_loader(images, device), 'testing', unit='batch', leave=False))
    return round(100 * correct / len(images), 2)


# ---- results


def _format_table(runs: list[Run]) -> str:
    rows = [('head', 'top-1', 'head parameters', 'ms per step', 'labels moved at each re-solve')]
    for run in runs:
        rows.append((HEADS[run.head], f'{run.top1:.2f}', f'{run.head_parameters:,}', f'{run.step_milliseconds:.1f}',
                     _format_moves(run.moved)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:4], widths[1:])), row[4]])
             for row in rows]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _format_moves(moved: list[int]) -> str:
    """Return the numbers as text, with a count of the zeros at the end: '7 5 2, then 0 (21 times)'."""
    if not moved:
        return '-'
    num_zeros = next((i for i, number in enumerate(reversed(moved)) if number), len(moved))
    listed = ' '.join(str(number) for number in moved[:len(moved) - num_zeros])
    if num_zeros < 2:
        return ' '.join(str(number) for number in moved)
    return f'{listed}, then 0 ({num_zeros} times)' if listed else f'0 ({num_zeros} times)'


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


@torch.no_grad()
def _embeddings(network: nn.Module, images: Dataset, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings (N, d) of the images by the main head, and their labels (N,)."""
    head, embeddings, labels = _main_head(network.eval()), [], []
    hook = head.register_forward_pre_hook(lambda module, inputs: embeddings.append(module.embed(inputs[0]).cpu()))
    try:
        for batch, batch_labels in _loader(images, device):
            network(batch.to(device))
            labels.append(batch_labels)
    finally:
        hook.remove()
    return torch.cat(embeddings).numpy(), torch.cat(labels).numpy()


def _plot_embeddings(path: Path, models: dict[str, nn.Module], initial_prototypes: dict[str, torch.Tensor],
                     runs: list[Run], images: Dataset, names: list[str], device: torch.device) -> None:
    """Plot prototypes, embeddings by class, and an arrow for each class whose prototype is elsewhere than at first.

    For d = 3 the plot is an equal-area map of the whole sphere, for d = 2 the circle, and for more dimensions a
    projection to the plane of the prototypes' largest variance.
    """
    dim = _main_head(models['dl2pa']).dim
    figure = matplotlib.figure.Figure(figsize=(13, 4.3 if dim == 3 else 7), layout='constrained')
    colours = matplotlib.colormaps['tab10' if len(names) <= 10 else 'hsv'].resampled(max(10, len(names)))
    for column, (kind, before) in enumerate(initial_prototypes.items(), start=1):
        head = _main_head(models[kind])
        prototypes, after = head.prototypes.cpu().numpy(), head.assignment.cpu()
        embeddings, labels = _embeddings(models[kind], images, device)
        axes = figure.add_subplot(1, 2, column, projection='mollweide' if dim == 3 else None)
        project = _projection(prototypes)
        points, prototype_points, initial_points = project(embeddings), project(prototypes), project(before.numpy())
        moved = np.linalg.norm(prototypes[after] - before.numpy(), axis=1) > 1e-3
        axes.scatter(*points.T, c=colours(labels), s=9, alpha=0.55, linewidths=0)
        for label in range(len(names)):
            old, new = initial_points[label], prototype_points[after[label]]
            if moved[label]:
                arrow = dict(arrowstyle='->', color=colours(label), lw=1.4, ls='--', alpha=0.9, shrinkB=9)
                axes.annotate('', xy=new, xytext=old, arrowprops=arrow)
            axes.scatter(*new, color=colours(label), marker='*', s=260, edgecolors='black', linewidths=0.9, zorder=3)
            axes.annotate(names[label], new, xytext=(9, 7), textcoords='offset points', weight='bold', zorder=4)
        spare = np.setdiff1d(np.arange(len(prototypes)), after.numpy())
        axes.scatter(*prototype_points[spare].T, marker='*', s=120, facecolors='none', edgecolors='grey')
        run = next(run for run in runs if run.head == kind)
        axes.set_title(f'{HEADS[kind]}: top-1 {run.top1:.1f} %, {sum(run.moved)} labels moved')
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(alpha=0.25)
        if dim != 3:
            axes.set_aspect('equal')
    projection = {2: 'on the unit circle', 3: 'on an equal-area map of the unit sphere'}.get(
        dim, f'in the plane of the largest variance of the prototypes, of {dim} dimensions')
    figure.suptitle(f'Embeddings of the test images {projection}. Stars: prototypes, labelled with their classes. '
                    f'Arrows: from a class\'s initial prototype to its final one.', fontsize=10)
    figure.savefig(path, dpi=110)


def _projection(prototypes: np.ndarray):
    """Return a function that projects rows (N, d) to (N, 2): to longitude and latitude for d = 3."""
    dim = prototypes.shape[1]
    if dim == 3:
        return lambda rows: np.stack([np.arctan2(rows[:, 1], rows[:, 0]), np.arcsin(np.clip(rows[:, 2], -1, 1))], 1)
    if dim == 1:
        return lambda rows: np.concatenate([rows, np.zeros_like(rows)], axis=1)
    basis = np.eye(2) if dim == 2 else np.linalg.svd(prototypes, full_matrices=False)[2][:2].T
    return lambda rows: rows @ basis
