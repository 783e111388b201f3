"""The measures as JSON values, and as tables: the same for the terminal and for the page."""
from collections.abc import Iterator, Sequence
from typing import Any

from ..evaluation import Reliability
from .measure import Measures

__all__ = ['Section', 'as_json', 'percent', 'sections']

_MOST_ROWS = 10
# Of confusions, in JSON: at a million images there may be as many.
_MOST_CONFUSIONS = 10_000
# A title, the columns, the rows, and a sentence below.
Section = tuple[str, Sequence[str], list[Sequence[Any]], str]


def percent(share: float) -> float:
    """Return a share in percent, to two digits."""
    return round(100 * share, 2)


def as_json(measures: Measures, names: Sequence[str]) -> dict[str, Any]:
    """Return all measures as JSON values. Shares are in percent.

    Args:
        measures: The measures.
        names: The names of the C classes.
    """
    calibration, retrieval, near = measures.calibration, measures.retrieval, measures.near
    return {
        'images': len(measures.labels),
        'top1': percent(measures.top1),
        'top5': None if measures.top5 is None else percent(measures.top5),
        'classes': {name: {'right': right, 'images': images} for name, right, images
                    in zip(names, measures.right.tolist(), measures.images.tolist())},
        'calibration': calibration and {
            'temperature': round(calibration.temperature, 4), 'fitted_on': calibration.fitted_on,
            'measured_on': calibration.measured_on, 'error_before': percent(calibration.before.error),
            'error_after': percent(calibration.after.error), 'bins_before': _bins(calibration.before),
            'bins_after': _bins(calibration.after)},
        'confusions': [{'class': names[label], 'predicted': names[predicted], 'images': count}
                       for label, predicted, count in measures.confused[:_MOST_CONFUSIONS]],
        'near_prototypes': near and {
            'neighbours': measures.neighbours, 'errors': near.errors, 'errors_to_neighbours': near.near,
            'share': None if near.share is None else percent(near.share), 'share_by_chance': percent(near.by_chance)},
        'nearest_prototypes': [
            {'classes': [names[first], names[second]], 'degrees': round(angle, 2), 'confused_images': confused}
            for first, second, angle, confused in _nearest(measures)],
        'retrieval': retrieval and {
            **{f'recall_at_{k}': percent(value) for k, value in retrieval.recall.items()},
            'map_at_r': percent(retrieval.map_at_r), 'r_precision': percent(retrieval.r_precision),
            'knn_top1': percent(retrieval.knn_accuracy), 'queries': retrieval.queries,
            'queries_without_match': retrieval.without_match},
    }


def _bins(table: Reliability) -> list[dict[str, Any]]:
    """Return the bins that are not empty."""
    return [{'confidence': percent(confidence), 'accuracy': percent(accuracy), 'images': count} for
            confidence, accuracy, count in zip(*(part.tolist() for part in (table.confidence, table.accuracy,
                                                                            table.count))) if count]


def _nearest(measures: Measures) -> Iterator[tuple[int, int, float, int]]:
    """Yield pairs of classes with the nearest prototypes, their angle, and how many images are confused."""
    counts = {(label, predicted): count for label, predicted, count in measures.confused}
    for first, second, angle in measures.nearest:
        yield first, second, angle, counts.get((first, second), 0) + counts.get((second, first), 0)


def sections(measures: Measures, names: Sequence[str]) -> Iterator[Section]:
    """Yield the tables of a report, each with its title and a sentence that says what it shows.

    Args:
        measures: The measures.
        names: The names of the C classes.
    """
    rows: list[Sequence[Any]] = [['top-1', f'{percent(measures.top1):.2f} %']]
    if measures.top5 is not None:
        rows.append(['top-5', f'{percent(measures.top5):.2f} %'])
    rows += [*_retrieval_rows(measures), *_calibration_rows(measures)]
    yield 'In short', ['measure', 'value'], rows, ' '.join(_notes(measures))
    yield ('Most frequent confusions', ['class', 'predicted', 'images', 'of'],
           [[names[label], names[predicted], count, measures.images[label].item()]
            for label, predicted, count in measures.confused[:_MOST_ROWS]], _near_sentence(measures))
    yield ('Classes with the nearest prototypes', ['class', 'nearest class', 'degrees', 'confused images'],
           [[names[first], names[second], f'{angle:.1f}', confused]
            for first, second, angle, confused in _nearest(measures)][:_MOST_ROWS], '')
    right, images = measures.right.tolist(), measures.images.tolist()
    worst = sorted((index for index in range(len(names)) if right[index] < images[index]),
                   key=lambda index: (right[index] / images[index], -images[index], index))
    yield ('Least accurate classes', ['class', 'top-1', 'images'],
           [[names[index], f'{100 * right[index] / images[index]:.1f}', images[index]]
            for index in worst[:_MOST_ROWS]], '')


def _retrieval_rows(measures: Measures) -> Iterator[list[str]]:
    found = measures.retrieval
    if found is None:
        return
    yield from ([f'recall@{k}', f'{percent(value):.2f} %'] for k, value in found.recall.items())
    yield ['mAP@R', f'{percent(found.map_at_r):.2f} %']
    yield ['R-precision', f'{percent(found.r_precision):.2f} %']
    yield ['nearest neighbours, top-1', f'{percent(found.knn_accuracy):.2f} %']


def _calibration_rows(measures: Measures) -> Iterator[list[str]]:
    found = measures.calibration
    if found is None:
        return
    yield ['calibration error', f'{percent(found.before.error):.2f} %']
    yield [f'calibration error, logits divided by {found.temperature:.3f}', f'{percent(found.after.error):.2f} %']


def _notes(measures: Measures) -> Iterator[str]:
    calibration, retrieval = measures.calibration, measures.retrieval
    if calibration:
        yield (f'The temperature was fitted on {calibration.fitted_on:,} of the images, drawn at random, and both '
               f'calibration errors were measured on the other {calibration.measured_on:,}.')
    else:
        yield 'There are too few images to measure calibration.'
    if retrieval:
        left = len(measures.labels) - retrieval.queries
        yield (f'Retrieval: each of {retrieval.queries:,} images was searched among all others'
               + (f'; {retrieval.without_match:,} are the only one of their class' if retrieval.without_match else '')
               + ('.' if left == retrieval.without_match else ', a sample of the images.'))
    else:
        yield 'No class has two images, so that there is nothing to retrieve.'
    absent = int((measures.images == 0).sum())
    if absent:
        yield f'{absent:,} of the {len(measures.images):,} classes have no images.'


def _near_sentence(measures: Measures) -> str:
    near = measures.near
    if near is None or near.share is None:
        return ''
    return (f'{near.near:,} of {near.errors:,} errors ({percent(near.share):.1f} %) go to one of the '
            f'{measures.neighbours} classes with the prototypes nearest to the right one; by chance it would be '
            f'{percent(near.by_chance):.1f} %.')
