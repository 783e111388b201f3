"""The picture on a model card: the class prototypes in a plane, and the training curves. Needs matplotlib."""
import io
import math
from collections.abc import Sequence

import torch

from ..prototypes.nearest import margins

__all__ = ['draw_card', 'plane_of']

_MAX_LABELLED = 40  # with more classes, names and lines to the nearest class are left out


def plane_of(points: torch.Tensor) -> torch.Tensor:
    """Return the plane of the largest variance of points.

    Args:
        points: (N, d), any floating-point dtype.

    Returns:
        (2, d) float32, two orthonormal rows: the first two principal components. For d = 2 they are the coordinate
        axes; for d = 1 the second row is zero.
    """
    dim = points.shape[1]
    if dim <= 2:
        return torch.eye(2, dim)
    values = points.float() - points.float().mean(dim=0)
    axes = torch.linalg.eigh(values.T.double() @ values.double()).eigenvectors.flip(1).T[:2].float()
    # The sign of an eigenvector is arbitrary. The largest entry is made positive, so that the picture is reproducible.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * largest.sign()


def draw_card(
        class_prototypes: torch.Tensor,
        class_means: torch.Tensor | None,
        label_names: Sequence[str] | None,
        curve: dict[str, list[tuple[float, float]]],
) -> bytes:
    """Draw the picture of a model card.

    Args:
        class_prototypes: (C, d) unit rows.
        class_means: (C, d) unit rows, with rows of zeros for unknown classes; or None.
        label_names: The names of the C classes, which are shown if there are few.
        curve: The training curves by name, as points (epoch, value). Without any, the second panel is left out.

    Returns:
        The content of a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    prototypes = class_prototypes.detach().float().cpu()
    means = None if class_means is None else class_means.detach().float().cpu()
    axes = plane_of(prototypes if means is None else means)
    prototype_points = prototypes @ axes.T
    figure = Figure(figsize=(11 if curve else 6, 5), layout='constrained')
    plane = figure.add_subplot(1, 2 if curve else 1, 1, aspect='equal')
    is_labelled = len(prototypes) <= _MAX_LABELLED
    if means is not None:
        mean_points = means @ axes.T
        for begin, end in zip(mean_points.tolist(), prototype_points.tolist()):
            if is_labelled:
                plane.plot(*zip(begin, end), color='tab:blue', linewidth=0.6, alpha=0.6)
        plane.scatter(*mean_points.T.numpy(), s=14, color='tab:blue', label='class means', zorder=3)
    plane.scatter(*prototype_points.T.numpy(), s=40 if is_labelled else 8, marker='*', color='tab:red',
                  label='prototypes', zorder=2)
    if is_labelled:
        known = prototypes if means is None else torch.where(means.norm(dim=1, keepdim=True) > 0, means, prototypes)
        nearest = margins(known)[1]
        for index, point in enumerate(prototype_points):
            plane.plot(*zip(point.tolist(), prototype_points[nearest[index]].tolist()), color='0.8', linewidth=0.6,
                       zorder=1)
            # Without parse_math=False, matplotlib typesets text between dollar signs as a formula.
            name = str(index) if label_names is None else label_names[index][:20]
            plane.annotate(name, point.tolist(), fontsize=7, xytext=(3, 3), textcoords='offset points',
                           parse_math=False)
    angle = torch.linspace(0, 2 * math.pi, 200)
    plane.plot(angle.cos(), angle.sin(), color='0.85', linewidth=0.8, zorder=0)
    plane.set_title(f'{len(prototypes):,} classes in {prototypes.shape[1]} dimensions, projected to a plane')
    plane.set_axis_off()
    if curve:
        left = figure.add_subplot(1, 2, 2)
        right = None
        for index, (name, points) in enumerate(curve.items()):
            if 'loss' not in name and right is None:
                right = left.twinx()
            axis = left if 'loss' in name else right
            axis.plot(*zip(*points), color=f'C{index}', label=name, marker='.' if len(points) < 30 else None)
            axis.set_ylabel('loss' if axis is left else 'percent')
        left.set_xlabel('epoch')
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(fontsize='small', loc='outside lower center', ncols=6)
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=120, metadata={'Software': None})
    return content.getvalue()
