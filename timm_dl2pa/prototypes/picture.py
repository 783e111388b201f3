"""A picture of a prototype set. Needs matplotlib."""
import os

import torch

from .energy import block_rows
from .quality import PrototypeQuality

__all__ = ['draw_prototypes']


def draw_prototypes(path: str | os.PathLike, prototypes: torch.Tensor, quality: PrototypeQuality) -> None:
    """Draw the histogram of each point's cosine with the nearest other one, the bound, and the points for d = 2 and 3.

    Of more than 20,000 points every so-manieth is compared with all.
    """
    from matplotlib.figure import Figure

    points = prototypes.detach().float().cpu()
    chosen = torch.arange(len(points), device='cpu')[::max(1, len(points) // 20_000)]
    nearest = torch.empty(len(chosen))
    for rows in block_rows(len(chosen), len(points)):
        cosines = points[chosen[rows]] @ points.T
        cosines[torch.arange(len(cosines)), chosen[rows]] = -torch.inf
        nearest[rows] = cosines.amax(dim=1)

    dim = points.shape[1]
    figure = Figure(figsize=(11 if dim in (2, 3) else 6, 4.5), layout='constrained')
    axes = figure.add_subplot(1, 2 if dim in (2, 3) else 1, 1)
    # Where all points are alike the histogram has no width of its own.
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
