"""The demo's pictures of classes: which prototypes lie side by side, and how the accuracy grew."""
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from matplotlib.axes import Axes

from .heads import HEADS
from .training import Run

__all__ = ['as_shown', 'draw_accuracy', 'draw_neighbours']

_ROWS, _NEIGHBOURS = 10, 6
_COLOURS = {'linear': '#8c8c8c', 'linear_neck': '#4c4c4c', 'static': '#e0a030', 'paper': '#5b8fd0', 'dl2pa': '#c8102e'}


def as_shown(picture: np.ndarray) -> np.ndarray:
    """Return a picture (H, W) white on black, or (H, W, 3), as (H, W, 3): letters black on white."""
    return picture if picture.ndim == 3 else np.repeat(255 - picture[:, :, None], 3, axis=2)


def draw_neighbours(path: Path, prototypes: dict[str, torch.Tensor], pictures: list[np.ndarray]) -> None:
    """Draw classes in even steps through all of them, and beside each those whose prototypes are nearest to its own.

    Args:
        path: The picture to write.
        prototypes: (C, d) float32 unit rows, for each head that is shown.
        pictures: One of each class.
    """
    num_classes = len(pictures)
    rows = np.unique(np.linspace(0, num_classes - 1, min(_ROWS, num_classes)).round().astype(int))
    count = min(_NEIGHBOURS, num_classes - 1)
    width = 1.5 + count
    figure = matplotlib.figure.Figure(figsize=(0.72 * width * len(prototypes) + 0.6, 0.82 * len(rows) + 1.1),
                                      layout='constrained')
    for axes, (kind, points) in zip(np.ravel(figure.subplots(1, len(prototypes), squeeze=False)), prototypes.items()):
        cosines = (points @ points.T).fill_diagonal_(-torch.inf)
        for line, label in enumerate(rows):
            nearest = cosines[label].topk(count)
            _show(axes, pictures[label], 0, line, None, framed=True)
            for place, (other, cosine) in enumerate(zip(nearest.indices.tolist(), nearest.values.tolist())):
                _show(axes, pictures[other], 1.5 + place, line, f'{cosine:.2f}')
        axes.set(xlim=(-0.1, width), ylim=(1.24 * len(rows), -0.1), aspect='equal')
        axes.axis('off')
        axes.set_title(HEADS[kind], fontsize=12)
    figure.suptitle('A class (framed), and the classes with the nearest prototypes, with their cosines', fontsize=12)
    figure.savefig(path, dpi=110)


def _show(axes: Axes, picture: np.ndarray, left: float, line: int, text: str | None, framed: bool = False) -> None:
    top = 1.24 * line
    axes.imshow(as_shown(picture), extent=(left, left + 0.9, top + 0.9, top), interpolation='bilinear')
    if framed:
        axes.plot([left, left + 0.9, left + 0.9, left, left], [top, top, top + 0.9, top + 0.9, top], color='black',
                  linewidth=1)
    if text:
        axes.text(left + 0.45, top + 1.06, text, ha='center', va='center', fontsize=8, color='0.35')


def draw_accuracy(path: Path, runs: dict[str, Run]) -> None:
    """Draw the test accuracy of each head by epoch."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.6), layout='constrained')
    axes = figure.add_subplot()
    # The legend is in the order of the lines' ends.
    for kind, run in sorted(runs.items(), key=lambda item: -item[1].top1):
        axes.plot(range(1, len(run.top1_by_epoch) + 1), run.top1_by_epoch, color=_COLOURS[kind], marker='o',
                  markersize=3, linewidth=2.5 if kind == 'dl2pa' else 1.5, label=f'{HEADS[kind]}, {run.top1:.1f} %')
    axes.set(xlabel='epoch', ylabel='top-1 of the test images in percent', ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
