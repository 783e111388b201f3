"""Pictures for the report: the images that were confused, and confidence beside accuracy."""
import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ..evaluation import Reliability
from ..files.html import figure, picture
from .measure import Calibration, Measures

__all__ = ['confused_images', 'reliability_diagram']

_PAIRS, _IMAGES, _SIDE = 8, 6, 128


def confused_images(measures: Measures, names: Sequence[str], image: Callable[[int], torch.Tensor],
                    mean: Sequence[float], std: Sequence[float]) -> Iterator[str]:
    """Yield a figure for each of the worst confusions: images that were taken for another class, then of that class.

    Args:
        measures: The measures.
        names: The names of the C classes.
        image: Returns an image as the model gets it, (channels, H, W) float32.
        mean: What was subtracted from its channels.
        std: What they were divided by then.
    """
    for label, predicted, count in measures.confused[:_PAIRS]:
        wrong = ((measures.labels == label) & (measures.predictions == predicted)).nonzero().squeeze(1).tolist()
        right = ((measures.labels == predicted) & (measures.predictions == predicted)).nonzero().squeeze(1).tolist()
        shown = [picture(_jpeg(image(index), mean, std), 'jpeg', f'{names[label]}, number {index}')
                 for index in wrong[:_IMAGES]]
        beside = [picture(_jpeg(image(index), mean, std), 'jpeg', f'{names[predicted]}, number {index}')
                  for index in right[:_IMAGES]]
        caption = f'{names[label]}, taken for {names[predicted]}: {count} image{"s" * (count > 1)}'
        if beside:
            shown += ['<br>', *beside]
            caption += f'. Below: {names[predicted]}, recognised'
        yield figure(shown, caption + '.', thumbnails=True)


def _jpeg(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """Return an image as the contents of a small JPEG file."""
    channels = len(image)
    scale, shift = (torch.tensor(list(values))[:channels].view(-1, 1, 1) for values in (std, mean))
    pixels = ((image.float().cpu() * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    if channels not in (1, 3):  # of which JPEG knows none: the first channel
        array = array[:, :, :1]
    shown = Image.fromarray(np.ascontiguousarray(array.squeeze(2) if array.shape[2] == 1 else array))
    shown.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    shown.save(file, 'JPEG', quality=85)
    return file.getvalue()


def reliability_diagram(calibration: Calibration) -> str:
    """Return a figure, SVG, of accuracy by confidence, before and after the temperature."""
    lines = ''.join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{_points(table)}"/>'
        for colour, table in (('#8c8c8c', calibration.before), ('#c8102e', calibration.after)))
    svg = (f'<svg viewBox="-10 -10 340 340" width="340" height="340" role="img" aria-label="Accuracy by confidence">'
           f'<rect width="320" height="320" fill="none" stroke="#ddd"/>'
           f'<line x1="0" y1="320" x2="320" y2="0" stroke="#ddd"/>{lines}</svg>')
    return figure([svg], f'Accuracy (upwards) by confidence (to the right), both from 0 to 100 %: grey as the model '
                         f'gives its logits, red with the temperature {calibration.temperature:.3f}. On the diagonal, '
                         f'confidence is right.')


def _points(table: Reliability) -> str:
    return ' '.join(f'{320 * confidence:.1f},{320 - 320 * accuracy:.1f}' for confidence, accuracy, count
                    in zip(table.confidence.tolist(), table.accuracy.tolist(), table.count.tolist()) if count)
