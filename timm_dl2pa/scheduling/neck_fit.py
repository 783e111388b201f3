"""A linear map that stands for a neck: written through what other tools put around its layers, or refused."""
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from ..head import DL2PAHead, plain_tensor

__all__ = ['NeckMap', 'check_neck', 'refuse_sharded', 'write_neck']

_REMEDY = 'Prime the model first, and then add it.'

# The weight of a primed neck is so many times longer than that of a new one. Embeddings are unit vectors, so that its
# length changes nothing but how fast training turns it, which falls with its square (with Adam, with itself). What
# closed form has found, the steps for a new classifier would undo. On frozen features, with AdamW at 1e-4 to 3e-3 and
# SGD at 0.01 and 0.1, top-1 was up to 19 points lower than before training at length 1, up to 3 at 10, and less than
# one at 40 (the last two: `benchmarks/results/accuracy_trials.md`).
_LENGTH = 40.0
# The batch norm's variances grow with its square. They stay within float16, which ends at 65,504.
_LARGEST_VARIANCE = 6e4


@dataclass(frozen=True)
class NeckMap:
    """The map `weight (x - centre)` of features x.

    Before a batch norm, the linear layer is `_LENGTH` times as long.

    Attributes:
        weight: (d, F), float64.
        centre: (F,), float64.
        variance: (d,), float64: of its outputs, for a neck with batch norm.
    """
    weight: np.ndarray
    centre: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, neck: nn.Module, weight: np.ndarray, centre: np.ndarray, covariance: np.ndarray) -> 'NeckMap':
        """Return a map as long as suits a neck.

        The outputs of a linear neck have `_LENGTH` times the length that those of a new one have. After a batch norm
        their total variance is d.

        Args:
            neck: With or without a batch norm.
            weight: (d, F), of any length.
            centre: (F,).
            covariance: (F, F), of the features.
        """
        total = len(weight)
        if _layers(neck)[1] is None:
            # torch draws the weights of a new layer from -1 / sqrt(F) to 1 / sqrt(F): their variance is 1 / (3 F).
            total *= _LENGTH ** 2 * covariance.trace() / (3 * len(covariance))
        variance = _variances(weight, covariance)
        factor = total / max(variance.sum(), 1e-30)
        return cls(factor ** 0.5 * weight, centre, factor * variance)


def refuse_sharded(model: nn.Module, what: str = 'prime') -> None:
    """Raise a ValueError if FSDP has sharded a model: no process has the whole neck then. `what` needs it."""
    for module in model.modules():
        if any(base.__name__ in ('FullyShardedDataParallel', 'FSDPModule') for base in type(module).__mro__):
            raise ValueError(f'{what} needs whole parameters, and FSDP has sharded those of the model: call it before '
                             f'fully_shard or FullyShardedDataParallel.')


def _variances(weight: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return the variance of each output of a linear map."""
    rows = torch.from_numpy(weight)
    return (rows @ torch.from_numpy(covariance) * rows).sum(dim=1).numpy()


@torch.no_grad()
def check_neck(head: DL2PAHead, wanted: NeckMap | None = None) -> None:
    """Write a map into a copy of a head's neck, and raise a ValueError with the cause unless the copy does it then.

    Args:
        head: Its neck is not changed.
        wanted: The map. Default: some map.
    """
    if head.config.neck == 'none' or head.prototypes.is_meta:
        return
    random = np.random.default_rng(0)
    if wanted is None:
        wanted = NeckMap(random.standard_normal((head.dim, head.in_features)), random.standard_normal(head.in_features),
                         np.ones(head.dim))
    _refuse_hooks(head.neck)
    trial = copy.deepcopy(head.neck).eval()  # spectral norm counts each look at its weight in training mode
    _refuse_parts(trial, head.dim, head.in_features)
    try:
        write_neck(trial, wanted)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # of a parametrisation without an inverse, say
        raise ValueError(f'prime cannot set the neck: {_around(head.neck)} stands in the way ({error}). '
                         f'{_REMEDY}') from None
    weight = _layers(trial)[0].weight
    away = random.standard_normal((32, head.in_features)) * (1 + np.abs(wanted.centre).mean())
    features = torch.from_numpy(wanted.centre + away).to(weight)
    with torch.autocast(features.device.type, enabled=False):
        answer = trial(features).cpu().double().numpy()
    expected = (features.cpu().double().numpy() - wanted.centre) @ wanted.weight.T
    # Rounding of a sum with large, opposite terms.
    size = np.abs(expected).max() + np.abs(wanted.weight @ wanted.centre).max()
    allowed = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if not np.abs(answer - expected).max() <= allowed * size:
        raise ValueError(f'prime cannot set the neck: with {_around(head.neck)} around it, it is another map than '
                         f'the one that is written. {_REMEDY}')


@torch.no_grad()
def write_neck(neck: nn.Module, wanted: NeckMap) -> None:
    """Write a map into a neck, unchecked."""
    linear, norm = _layers(neck)
    if norm is None:
        _write(linear, 'weight', wanted.weight)
        _write(linear, 'bias', -wanted.weight @ wanted.centre)
        return
    length = min(_LENGTH, (_LARGEST_VARIANCE / max(wanted.variance.max(), 1e-30)) ** 0.5)
    _write(linear, 'weight', length * wanted.weight)
    # Batch norm divides by the deviation and multiplies by it again: together they are the linear map.
    norm.running_mean.copy_(torch.from_numpy(linear.weight.detach().cpu().double().numpy() @ wanted.centre))
    norm.running_var.copy_(torch.from_numpy(length ** 2 * wanted.variance))
    _write(norm, 'weight', np.sqrt(wanted.variance + norm.eps / length ** 2))
    _write(norm, 'bias', np.zeros(len(wanted.variance)))


def _write(layer: nn.Module, name: str, value: np.ndarray) -> None:
    tensor = getattr(layer, name)
    value = torch.from_numpy(value).to(tensor)
    if parametrize.is_parametrized(layer, name):
        setattr(layer, name, value)  # by the parametrisation's right_inverse
    else:
        tensor.copy_(value)


def _layers(neck: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Return the linear layer of a neck, without the adapter (LoRA) that PEFT puts around it, and its batch norm."""
    if isinstance(neck, nn.Sequential):
        return _without_adapter(neck[0]), neck[1]
    return _without_adapter(neck), None


def _without_adapter(layer: nn.Module) -> nn.Module:
    while isinstance(getattr(layer, 'base_layer', None), nn.Module):
        layer = layer.base_layer
    return layer


def _tensors(neck: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield what `write_neck` writes: layers with the names of their tensors."""
    linear, norm = _layers(neck)
    yield linear, 'weight'
    yield from [(linear, 'bias')] if norm is None else [(norm, 'weight'), (norm, 'bias')]


def _refuse_hooks(neck: nn.Module) -> None:
    """Raise a ValueError if hooks recompute a tensor of a neck. (Such a neck cannot be copied either.)"""
    for layer, name in _tensors(neck):
        if name not in layer._parameters and not parametrize.is_parametrized(layer, name):
            raise ValueError(f'prime cannot set the neck: its {name} is recomputed at each forward, by '
                             f'{_around(neck)}. {_REMEDY}')


def _refuse_parts(neck: nn.Module, dim: int, in_features: int) -> None:
    """Raise a ValueError unless the tensors of a neck are whole, plain ones."""
    for layer, name in _tensors(neck):
        shape = (dim, in_features) if layer is _layers(neck)[0] and name == 'weight' else (dim,)
        tensor = plain_tensor(getattr(layer, name).data)
        if tensor.shape != shape or type(tensor) is not torch.Tensor:
            raise ValueError(f'prime cannot set the neck: its {name} is a {type(tensor).__name__} of the shape '
                             f'{tuple(tensor.shape)}, not a whole tensor of the shape {shape} (it is sharded, or '
                             f'quantised). Prime the model before that.')


def _around(neck: nn.Module) -> str:
    """Return the names of what other tools have put around a neck's layers."""
    return ', '.join(dict.fromkeys(_tools(neck))) or 'a hook'


def _tools(neck: nn.Module) -> Iterator[str]:
    for module in neck.modules():
        if hasattr(module, 'base_layer'):
            yield f'an adapter of PEFT ({type(module).__name__})'
        if parametrize.is_parametrized(module):
            for chain in module.parametrizations.values():
                yield from (type(part).__name__.strip('_') for part in chain)
        yield from (type(hook).__name__ for hook in module._forward_pre_hooks.values())
