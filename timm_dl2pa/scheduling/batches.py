"""What a loader's batch holds: the model's input, and the targets."""
from collections.abc import Mapping
from typing import Any

import torch

from ..head import plain_tensor
from ..losses.targets import as_labels

__all__ = ['split_batch', 'to_model']

_IMAGES = ('pixel_values', 'images', 'image')
_TARGETS = ('labels', 'label', 'targets', 'target')


def split_batch(batch: Any) -> tuple[Any, torch.Tensor]:
    """Return the input and the targets of a batch.

    Args:
        batch: A sequence whose first two entries they are, or a mapping, as the loaders of transformers and datasets
            give it: with the images under 'pixel_values', 'images' or 'image', and the targets under 'labels', 'label',
            'targets' or 'target'.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(batch, Mapping):
        images, targets = (next((name for name in names if name in batch), None) for names in (_IMAGES, _TARGETS))
        if images is None or targets is None:
            raise ValueError(f'a batch of loader is a mapping of {", ".join(map(str, batch))}: it must have one of '
                             f'{", ".join(_IMAGES)}, and one of {", ".join(_TARGETS)}. Otherwise let loader give pairs '
                             f'(images, targets).')
        return batch[images], as_labels(batch[targets])
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f'a batch of loader must be a pair (images, targets) or a mapping, not a '
                         f'{type(batch).__name__}{f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""}.')
    return batch[0], as_labels(batch[1])


def to_model(images: Any, like: torch.Tensor) -> Any:
    """Return a model's input on the device, and in the dtype, of one of its tensors.

    Args:
        images: (B, 3, H, W); or a mapping of tensors, as NaFlexViT takes it: of these, those of whole numbers or of
            truth values (coordinates, masks) keep their dtype.
        like: That tensor.
    """
    if isinstance(images, Mapping):
        return {name: value.to(like.device, like.dtype if value.is_floating_point() else None, non_blocking=True)
                if isinstance(value, torch.Tensor) else value for name, value in images.items()}
    return plain_tensor(torch.as_tensor(images)).to(like.device, like.dtype, non_blocking=True)
