"""A plot of a prototype set. Needs matplotlib."""
import os

import torch

from .nearest import cosine_blocks
from .quality import PrototypeQuality

__all__ = ['draw_prototypes']


def draw_prototypes(path: str | os.PathLike[str], prototypes: torch.Tensor, quality: PrototypeQuality) -> None:
    """Plot a histogram of the cosines with the nearest other point, with the bound, and for d = 2 and 3 the points.

    Of a set of 40,000 points or more, an evenly spaced sample is compared with all points.

    Args:
        path: The image file to write. Its suffix selects the format.
        prototypes: (K, d) unit rows, K >= 2.
        quality: The measurements of `prototype_quality`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    points = prototypes.detach().float().cpu()
    sample = torch.arange(len(points), device='cpu')[::max(1, len(points) // 20_000)]
    nearest = torch.cat([cosines.amax(dim=1) for _, cosines in cosine_blocks(points, sample)])

    dim = points.shape[1]
    figure = Figure(figsize=(11 if dim in (2, 3) else 6, 4.5), layout='constrained')
    axes = figure.add_subplot(1, 2 if dim in (2, 3) else 1, 1)
    # If all cosines are equal, the data give the histogram no width.
    span = (min(quality.bound, nearest.min().item()) - 0.01, nearest.max().item() + 0.01)
    axes.hist(nearest.numpy(), bins=60, range=span, color='tab:blue')
    axes.axvline(quality.bound, color='tab:red', linestyle='--', label=f'proven bound on it, {quality.bound:.4f}')
    axes.axvline(quality.max_cosine, color='black', linestyle=':', label=f'largest, {quality.max_cosine:.4f}')
    axes.set(xlabel='cosine with the nearest other prototype', ylabel='prototypes')
    axes.set_title(f'K = {len(points)}, d = {dim}')
    axes.legend(fontsize='small')
    if dim == 2:
        plane = figure.add_subplot(1, 2, 2, aspect='equal')
        plane.scatter(*points.T.numpy(), s=12)
    elif dim == 3:
        space = figure.add_subplot(1, 2, 2, projection='3d', box_aspect=(1, 1, 1))
        space.scatter(*points.T.numpy(), s=12)
    figure.savefig(path, dpi=150)
