"""The neck: the layers between a backbone's features and the embedding."""
from collections.abc import Mapping
from typing import get_args

import torch
import torch.nn as nn

from ..recipes import NeckName

__all__ = ['NECKS', 'load_neck', 'make_neck', 'neck_shapes']

NECKS: tuple[str, ...] = get_args(NeckName)


class _LinearBatchNorm(nn.Sequential):
    """Linear layer and BatchNorm1d, which stays one: timm's `convert_splitbn_model` makes every batch norm of a model a
    four-dimensional one, which refuses (B, d). (Synchronised batch norm takes any shape, and is let in.)"""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, nn.BatchNorm2d):
            super().add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # tokens (B, N, F) are rows like any, but not to BatchNorm1d
        if torch.jit.is_scripting():
            for module in self:
                rows = module(rows)
        else:
            if isinstance(self[1], nn.BatchNorm1d) and self[1].training:
                _refuse_single_sample(rows)
            rows = _batch_norm(self[1], self[0](rows))
        return rows.reshape(x.shape[:-1] + rows.shape[-1:])


def _batch_norm(norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Call a batch norm; in the dtype of its statistics where its parameters have another: FSDP's mixed precision casts
    these alone, and torch refuses the mixture."""
    if (isinstance(rows, torch.fx.Proxy) or not isinstance(norm, nn.BatchNorm1d) or norm.running_mean is None
            or norm.weight.dtype == norm.running_mean.dtype):
        return norm(rows)
    dtype = norm.running_mean.dtype
    if norm.training:
        norm.num_batches_tracked += 1
    return nn.functional.batch_norm(rows.to(dtype), norm.running_mean, norm.running_var, norm.weight.to(dtype),
                                    norm.bias.to(dtype), norm.training, norm.momentum, norm.eps)


@torch.fx.wrap
def _refuse_single_sample(rows: torch.Tensor) -> None:
    if rows.shape[0] == 1:
        raise ValueError("a batch of one sample cannot be trained on: the neck 'linear_bn' has batch norm, which needs "
                         "at least two. If it is the last batch of an epoch, make the DataLoader with drop_last=True. "
                         "To train on single samples, use neck='linear'.")


def make_neck(
        kind: NeckName,
        in_features: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a new neck, (..., in_features) -> (..., dim), with weights drawn as PyTorch draws those of any layer.

    Args:
        kind: 'linear'; 'linear_bn', with batch norm after the linear layer; or 'none', which needs
            `dim == in_features`.
        in_features: Number of backbone features.
        dim: d.
        device: Of its parameters.
        dtype: Of its parameters.
    """
    if kind == 'none':
        return nn.Identity()
    if kind == 'linear':
        return nn.Linear(in_features, dim, device=device, dtype=dtype)
    return _LinearBatchNorm(
        nn.Linear(in_features, dim, bias=False, device=device, dtype=dtype),
        nn.BatchNorm1d(dim, device=device, dtype=dtype),
    )


def neck_shapes(kind: NeckName, in_features: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a neck's tensors by their names, without making one: a file may ask for any size."""
    if kind == 'none':
        return {}
    if kind == 'linear':
        return {'weight': (dim, in_features), 'bias': (dim,)}
    return {'0.weight': (dim, in_features), '1.num_batches_tracked': (),
            **{f'1.{name}': (dim,) for name in ('weight', 'bias', 'running_mean', 'running_var')}}


def load_neck(neck: nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    """Load the tensors of another neck where all of them fit; return whether they did."""
    own = neck.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
        return False
    neck.load_state_dict(state)
    return True
