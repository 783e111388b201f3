"""The picture on a model card: where the classes stand, and how training went. Needs matplotlib."""
import io
import math
from collections.abc import Sequence

import torch

from ..prototypes.nearest import margins

__all__ = ['draw_card', 'plane_of']

_NAMED = 40  # classes that are named and joined with their nearest one


def plane_of(points: torch.Tensor) -> torch.Tensor:
    """Return two orthonormal directions (2, d), float32: those in which points (N, d) vary most.

    With d = 2 they are the coordinates themselves; with d = 1 the second one is zero.
    """
    dim = points.shape[1]
    if dim <= 2:
        return torch.eye(2, dim)
    values = points.float() - points.float().mean(dim=0)
    axes = torch.linalg.eigh(values.T.double() @ values.double()).eigenvectors.flip(1).T[:2].float()
    # An eigenvector's sign means nothing: the largest entry is made positive, so that the picture is always the same.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * largest.sign()


def draw_card(
        class_prototypes: torch.Tensor,
        class_means: torch.Tensor | None,
        label_names: Sequence[str] | None,
        curve: dict[str, list[tuple[float, float]]],
) -> bytes:
    """Draw the picture, and return it as the content of a PNG file.

    Args:
        class_prototypes: (C, d) unit rows.
        class_means: (C, d) unit rows, zero where a class is unknown; or None.
        label_names: C names, shown where there are few.
        curve: By name, lines over epochs: points (epoch, value). Nothing is drawn for an empty one.

    Raises:
        ModuleNotFoundError: There is no matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    prototypes = class_prototypes.detach().float().cpu()
    means = None if class_means is None else class_means.detach().float().cpu()
    axes = plane_of(prototypes if means is None else means)
    places = prototypes @ axes.T
    figure = Figure(figsize=(11 if curve else 6, 5), layout='constrained')
    plane = figure.add_subplot(1, 2 if curve else 1, 1, aspect='equal')
    few = len(prototypes) <= _NAMED
    if means is not None:
        spots = means @ axes.T
        for begin, end in zip(spots.tolist(), places.tolist()):
            if few:
                plane.plot(*zip(begin, end), color='tab:blue', linewidth=0.6, alpha=0.6)
        plane.scatter(*spots.T.numpy(), s=14, color='tab:blue', label='class means', zorder=3)
    plane.scatter(*places.T.numpy(), s=40 if few else 8, marker='*', color='tab:red', label='prototypes', zorder=2)
    if few:
        known = prototypes if means is None else torch.where(means.norm(dim=1, keepdim=True) > 0, means, prototypes)
        nearest = margins(known)[1]
        for index, place in enumerate(places):
            plane.plot(*zip(place.tolist(), places[nearest[index]].tolist()), color='0.8', linewidth=0.6, zorder=1)
            # No mathematics in names: matplotlib would typeset what stands between dollars.
            name = str(index) if label_names is None else label_names[index][:20]
            plane.annotate(name, place.tolist(), fontsize=7, xytext=(3, 3), textcoords='offset points',
                           parse_math=False)
    turn = torch.linspace(0, 2 * math.pi, 200)
    plane.plot(turn.cos(), turn.sin(), color='0.85', linewidth=0.8, zorder=0)
    plane.set_title(f'{len(prototypes):,} classes in {prototypes.shape[1]} dimensions, drawn in two')
    plane.set_axis_off()
    if curve:
        left = figure.add_subplot(1, 2, 2)
        right = None
        for index, (name, points) in enumerate(curve.items()):
            if 'loss' not in name and right is None:
                right = left.twinx()
            on = left if 'loss' in name else right
            on.plot(*zip(*points), color=f'C{index}', label=name, marker='.' if len(points) < 30 else None)
            on.set_ylabel('loss' if on is left else 'percent')
        left.set_xlabel('epoch')
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(fontsize='small', loc='outside lower center', ncols=6)
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=120, metadata={'Software': None})
    return content.getvalue()
