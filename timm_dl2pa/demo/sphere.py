"""A sphere that can be seen: some of the classes in three dimensions, by a head on the embeddings of another one."""
from collections.abc import Iterable
from pathlib import Path

import matplotlib.colors
import matplotlib.figure
import numpy as np
import torch
import torch.nn as nn
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from ..head import DL2PAHead
from ..scheduling import AssignmentScheduler
from .pictures import as_shown

__all__ = ['draw_sphere', 'embed', 'fit_sphere', 'groups_of']

_GROUPS, _GROUP = 6, 3
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 60, 64, 0.01
# Side of a picture's box in the map, with a margin.
_BOX = 0.2


@torch.no_grad()
def embed(model: nn.Module, head: DL2PAHead, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
          device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings (N, d) of images by a head of a model, and their labels (N,), on the CPU."""
    embeddings, labels = [], []
    model.eval()
    hook = head.register_forward_pre_hook(
        lambda module, inputs: embeddings.append(module.embed(inputs[0]).flatten(1).cpu()))
    try:
        for images, own in batches:
            model(images.to(device))
            labels.append(own)
    finally:
        hook.remove()
    return torch.cat(embeddings), torch.cat(labels)


def groups_of(prototypes: torch.Tensor) -> list[list[int]]:
    """Return groups of a class and the two whose prototypes are nearest to its own; of few classes, each alone.

    The closest groups come first, but none whose first class lies near that of an earlier group.

    Args:
        prototypes: (C, d) float32 unit rows.
    """
    if len(prototypes) <= _GROUPS * _GROUP:
        return [[label] for label in range(len(prototypes))]
    cosines = (prototypes @ prototypes.T).fill_diagonal_(-torch.inf)
    nearest = cosines.topk(_GROUP - 1)
    groups: list[list[int]] = []
    # A group may lie nearer to another one where there are not enough otherwise.
    for most in (0.3, 0.6, 1.1):
        for label in nearest.values[:, -1].argsort(descending=True, stable=True).tolist():
            group = [label, *nearest.indices[label].tolist()]
            taken = {other for earlier in groups for other in earlier}
            if not taken & set(group) and all(cosines[label, earlier[0]] < most for earlier in groups):
                groups.append(group)
            if len(groups) == _GROUPS:
                return groups
    return groups


def fit_sphere(embeddings: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int) -> DL2PAHead:
    """Train a head with d = 3, by the default recipe, on embeddings that stay as they are.

    Args:
        embeddings: (N, d) float32.
        labels: (N,) int64.
        num_classes: C.
        seed: Of the prototypes. torch's global generator draws the weights.
    """
    head = DL2PAHead(embeddings.shape[1], num_classes, dim=3, seed=seed).train()
    length = max(1, len(labels) // _BATCH_SIZE)
    scheduler = AssignmentScheduler(head, interval=length, total=_EPOCHS * length)
    optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * length)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(labels)).tensor_split(length):
            loss = nn.functional.cross_entropy(head(embeddings[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(labels[rows])
            rates.step()
    return head.eval()


def draw_sphere(path: Path, head: DL2PAHead, embeddings: torch.Tensor, labels: torch.Tensor, groups: list[list[int]],
                pictures: list[np.ndarray]) -> None:
    """Draw the sphere from two sides, as equal-area maps: prototypes as pictures, test images as dots.

    Args:
        path: The picture to write.
        head: That of the sphere. Its classes are those of `groups`, in their order.
        embeddings: (N, d) float32, of test images.
        labels: (N,) int64, their classes on the sphere.
        groups: The classes. Those of a group have a colour.
        pictures: One of each of all classes.
    """
    shown = [label for group in groups for label in group]
    group_of = [number for number, group in enumerate(groups) for _ in group]
    palette = matplotlib.colormaps['tab10' if len(groups) <= 10 else 'tab20'].colors
    colours = np.array([palette[number % len(palette)] for number in group_of])
    with torch.no_grad():
        points = head.embed(embeddings).numpy()
    prototypes = head.class_prototypes.numpy()
    figure = matplotlib.figure.Figure(figsize=(12, 6.6), layout='constrained')
    for column, side in enumerate((1, -1)):
        axes = figure.add_subplot(1, 2, column + 1, aspect='equal')
        axes.fill(*_circle(), color='0.96', zorder=0)
        axes.plot(*_circle(), color='0.6', linewidth=1, zorder=0)
        near = side * points[:, 2] >= 0
        axes.scatter(*_map(points[near], side).T, c=colours[labels.numpy()[near]], s=14, alpha=0.6, linewidths=0)
        own = np.flatnonzero(side * prototypes[:, 2] >= 0)
        places = _map(prototypes[own], side)
        for label, place, box in zip(own, places, _apart(places)):
            axes.plot(*zip(place, box), color=colours[label], linewidth=1)
            axes.plot(*place, color=colours[label], marker='*', markersize=11, markeredgecolor='black', zorder=3)
            picture = OffsetImage(as_shown(pictures[shown[label]]), zoom=24 / len(pictures[shown[label]]))
            axes.add_artist(AnnotationBbox(picture, box, pad=0.1, bboxprops={
                'edgecolor': colours[label], 'linewidth': 2, 'boxstyle': 'round,pad=0.1'}))
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
        axes.axis('off')
        axes.set_title('front' if side > 0 else 'back', fontsize=11)
    figure.suptitle(f'{len(shown)} classes on the unit sphere (d = 3): stars are prototypes, dots are test images'
                    + (', look-alikes in one colour' if len(groups) < len(shown) else ''), fontsize=12)
    figure.savefig(path, dpi=110)


def _circle() -> tuple[np.ndarray, np.ndarray]:
    angles = np.linspace(0, 2 * np.pi, 200)
    return np.cos(angles), np.sin(angles)


def _map(points: np.ndarray, side: int) -> np.ndarray:
    """Return the places (N, 2) of points (N, 3) of a hemisphere in a disc of radius 1, by Lambert's equal-area map."""
    x, y, z = points.T
    length = np.sqrt(1 + np.clip(side * z, 0, 1))
    return np.stack([side * x / length, y / length], axis=1)


def _apart(places: np.ndarray) -> np.ndarray:
    """Return places (n, 2) for boxes beside those of the prototypes, moved so far that no box covers another one."""
    boxes = places + np.array([0.0, _BOX])
    for _ in range(200):
        for one in range(len(boxes)):
            # The prototypes are obstacles too: their stars stay to be seen.
            gaps = boxes[one] - np.concatenate([np.delete(boxes, one, axis=0), places])
            needed = np.repeat([_BOX, 0.65 * _BOX], [len(boxes) - 1, len(places)])
            overlap = needed - np.abs(gaps).max(axis=1)
            worst = overlap.argmax()
            if overlap[worst] > 0:
                axis = np.abs(gaps[worst]).argmax()
                boxes[one, axis] += (overlap[worst] / 2 + 1e-3) * (1 if gaps[worst, axis] >= 0 else -1)
    return boxes
