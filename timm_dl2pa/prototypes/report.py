"""The command `timm-dl2pa prototypes`: makes a prototype set, measures it, writes it and plots it."""
from collections.abc import Iterator

from .files import save_prototypes
from .make import make_prototypes
from .optimise import affordable_evaluations
from .picture import draw_prototypes
from .quality import PrototypeQuality, prototype_quality

__all__ = ['report_prototypes']

_SGD_RECIPE_EPOCHS = 1000


def report_prototypes(
        num_prototypes: int,
        dim: int,
        objective: str,
        method: str,
        seed: int,
        effort: float,
        device: str,
        out: str | None,
        plot: str | None,
        recipe: bool,
) -> Iterator[str]:
    """Make a prototype set and yield the lines of a report on it.

    Args:
        num_prototypes: See `make_prototypes`, as `dim`, `objective`, `method`, `seed`, `effort` and `device`.
        dim: d, the dimension of the space.
        objective: 'uniform' or 'separated'.
        method: The method that makes the points.
        seed: Seed of the points.
        effort: Factor on the work of 'optimise'.
        device: The device of 'optimise'.
        out: The safetensors file to write the points to, if any.
        plot: The image file to write a plot to, if any. Needs matplotlib.
        recipe: Whether to compare with the authors' recipe.

    Yields:
        One line of text at a time.

    Raises:
        ValueError: See `make_prototypes`.
        OSError: A file cannot be written.
        ModuleNotFoundError: matplotlib is not installed, and a plot was requested.
    """
    points, info = make_prototypes(num_prototypes, dim, objective=objective, method=method, seed=seed, effort=effort,
                                   device=device, return_info=True, progress=True)
    yield f'{num_prototypes} prototypes in {dim} dimensions, objective {objective}: {info.method}'
    yield f'  {info.description}'
    yield f'  {info.seconds:.1f} s' + (' when they were made; read from the cache now' if info.cached else '')
    for name, value in info.tried.items():
        yield f'  tried {name}: {"energy" if objective == "uniform" else "max cosine"} {value:.6f}'
    if num_prototypes > 1:
        quality = prototype_quality(points)
        yield ''
        yield f'{"":24}{"max cosine":>12}{"mean nearest":>14}{"energy":>12}{"|mean|":>10}'
        yield _line('these', quality)
        if info.theorem is not None:
            yield f'{"  by theorem at most":24}{info.theorem:12.6f}'
        yield f'{"proven bound, at least":24}{quality.bound:12.6f}'
        # The recipe takes as much work as 1,000 evaluations of the objective.
        if not recipe or dim < 2:
            pass
        elif affordable_evaluations(num_prototypes, dim) < _SGD_RECIPE_EPOCHS / 4:
            yield "the authors' recipe: not run, it would take minutes (--method sgd runs it)"
        else:
            reference = make_prototypes(num_prototypes, dim, method='sgd', seed=seed, progress=True)
            yield _line("the authors' recipe", prototype_quality(reference))
        if quality.sampled:
            yield f'(a sample of {quality.sampled_rows} points against all: the maximal cosine may be larger)'
        if plot:
            draw_prototypes(plot, points, quality)
            yield f'picture: {plot}'
    if out:
        save_prototypes(out, points, {'method': info.method, 'objective': objective, 'seed': seed,
                                      'description': info.description})
        yield f'points: {out}'


def _line(name: str, quality: PrototypeQuality) -> str:
    """Return a row of the table of measurements."""
    return (f'{name:24}{quality.max_cosine:12.6f}{quality.mean_nearest_cosine:14.6f}{quality.energy:12.5f}'
            f'{quality.mean_norm:10.1e}')
