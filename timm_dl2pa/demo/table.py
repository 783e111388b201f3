"""The demo's table, and what follows from its numbers: said of whoever wins."""
from collections.abc import Iterator

import torch

from .heads import HEADS
from .training import Run

__all__ = ['COLUMNS', 'claims', 'table_rows']

COLUMNS = ('head', 'top-1', 'head parameters', 'ms a step', 'labels moved')
# As they stand in a sentence.
_NAMES = {kind: title if title.startswith('the ') else f'the {title}' for kind, title in HEADS.items()}
# A difference of fewer standard errors is called none.
_ERRORS = 2.0


def table_rows(runs: dict[str, Run]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row."""
    for kind, run in runs.items():
        moved = f'{sum(run.moved):,} at {len(run.moved)} re-solve{"s" * (len(run.moved) != 1)}' if run.moved else '-'
        yield HEADS[kind], f'{run.top1:.1f}', f'{run.head_parameters:,}', f'{run.step_milliseconds:.1f}', moved


def claims(runs: dict[str, Run], right: dict[str, torch.Tensor]) -> list[str]:
    """Return sentences about the default head beside the others.

    Two heads differ in accuracy if their difference is more than two standard errors of it. These are those of paired
    answers, by the same test images: of n images of which b are classified correctly by the first head alone and c by
    the second alone, `sqrt(b + c) / n`.

    Args:
        runs: The results of the heads, `dl2pa` among them.
        right: (N,) float32 for each head: 1 where a test image is classified correctly.
    """
    ours = runs['dl2pa']
    others = {kind: run for kind, run in runs.items() if kind != 'dl2pa'}
    lines = []
    for kind, run in sorted(others.items(), key=lambda item: -item[1].top1):
        lines.append(f'{_compared(ours.top1 - run.top1, _error(right["dl2pa"], right[kind]))} {_NAMES[kind]}')
    linear = runs['linear']
    return [
        f'{HEADS["dl2pa"]}: {"; ".join(lines)}.',
        f'Its head has {100 * ours.head_parameters / linear.head_parameters:.0f} % of the parameters of that of '
        f'{_NAMES["linear"]}, and its step takes '
        f'{100 * ours.step_milliseconds / linear.step_milliseconds:.0f} % of the time.',
    ]


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the standard error, in points of percent, of the difference of two accuracies on the same images."""
    return 100 * (one != other).sum().sqrt().item() / len(one)


def _compared(points: float, error: float) -> str:
    if abs(points) <= _ERRORS * error:
        return f'as accurate, as far as these test images tell ({points:+.1f} points), as'
    return f'{abs(points):.1f} points {"more" if points > 0 else "less"} accurate than'
