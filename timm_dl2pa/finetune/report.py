"""What a fine-tuned model confuses: tables in plain text, and a picture."""
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation import class_counts
from ..evaluation import confusions as confused_pairs
from ..prototypes.nearest import nearest_pairs
from .training import Evaluation

__all__ = ['confusions', 'draw_confusions', 'per_class', 'report_lines']

_MOST_ROWS = 10
_MOST_DRAWN = 20
# Angles that differ by less, in degrees, are the same.
_EQUAL = 0.5


def confusions(evaluation: Evaluation) -> list[tuple[int, int, int]]:
    """Return the pairs (class, predicted class, number of images) that differ, the most frequent first."""
    return confused_pairs(evaluation.labels, evaluation.predictions)


def per_class(evaluation: Evaluation, num_classes: int) -> list[tuple[int, int]]:
    """Return the number of right predictions and the number of images of each class."""
    right, images = class_counts(evaluation.predictions, evaluation.labels, num_classes)
    return list(zip(right.tolist(), images.tolist()))


def report_lines(evaluation: Evaluation, prototypes: torch.Tensor, names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the report: the nearest classes, the most frequent confusions, the worst classes.

    Args:
        evaluation: That of the best model.
        prototypes: (C, d) float32, the prototypes of the classes, on the CPU.
        names: The names of the C classes.
    """
    confused = confusions(evaluation)
    classes = per_class(evaluation, len(names))
    yield from _nearest_lines(evaluation, prototypes, names, confused)
    yield ''
    if not confused:
        yield 'All validation images are classified correctly.'
        return
    yield 'Most frequent confusions:'
    yield from text_table(['class', 'predicted', 'images', 'of'], [
        [names[label], names[predicted], count, classes[label][1]]
        for label, predicted, count in confused[:_MOST_ROWS]])
    yield ''
    yield 'Least accurate classes:'
    worst = sorted((index for index, (right, images) in enumerate(classes) if right < images),
                   key=lambda index: (classes[index][0] / classes[index][1], -classes[index][1], index))
    yield from text_table(['class', 'top-1', 'images'], [
        [names[index], f'{100 * classes[index][0] / classes[index][1]:.1f}', classes[index][1]]
        for index in worst[:_MOST_ROWS]])


def _nearest_lines(evaluation: Evaluation, prototypes: torch.Tensor, names: Sequence[str],
                   confused: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yield the table of the nearest classes: by their prototypes, or by their images if those are equally far."""
    counts = {(label, predicted): count for label, predicted, count in confused}
    means = evaluation.means
    pairs, criterion = nearest_pairs(prototypes, _MOST_ROWS), 'by their prototypes'
    # No set has a larger smallest angle than a simplex, in which all angles are equal.
    if pairs[0][2] > math.degrees(math.acos(-1 / (len(names) - 1))) - _EQUAL:
        yield f'The prototypes of all classes are {pairs[0][2]:.1f} degrees apart.'
        known = means.norm(dim=1).nonzero().flatten()
        if len(known) < 2:
            return
        pairs = [(known[first].item(), known[second].item(), angle)
                 for first, second, angle in nearest_pairs(means[known], _MOST_ROWS)]
        criterion = 'by the mean directions of their validation images'
    yield f'Nearest classes, {criterion}:'
    yield from text_table(['class', 'nearest class', 'cosine of prototypes', 'of means', 'confused images'], [
        [names[first], names[second], f'{prototypes[first] @ prototypes[second]:.3f}',
         f'{means[first] @ means[second]:.3f}', counts.get((first, second), 0) + counts.get((second, first), 0)]
        for first, second, _ in pairs])


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of a table. Columns of numbers are aligned on the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [all(cell.replace('.', '', 1).lstrip('-').isdigit() for cell in column[1:]) for column in zip(*cells)]
    for number, row in enumerate(cells):
        yield '  '.join(cell.rjust(width) if is_right else cell.ljust(width)
                        for cell, width, is_right in zip(row, widths, right)).rstrip()
        if not number:
            yield '  '.join('-' * width for width in widths)


def draw_confusions(path: Path, evaluation: Evaluation, names: Sequence[str]) -> None:
    """Draw how often each of the most confused classes is taken for each other one.

    Args:
        path: The picture to write.
        evaluation: That of the best model.
        names: The names of the C classes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.figure

    involved: Counter[int] = Counter()
    for label, predicted, count in confusions(evaluation):
        involved[label] += count
        involved[predicted] += count
    shown = sorted(index for index, _ in involved.most_common(_MOST_DRAWN)) or list(range(min(len(names), _MOST_DRAWN)))
    place = {index: position for position, index in enumerate(shown)}
    counts = torch.zeros(len(shown), len(shown))
    for label, predicted in zip(evaluation.labels.tolist(), evaluation.predictions.tolist()):
        if label in place and predicted in place:
            counts[place[label], place[predicted]] += 1
    shares = counts / torch.bincount(evaluation.labels, minlength=len(names))[shown].clamp(min=1)[:, None]
    side = 2.5 + 0.4 * len(shown)
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=1)
    for row in range(len(shown)):
        for column in range(len(shown)):
            if counts[row, column]:
                axes.text(column, row, f'{int(counts[row, column])}', ha='center', va='center', fontsize=8,
                          color='white' if shares[row, column] > 0.6 else 'black')
    labels = [_short(names[index]) for index in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=90)
    axes.set_yticks(range(len(shown)), labels)
    axes.set_xlabel('predicted')
    axes.set_ylabel('class')
    which = 'all' if len(shown) == len(names) else f'the {len(shown)} most confused of {len(names):,}'
    axes.set_title(f'Validation images, {which} classes')
    figure.colorbar(image, ax=axes, label="share of the class's images")
    figure.savefig(path, dpi=110)


def _short(name: str) -> str:
    name = name.replace('$', r'\$')  # else matplotlib takes it for a formula
    return name if len(name) <= 24 else f'{name[:23]}…'
