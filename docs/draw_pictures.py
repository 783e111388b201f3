"""Draws the pictures of how-it-works.md from real trainings: python docs/draw_pictures.py [FOLDER]

A network of one hidden layer learns scikit-learn's digits with a head of two or three dimensions. Seeded, on the CPU, a
minute. It needs scikit-learn and matplotlib, which the extra "test" brings.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from timm_dl2pa import AssignmentScheduler, DL2PAHead, SquaredCosineLoss, make_prototypes, solve_assignment

FOLDER = Path(__file__).parent / 'pictures'
COLOURS = matplotlib.colormaps['tab10'].colors
BATCH, LENGTH = 56, 25  # batches an epoch
SHOWN = 300  # test images


@dataclass
class Moment:
    """What there was at a moment of a training.

    Attributes:
        batch: The number of batches before it.
        embeddings: (300, d) float32, of test images.
        places: (10, d) float32, the prototype of each digit.
        moved: The number of digits that got another prototype since the last moment.
        warming_up: Whether prototypes still move.
        top1: Of the test images, in percent.
    """
    batch: int
    embeddings: torch.Tensor
    places: torch.Tensor
    moved: int
    warming_up: bool
    top1: float


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (1797, 64) float32 and labels (1797,). The first 1,400 are for training."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def train(recipe: str, dim: int, moments: list[int]) -> list[Moment]:
    """Train by a recipe; return what there was after the given numbers of batches."""
    torch.manual_seed(0)
    images, labels = digits()
    head = DL2PAHead(64, 10, dim, recipe=recipe)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), head)
    scheduler = AssignmentScheduler(network, interval=LENGTH, total=moments[-1])
    criterion = SquaredCosineLoss(head, reduction='sum') if recipe == 'paper' else nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    seen: list[Moment] = []
    moved, rows = 0, ()
    for batch in range(moments[-1] + 1):
        if batch in moments:
            with torch.no_grad():
                embeddings = head.eval().embed(network[:2](images[1400:]))
                top1 = 100 * (head.cosines(embeddings).argmax(1) == labels[1400:]).float().mean().item()
            seen.append(Moment(batch, embeddings[:SHOWN], head.class_prototypes.clone(), moved,
                               scheduler.warming_up and recipe == 'placed', top1))
            moved = 0
        if not len(rows):
            rows = torch.randperm(1400).split(BATCH)
        chosen, rows = rows[0], rows[1:]
        criterion(network.train()(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        update = scheduler.step(labels[chosen])
        moved += update.moved if update else 0
    return seen


# ---- in two dimensions


def _circle(axes, title: str) -> None:
    angles = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(angles.cos(), angles.sin(), color='0.8', linewidth=1, zorder=0)
    axes.set(xlim=(-1.32, 1.32), ylim=(-1.32, 1.32), aspect='equal', title=title)
    axes.axis('off')


def _draw_moment(axes, moment: Moment, title: str) -> None:
    """Draw test images as dots, prototypes as stars and digits beside theirs."""
    labels = digits()[1][1400:1400 + SHOWN]
    # On the circle dots would cover each other: the distance from the middle means nothing.
    radius = 0.62 + 0.33 * torch.rand(SHOWN, 1, generator=torch.Generator().manual_seed(0))
    axes.clear()
    _circle(axes, title)
    axes.scatter(*(radius * moment.embeddings).T, s=7, c=[COLOURS[label] for label in labels], linewidths=0)
    axes.scatter(*moment.places.T, s=150, c=COLOURS, marker='*', edgecolors='black', linewidths=0.7, zorder=3)
    for digit, place in enumerate(1.17 * moment.places):
        axes.text(*place, str(digit), fontsize=14, weight='bold', color=COLOURS[digit], ha='center', va='center')


def animate(path: Path, recipe: str, moments: list[int]) -> None:
    """Write a GIF of a training with d = 2 at the given numbers of batches."""
    seen = train(recipe, 2, moments)
    figure = Figure(figsize=(4.4, 4.8), layout='constrained')
    axes = figure.add_subplot()
    total = 0

    def draw(number: int) -> None:
        nonlocal total
        moment = seen[min(number, len(seen) - 1)]
        total = 0 if number == 0 else total + moment.moved * (number < len(seen))
        state = f'{total} moves of labels' if recipe == 'paper' else (
            'prototypes move' if moment.warming_up else 'prototypes are fixed')
        _draw_moment(axes, moment, f'batch {moment.batch}: {state}, top-1 {moment.top1:.0f} %')

    # The end stays for three seconds.
    FuncAnimation(figure, draw, frames=len(seen) + 15, init_func=lambda: None).save(path, PillowWriter(fps=5), dpi=72)


def draw_assignment(path: Path) -> None:
    """Draw ten classes and their prototypes, matched at random and by the solver."""
    generator = torch.Generator().manual_seed(3)
    prototypes = make_prototypes(10, 2)
    means = F.normalize(prototypes[torch.randperm(10, generator=generator)]
                        + 0.35 * torch.randn(10, 2, generator=generator), dim=1)
    at_random = torch.randperm(10, generator=generator)
    result = solve_assignment(class_means=means, prototypes=prototypes, start=at_random)
    figure = Figure(figsize=(8, 4.3), layout='constrained')
    for column, (name, assignment) in enumerate((('at random', at_random), ('solved', result.assignment))):
        axes, places = figure.add_subplot(1, 2, column + 1), prototypes[assignment]
        _circle(axes, f'{name}: sum of the cosines {(means * places).sum():.2f}')
        for mean, place, colour in zip(0.8 * means, places, COLOURS):
            axes.plot(*torch.stack([mean, place]).T, color=colour, linewidth=2)
        axes.scatter(*(0.8 * means).T, s=60, c=COLOURS, zorder=2)
        axes.scatter(*places.T, s=170, c=COLOURS, marker='*', edgecolors='black', linewidths=0.7, zorder=3)
    figure.savefig(path, dpi=80, bbox_inches='tight')


# ---- in three dimensions


def draw_prototypes(path: Path, moments: list[int]) -> None:
    """Draw random points, evenly spread ones, and prototypes that moved with the digits."""
    paths = torch.stack([moment.places for moment in train('placed', 3, moments)])
    random = F.normalize(torch.randn(10, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    figure = Figure(figsize=(10.5, 3.9), layout='constrained')
    titles = 'random points', 'evenly spread: where prototypes begin', "'placed': moved with the digits"
    angles = torch.linspace(0, torch.pi, 13)[:, None], torch.linspace(0, 2 * torch.pi, 25)
    sphere = angles[0].sin() * angles[1].cos(), angles[0].sin() * angles[1].sin(), angles[0].cos().expand(13, 25)
    for column, (title, points) in enumerate(zip(titles, (random, paths[0], paths[-1]))):
        axes = figure.add_subplot(1, 3, column + 1, projection='3d', title=title)
        axes.plot_wireframe(*(part.numpy() for part in sphere), color='0.86', linewidth=0.5)
        axes.set_box_aspect((1, 1, 1), zoom=1.5)
        axes.set_axis_off()
        axes.scatter(*points.T, s=110, c=COLOURS if column else 'tab:gray', marker='*', edgecolors='black')
        for digit in range(10 * (column > 0)):
            axes.text(*(1.2 * points[digit]), str(digit), fontsize=12)
            if column == 2:
                axes.plot(*paths[:, digit].T, color=COLOURS[digit], linewidth=1.5)
    figure.savefig(path, dpi=80, bbox_inches='tight')


def draw_all(folder: Path, epochs: int = 24) -> None:
    """Write all pictures to a folder.

    Args:
        folder: It exists.
        epochs: Length of the trainings, at least 4.
    """
    ends = [epoch * LENGTH for epoch in range(1, epochs + 1)]
    draw_prototypes(folder / 'prototypes.png', [0, *ends])
    draw_assignment(folder / 'assignment.png')
    # In the first epochs more happens.
    animate(folder / 'placement.gif', 'placed', sorted({*range(0, 3 * LENGTH, 5), *ends}))
    # A re-solve runs at the batch after an epoch: before it, after it.
    animate(folder / 'labels.gif', 'paper', [0, *(end + more for end in ends[:-1] for more in (0, 1)), ends[-1]])


if __name__ == '__main__':
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
