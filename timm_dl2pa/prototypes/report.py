"""What the command `timm-dl2pa prototypes` does: make a set, measure it, write it, draw it."""
from collections.abc import Iterator

from .files import save_prototypes
from .make import make_prototypes
from .optimise import affordable_evaluations
from .picture import draw_prototypes
from .quality import PrototypeQuality, prototype_quality

__all__ = ['report_prototypes']

_RECIPE_EPOCHS = 1000


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
    """Yield the lines of the report; the arguments are those of `make_prototypes`, and where its points go.

    Raises:
        ValueError: As `make_prototypes`.
        OSError: A file cannot be written.
    """
    points, info = make_prototypes(num_prototypes, dim, objective=objective, method=method, seed=seed, effort=effort,
                                   device=device, return_info=True, progress=True)
    yield f'{num_prototypes} prototypes in {dim} dimensions, objective {objective}: {info.method}'
    yield f'  {info.description}'
    yield f'  {info.seconds:.1f} s' + (' when they were made; now from the cache' if info.cached else '')
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
        # The recipe is as much work as a thousand evaluations of the objective.
        if not recipe or dim < 2:
            pass
        elif affordable_evaluations(num_prototypes, dim) < _RECIPE_EPOCHS / 4:
            yield "the authors' recipe: not run, it would take minutes (--method sgd runs it)"
        else:
            theirs = make_prototypes(num_prototypes, dim, method='sgd', seed=seed, progress=True)
            yield _line("the authors' recipe", prototype_quality(theirs))
        if quality.sampled:
            yield f'(from {quality.sampled_rows} of the points against all: the largest cosine may be larger)'
        if plot:
            draw_prototypes(plot, points, quality)
            yield f'picture: {plot}'
    if out:
        save_prototypes(out, points, {'method': info.method, 'objective': objective, 'seed': seed,
                                      'description': info.description})
        yield f'points: {out}'


def _line(name: str, quality: PrototypeQuality) -> str:
    return (f'{name:24}{quality.max_cosine:12.6f}{quality.mean_nearest_cosine:14.6f}{quality.energy:12.5f}'
            f'{quality.mean_norm:10.1e}')
