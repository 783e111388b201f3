"""The head's arithmetic in float32, under autocast and in half-precision models too; kept whole by torch.fx."""
import math
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ['SCALE_GRADIENT', 'cosines', 'maps_as_rows', 'plain_tensor', 'rows_as_maps', 'slowly_learned',
           'unit_embeddings']

# Embeddings shorter than this have no direction worth the name: they become zero, with a gradient of zero.
_SHORTEST = 1e-6
# Factor on the gradient of a learned scale. SGD at the network's rate raises the scale until the training samples are
# fit, whether or not the embeddings are good: on few images a class that cost up to four points
# (`benchmarks/results/accuracy_trials.md`). Adam's steps do not depend on it.
SCALE_GRADIENT = 0.01


def _in_float32(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context without autocast, for the tensor's device."""
    # The meta device, where shapes are tried, has no autocast.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@torch.fx.wrap
def unit_embeddings(z: torch.Tensor) -> torch.Tensor:
    """Divide each row (..., d) by its length, in float32; rows shorter than 1e-6 become zero."""
    if torch.jit.is_scripting():
        return _divided_by_length(z)
    else:
        with _in_float32(z):
            return _divided_by_length(z)


def _divided_by_length(z: torch.Tensor, shortest: float = _SHORTEST) -> torch.Tensor:
    z = z.float()
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    # z / inf is zero, and so is its gradient. NaN and infinite entries become NaN, not zero.
    return z / length.masked_fill(length < shortest, math.inf)


def slowly_learned(parameter: torch.Tensor, factor: float = SCALE_GRADIENT) -> torch.Tensor:
    """Return a parameter's value, whose gradient reaches the parameter multiplied by 0.01, or another factor."""
    value = parameter.detach()
    return value + factor * (parameter - value)


@torch.fx.wrap
def cosines(embeddings: torch.Tensor, class_vectors: torch.Tensor) -> torch.Tensor:
    """Return the products (..., C), float32, of unit embeddings (..., d) and unit class vectors (C, d)."""
    if torch.jit.is_scripting():
        return embeddings.float() @ class_vectors.t()
    else:
        with _in_float32(embeddings):
            return embeddings.float() @ class_vectors.t()


@torch.fx.wrap
def maps_as_rows(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (B, F, H, W) as rows (B H W, F); rows as they are."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2) if maps.dim() == 4 else maps


@torch.fx.wrap
def rows_as_maps(rows: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Undo `maps_as_rows(maps)`, for rows of any length."""
    if maps.dim() != 4:
        return rows
    return rows.reshape(maps.shape[0], maps.shape[2], maps.shape[3], rows.shape[1]).permute(0, 3, 1, 2)


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the Python subclass that a framework gave it (fastai's TensorBase, torchvision's
    tv_tensors): two such subclasses refuse to meet in one operation. Those that are more than a name, such as DTensor,
    stay as they are."""
    kind = type(tensor)
    if kind is torch.Tensor or getattr(kind, '__torch_dispatch__', None) is not torch.Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(torch.Tensor)
