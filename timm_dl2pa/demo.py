"""`timm-dl2pa demo`: one small backbone, three heads, real images."""
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

from .head import DL2PAHead
from .models import save_model, wrap_dl2pa
from .scheduling import AssignmentScheduler

BATCH_SIZE = 64
DIGITS_SIZE = 32
# A label can still move while the embeddings are young: re-solve densely, but only through the first epochs. So few
# batches between two re-solves make noisy means: most of the sums is kept.
RESOLVES_AN_EPOCH = 8
HEADS = {
    'linear': 'linear classifier',
    'static': 'fixed prototypes, static',
    'dl2pa': 'DL2PA',
}


@dataclass
class Run:
    """What one head came to: a row of the table."""
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
    """Train the three heads, print the table, and write `model/`, `results.json` and `embeddings.png` to `output`.

    Sets torch's global seed: it is a program of its own. The arguments are the command's options.

    Raises:
        ValueError: An option is out of range, or the model or device is unknown.
        OSError: The images cannot be read or the output cannot be written.
    """
    if epochs < 1:
        raise ValueError(f'--epochs must be at least 1, not {epochs}.')
    place = _device(device)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    train_set, test_set, names, source = _images(data_dir, model, seed)

    print(f'{source}: {len(train_set)} training and {len(test_set)} test images, {len(names)} classes; '
          f'{model}, d = {dim}, on {place}')
    # All are made before the first is trained, so that an option that is no good costs no time.
    runs, models, started = [], {}, {}
    for kind in HEADS:
        torch.manual_seed(seed)
        models[kind] = _create_model(model, num_classes=len(names)).to(place)
        if kind != 'linear':
            wrap_dl2pa(models[kind], dim, seed=seed)
            started[kind] = _main_head(models[kind]).assignment.cpu().clone()
    for kind, title in HEADS.items():
        torch.manual_seed(seed)
        run, network = Run(kind), models[kind]
        _train(network, run, title, train_set, epochs, seed, place)
        run.top1 = _top1(network, test_set, place)
        runs.append(run)

    print('\n' + _table(runs))
    save_model(models['dl2pa'], folder / 'model', label_names=names)
    _write_json(folder / 'results.json', dict(
        images=source, classes=names, model=model, dim=dim, epochs=epochs, seed=seed, device=str(place),
        batch_size=BATCH_SIZE, runs=[asdict(run) for run in runs],
        versions=dict(torch=str(torch.__version__), timm=timm.__version__)))
    _draw(folder / 'embeddings.png', models, started, runs, test_set, names, place)
    print(f'\nwrote {folder}/embeddings.png, {folder}/results.json and {folder}/model; to have the model again:\n'
          f'    model = timm_dl2pa.load_model({str(folder / "model")!r})')
    return runs


def _device(name: str | None) -> torch.device:
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {name!r} cannot be used here: {str(error).splitlines()[0]}') from None
    return device


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except RuntimeError as error:
        raise ValueError(f'--model {name!r} cannot be made ({error}): timm.list_models() has the names.') from None


def _main_head(model: nn.Module) -> DL2PAHead:
    return next(module for module in model.modules() if isinstance(module, DL2PAHead))


# ---- images


def _images(data_dir: str | None, model: str, seed: int) -> tuple[Dataset, Dataset, list[str], str]:
    """Return training set, test set, class names, and what they are."""
    network = _create_model(model)
    config = timm.data.resolve_data_config({}, model=network)
    if data_dir is None:
        # Models with one input size get it; others are fed images little larger than the digits are.
        size = config['input_size'][-2:] if network.pretrained_cfg.get('fixed_input_size') else (DIGITS_SIZE,) * 2
        return *_digits(size, seed), [str(digit) for digit in range(10)], "scikit-learn's digits"
    root = Path(data_dir)
    test_root = next((root / name for name in ('val', 'validation', 'test') if (root / name).is_dir()), None)
    to_train = timm.data.create_transform(**config, is_training=True)
    to_test = timm.data.create_transform(**config)
    if (root / 'train').is_dir() and test_root:
        train_set, test_set = ImageFolder(root / 'train', to_train), ImageFolder(test_root, to_test)
        if train_set.classes != test_set.classes:
            raise ValueError(f'--data-dir: {root / "train"} and {test_root} do not have the same classes.')
        return train_set, test_set, train_set.classes, str(root.name)
    train_set, test_set = ImageFolder(root, to_train), ImageFolder(root, to_test)
    train, test = _split(np.array(train_set.targets), seed)
    return Subset(train_set, train), Subset(test_set, test), train_set.classes, str(root.name)


def _split(labels: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fifth of each class."""
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return train.tolist(), test.tolist()


def _digits(size: tuple[int, int], seed: int) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged, as (3, H, W) in -1..1."""
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
    loader = _loader(images, device, shuffle=True, generator=torch.Generator().manual_seed(seed),
                     drop_last=len(images) > BATCH_SIZE)
    head = None if run.head == 'linear' else _main_head(network)
    scheduler = None
    if run.head == 'dl2pa':
        scheduler = AssignmentScheduler(
            network,
            interval=max(1, len(loader) // RESOLVES_AN_EPOCH),
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
                if update:
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
    """Return the share of images classified right, in percent."""
    network.eval()
    right = sum((network(batch.to(device)).argmax(1).cpu() == labels).sum().item()
                for batch, labels in tqdm(_loader(images, device), 'testing', unit='batch', leave=False))
    return round(100 * right / len(images), 2)


# ---- what it leaves


def _table(runs: list[Run]) -> str:
    rows = [('head', 'top-1', 'head parameters', 'ms a step', 'labels moved at each re-solve')]
    for run in runs:
        rows.append((HEADS[run.head], f'{run.top1:.2f}', f'{run.head_parameters:,}', f'{run.step_milliseconds:.1f}',
                     _moves(run.moved)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:4], widths[1:])), row[4]])
             for row in rows]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _moves(moved: list[int]) -> str:
    """'7 5 2, then 0 (21 times)': the last zeros are counted, not listed."""
    if not moved:
        return '-'
    quiet = next((i for i, number in enumerate(reversed(moved)) if number), len(moved))
    listed = ' '.join(str(number) for number in moved[:len(moved) - quiet])
    if quiet < 2:
        return ' '.join(str(number) for number in moved)
    return f'{listed}, then 0 ({quiet} times)' if listed else f'0 ({quiet} times)'


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


@torch.no_grad()
def _embeddings(network: nn.Module, images: Dataset, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the main head's embeddings (N, d) of the images, and their labels (N,)."""
    head, found, labels = _main_head(network.eval()), [], []
    hook = head.register_forward_pre_hook(lambda module, inputs: found.append(module.embed(inputs[0]).cpu()))
    try:
        for batch, batch_labels in _loader(images, device):
            network(batch.to(device))
            labels.append(batch_labels)
    finally:
        hook.remove()
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def _draw(path: Path, models: dict[str, nn.Module], started: dict[str, torch.Tensor], runs: list[Run],
          images: Dataset, names: list[str], device: torch.device) -> None:
    """Prototypes, embeddings by class, and an arrow for each class that moved from one prototype to another.

    The sphere of d = 3 is shown whole, as an equal-area map; the circle of d = 2 as it is; for more dimensions the
    plane in which the prototypes spread most.
    """
    dim = _main_head(models['dl2pa']).dim
    figure = matplotlib.figure.Figure(figsize=(13, 4.3 if dim == 3 else 7), layout='constrained')
    colours = matplotlib.colormaps['tab10' if len(names) <= 10 else 'hsv'].resampled(max(10, len(names)))
    for column, (kind, before) in enumerate(started.items(), start=1):
        head = _main_head(models[kind])
        prototypes, after = head.prototypes.cpu().numpy(), head.assignment.cpu()
        embeddings, labels = _embeddings(models[kind], images, device)
        axes = figure.add_subplot(1, 2, column, projection='mollweide' if dim == 3 else None)
        plane = _plane(prototypes)
        points, at = plane(embeddings), plane(prototypes)
        axes.scatter(*points.T, c=colours(labels), s=9, alpha=0.55, linewidths=0)
        for label in range(len(names)):
            old, new = at[before[label]], at[after[label]]
            if before[label] != after[label]:
                arrow = dict(arrowstyle='->', color=colours(label), lw=1.4, ls='--', alpha=0.9, shrinkB=9)
                axes.annotate('', xy=new, xytext=old, arrowprops=arrow)
            axes.scatter(*new, color=colours(label), marker='*', s=260, edgecolors='black', linewidths=0.9, zorder=3)
            axes.annotate(names[label], new, xytext=(9, 7), textcoords='offset points', weight='bold', zorder=4)
        spare = np.setdiff1d(np.arange(len(prototypes)), after.numpy())
        axes.scatter(*at[spare].T, marker='*', s=120, facecolors='none', edgecolors='grey')
        moved = int((before != after).sum())
        run = next(run for run in runs if run.head == kind)
        axes.set_title(f'{HEADS[kind]}: {run.top1:.1f} % right, {moved} of {len(names)} classes moved')
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(alpha=0.25)
        if dim != 3:
            axes.set_aspect('equal')
    where = {2: 'the unit circle', 3: 'the whole unit sphere, as an equal-area map'}.get(
        dim, f'the plane in which the prototypes of {dim} dimensions spread most')
    figure.suptitle(f'Test images on {where}. Stars: prototypes, with the class that each stands for. '
                    f'Arrows: from a class\'s first prototype to its last.', fontsize=10)
    figure.savefig(path, dpi=110)


def _plane(prototypes: np.ndarray):
    """Return the function that maps rows (N, d) to (N, 2): longitude and latitude for d = 3."""
    dim = prototypes.shape[1]
    if dim == 3:
        return lambda rows: np.stack([np.arctan2(rows[:, 1], rows[:, 0]), np.arcsin(np.clip(rows[:, 2], -1, 1))], 1)
    if dim == 1:
        return lambda rows: np.concatenate([rows, np.zeros_like(rows)], axis=1)
    basis = np.eye(2) if dim == 2 else np.linalg.svd(prototypes, full_matrices=False)[2][:2].T
    return lambda rows: rows @ basis
