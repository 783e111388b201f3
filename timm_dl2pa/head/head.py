"""DL2PAHead: neck, unit embeddings, and logits against fixed prototypes under an assignment."""
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ..assignment.solve import check_assignment, restore_whole_numbers
from ..prototypes import check_prototypes, load_prototypes, make_prototypes, unit_rows

__all__ = ['DL2PAConfig', 'DL2PAHead', 'default_scale', 'heads_of']

NECKS = ('linear', 'linear_bn', 'none')
TRAIN_OUTPUTS = ('logits', 'embeddings')

# Where a learned scale begins: low, so that young embeddings are not asked to be certain. It grows with training.
LEARNED_SCALE_START = 4.0

# Embeddings shorter than this have no direction worth the name: they become zero, with a gradient of zero.
_SHORTEST = 1e-6


def _in_float32(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context without autocast, for the tensor's device."""
    # The meta device, where shapes are tried, has no autocast.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@torch.fx.wrap
def _unit_embeddings(z: torch.Tensor) -> torch.Tensor:
    """Divide each row by its length, in float32."""
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


@torch.fx.wrap
def _cosines(embeddings: torch.Tensor, class_prototypes: torch.Tensor) -> torch.Tensor:
    if torch.jit.is_scripting():
        return embeddings.float() @ class_prototypes.t()
    else:
        with _in_float32(embeddings):
            return embeddings.float() @ class_prototypes.t()


@torch.fx.wrap
def _rows(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (B, F, H, W) as rows (B H W, F); rows as they are."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2) if maps.dim() == 4 else maps


@torch.fx.wrap
def _like_maps(rows: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Undo `_rows(maps)`, for rows of any length."""
    if maps.dim() != 4:
        return rows
    return rows.reshape(maps.shape[0], maps.shape[2], maps.shape[3], rows.shape[1]).permute(0, 3, 1, 2)


def default_scale(num_classes: int) -> float:
    """Return the scale of the cosines that lets a perfect embedding reach the probability P = 0.9999.

    `(C - 1) / C * log((C - 1) P / (1 - P))`, the lower bound of CosFace (Wang et al. 2018, section 3.3) for class
    vectors spread as evenly as a simplex: 10.2 for 10 classes, 13.7 for 100, 16.1 for 1,000, 19.2 for 21,841.
    """
    probability = 0.9999
    return (num_classes - 1) / num_classes * math.log((num_classes - 1) * probability / (1 - probability))


class _Neck(nn.Sequential):
    """Linear layer and BatchNorm1d, which stays one: timm's `convert_splitbn_model` makes every batch norm of a model a
    four-dimensional one, which refuses (B, d). (Synchronised batch norm takes any shape, and is let in.)"""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, nn.BatchNorm2d):
            super().add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # tokens (B, N, F) are rows like any, but not to BatchNorm1d
        for module in self:
            rows = module(rows)
        return rows.reshape(x.shape[:-1] + rows.shape[-1:])


@dataclass(frozen=True)
class DL2PAConfig:
    """What a head is made from: with the head's state dict, enough to build it again.

    Attributes:
        in_features: Number of backbone features.
        num_classes: C, at least 2.
        dim: d, the dimension of the embeddings.
        num_prototypes: K >= C; None means C.
        neck: 'linear', 'linear_bn' (batch norm after it) or 'none' (the features are the embedding).
        scale: Factor on the cosines; None means `default_scale(num_classes)`, or 4 to begin with where it is learned.
        learn_scale: Whether the scale is a parameter.
        train_output: What a head in training mode returns: 'logits' (B, C) or unit 'embeddings' (B, d).
        seed: Seed of the prototypes.
        own_prototypes: Whether the prototypes were given rather than made from the seed.

    Raises:
        ValueError: A value is out of range, or two exclude each other.
    """
    in_features: int
    num_classes: int
    dim: int
    num_prototypes: int | None = None
    neck: str = 'linear'
    scale: float | None = None
    learn_scale: bool = False
    train_output: str = 'logits'
    seed: int = 0
    own_prototypes: bool = False

    def __post_init__(self) -> None:
        for name, least in (('in_features', 1), ('num_classes', 2), ('dim', 1)):
            if getattr(self, name) < least:
                raise ValueError(f'{name} must be at least {least}, not {getattr(self, name)}.')
        if self.num_prototypes is None:
            object.__setattr__(self, 'num_prototypes', self.num_classes)
        if self.num_prototypes < self.num_classes:
            raise ValueError(f'num_prototypes must be at least num_classes={self.num_classes}, '
                             f'not {self.num_prototypes}.')
        if self.neck not in NECKS:
            raise ValueError(f'neck must be one of {", ".join(NECKS)}, not {self.neck!r}.')
        if self.neck == 'none' and self.dim != self.in_features:
            raise ValueError(f"neck='none' uses the features as the embedding, so dim must be their number, "
                             f"{self.in_features}, not {self.dim}.")
        if self.train_output not in TRAIN_OUTPUTS:
            raise ValueError(f'train_output must be one of {", ".join(TRAIN_OUTPUTS)}, not {self.train_output!r}.')
        if self.learn_scale and self.train_output == 'embeddings':
            raise ValueError("learn_scale=True needs train_output='logits': embeddings give the scale no gradient.")
        if self.scale is None:
            scale = LEARNED_SCALE_START if self.learn_scale else default_scale(self.num_classes)
            object.__setattr__(self, 'scale', scale)
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f'scale must be positive and finite, not {self.scale}.')


class DL2PAHead(nn.Module):
    """A classifier head whose class vectors are fixed prototypes on the unit sphere.

    An embedding z is the neck's output divided by its length. The logit of class c is `scale * <z, p_a(c)>`, where p_k
    are the prototypes and a the assignment (DL2PA, section 3). Lengths, cosines and logits are computed in float32,
    under autocast and in a bfloat16 or float16 model too; an embedding of length zero has logits and gradients zero.

    Buffers, both in the state dict: `prototypes` (K, d) float32, which stay float32 when the model's dtype changes, and
    `assignment` (C,) int64, the prototype of each class. `scale`, () float32, is a buffer too, or comes from the
    parameter `log_scale` if it is learned.

    In a timm model, `before` holds the layers of timm's classifier that come before its last, linear one (most often
    none). With `channels_first`, in the place of a 1x1 convolution, maps (B, in_features, H, W) become maps of logits
    (B, C, H, W); elsewhere any number of dimensions may come before the features. `auxiliary` tells a head from the
    main one.

    `observer`, if set, is called with the detached embeddings (B, d) of each forward in training mode: that is how an
    `AssignmentScheduler` sees them. `mode_observer`, if set, is called with the new mode at each `train()` and
    `eval()`: that is how a training task of timm's hears of epochs. `feature_observer`, if set, is called with the
    detached features (B, in_features) of each forward: for priming. `warmup_vectors`, if set, are class vectors (C, d)
    that stand in for the prototypes in training mode: during its warm-up an `AssignmentScheduler` sets them, or moves
    the prototypes themselves after each batch, as `placing` then tells. None of the five is copied, pickled or saved
    with the head.

    Args:
        in_features: Number of backbone features.
        num_classes: C, at least 2.
        dim: d, which may be far smaller than C.
        num_prototypes: K >= C. Default: the number of rows of `prototypes` if they are given, otherwise C.
        prototypes: (K, d) unit rows of your own, or a safetensors file of them (see `load_prototypes`). Default:
            `make_prototypes(num_prototypes, dim, seed=seed)`.
        neck: 'linear', 'linear_bn', or 'none', which needs `dim == in_features`.
        scale: Factor on the cosines. Default: `default_scale(num_classes)`, the bound of CosFace; learned, from 4 on.
        learn_scale: Make the scale a parameter, in the log domain so that it stays positive. With cross-entropy that
            learns much better than a fixed scale: unit embeddings in few dimensions times a large one ask for a
            certainty that a young network has not.
        train_output: 'logits', or 'embeddings' for a loss of this package at very many classes: the (B, C) logits are
            then made in evaluation mode only.
        seed: Seed of the prototypes. The neck's weights are drawn as PyTorch draws those of any layer.
        device: Where parameters and buffers are made.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range, two exclude each other, or the prototypes are not finite unit rows.
    """

    prototypes: torch.Tensor
    assignment: torch.Tensor
    # TorchScript compiles properties, and knows no configs.
    __jit_unused_properties__ = ('in_features', 'num_classes', 'dim', 'train_output', 'class_prototypes',
                                 'warming_up')

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            dim: int,
            *,
            num_prototypes: int | None = None,
            prototypes: torch.Tensor | str | os.PathLike | None = None,
            neck: str = 'linear',
            scale: float | None = None,
            learn_scale: bool = False,
            train_output: str = 'logits',
            seed: int = 0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if prototypes is not None:
            if isinstance(prototypes, (str, os.PathLike)):
                prototypes = load_prototypes(prototypes)
            prototypes = torch.as_tensor(prototypes).detach()
            if not prototypes.is_meta:  # of a model whose shapes alone are tried
                check_prototypes(prototypes, num_classes)
                prototypes = unit_rows(prototypes)
            if prototypes.shape[1] != dim:
                raise ValueError(f'prototypes have {prototypes.shape[1]} dimensions, but dim={dim}.')
            if num_prototypes not in (None, len(prototypes)):
                raise ValueError(f'prototypes has {len(prototypes)} rows, but num_prototypes={num_prototypes}.')
            num_prototypes = len(prototypes)
        self.config = DL2PAConfig(
            in_features=in_features,
            num_classes=num_classes,
            dim=dim,
            num_prototypes=num_prototypes,
            neck=neck,
            scale=scale,
            learn_scale=learn_scale,
            train_output=train_output,
            seed=seed,
            own_prototypes=prototypes is not None,
        )
        if prototypes is None:
            prototypes = make_prototypes(self.config.num_prototypes, dim, seed=seed)

        device = torch.empty(0, device=device).device  # the default device where none is given
        if neck == 'none':
            self.neck = nn.Identity()
        elif neck == 'linear':
            self.neck = nn.Linear(in_features, dim, device=device, dtype=dtype)
        else:
            self.neck = _Neck(
                nn.Linear(in_features, dim, bias=False, device=device, dtype=dtype),
                nn.BatchNorm1d(dim, device=device, dtype=dtype),
            )
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(self.config.scale), device=device, dtype=dtype))
        else:
            self.register_buffer('scale', torch.tensor(self.config.scale, device=device, dtype=torch.float32))
        self.register_buffer('prototypes', prototypes.to(device, torch.float32, copy=True))
        self.register_buffer('assignment', torch.arange(num_classes, device=device))
        self.before: nn.Module = nn.Identity()
        self.channels_first = False
        self.auxiliary = False
        self.observer: Callable[[torch.Tensor], None] | None = None
        self.mode_observer: Callable[[bool], None] | None = None
        self.feature_observer: Callable[[torch.Tensor], None] | None = None
        self.warmup_vectors: torch.Tensor | None = None
        self.placing = False

    @classmethod
    def from_config(cls, config: DL2PAConfig, prototypes: torch.Tensor | None = None, **kwargs: Any) -> 'DL2PAHead':
        """Build a head from its config, and from its prototypes where they are at hand: then none are computed.

        Raises:
            ValueError: The config says that the prototypes were given, and they are not.
        """
        if config.own_prototypes and prototypes is None:
            raise ValueError('this head was made with prototypes of its own: pass them as prototypes=.')
        arguments = dict(vars(config), prototypes=prototypes, **kwargs)
        del arguments['own_prototypes']
        head = cls(**arguments)
        head.config = config
        return head

    @property
    def in_features(self) -> int:
        return self.config.in_features

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def train_output(self) -> str:
        return self.config.train_output

    @property
    def class_prototypes(self) -> torch.Tensor:
        """The prototype of each class, (C, d) float32."""
        return self.prototypes[self.assignment]

    def current_scale(self) -> torch.Tensor:
        """Return the factor on the cosines, () float32; with a gradient if it is learned."""
        return self.log_scale.float().exp() if hasattr(self, 'log_scale') else self.scale

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (B, d), float32, of features (B, in_features)."""
        return _unit_embeddings(self.neck(self.before(x)))

    def cosines(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the cosines (B, C), float32, of unit embeddings (B, d) with the prototype of each class.

        In training mode, during a warm-up, they are those with the `warmup_vectors`.
        """
        vectors = self.prototypes[self.assignment]
        if not torch.jit.is_scripting() and self.training and self.warmup_vectors is not None:
            vectors = self.warmup_vectors
        return _cosines(embeddings, vectors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C), float32; or unit embeddings (B, d) in training with `train_output='embeddings'`."""
        features = self.before(_rows(x) if self.channels_first else x)
        embeddings = _unit_embeddings(self.neck(features))
        if torch.jit.is_scripting():
            out = self.cosines(embeddings) * self.current_scale()
        else:
            if self.feature_observer is not None:
                self.feature_observer(features.detach())
            if self.training and self.observer is not None:
                self.observer(embeddings.detach())
            if self.training and self.train_output == 'embeddings':
                out = embeddings
            else:
                out = self.cosines(embeddings) * self.current_scale()
        return _like_maps(out, x) if self.channels_first else out

    def train(self, mode: bool = True) -> 'DL2PAHead':
        """Set the mode, and tell the `mode_observer`."""
        super().train(mode)
        if self.mode_observer is not None:
            self.mode_observer(mode)
        return self

    @torch.no_grad()
    def assign(self, assignment: torch.Tensor, prototypes: torch.Tensor | None = None) -> None:
        """Give each class c the prototype `assignment[c]`, in place.

        Args:
            assignment: (C,) whole numbers in 0..K-1, no two the same.
            prototypes: (K, d) unit rows that take the place of the head's, which `align_prototypes` has rotated.

        Raises:
            ValueError: They are not that. What was in force stays.
        """
        check_assignment(assignment, self.num_classes, len(self.prototypes))
        if prototypes is not None:
            check_prototypes(prototypes)
            if prototypes.shape != self.prototypes.shape:
                raise ValueError(f'prototypes must have the shape {tuple(self.prototypes.shape)}, '
                                 f'not {tuple(prototypes.shape)}.')
            self.prototypes.copy_(unit_rows(prototypes))
            # The seed alone does not make them again.
            self.config = replace(self.config, own_prototypes=True)
        self.assignment.copy_(assignment)

    @torch.no_grad()
    def place(self, vectors: torch.Tensor) -> None:
        """Move the prototype of each class to a row of `vectors`, (C, d) float32 unit rows, in place and unchecked."""
        self.prototypes.index_copy_(0, self.assignment, vectors)
        if not self.config.own_prototypes:
            self.config = replace(self.config, own_prototypes=True)

    @property
    def warming_up(self) -> bool:
        """Whether a warm-up is under way: the class vectors of training still move."""
        return self.placing or self.warmup_vectors is not None

    def save_pretrained(self, folder: str | os.PathLike, *, label_names: list[str] | None = None) -> None:
        """Write the head to a folder: see `timm_dl2pa.head_files.save_head`."""
        from .head_files import save_head
        save_head(self, folder, label_names=label_names or getattr(self, 'label_names', None))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs: Any) -> 'DL2PAHead':
        """Make the head of a folder or a Hub repository: see `timm_dl2pa.load_head`."""
        from .head_files import load_head
        return load_head(source, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the head alone to the Hugging Face Hub: see `timm_dl2pa.push_head_to_hub`."""
        from ..models.push import push_head_to_hub
        return push_head_to_hub(self, repo_id, **kwargs)

    def extra_repr(self) -> str:
        config = self.config
        return (f'in_features={config.in_features}, num_classes={config.num_classes}, dim={config.dim}, '
                f'num_prototypes={config.num_prototypes}, scale={config.scale:.4g}'
                + (', learn_scale=True' if config.learn_scale else '')
                + (", train_output='embeddings'" if config.train_output == 'embeddings' else ''))

    def __getstate__(self) -> dict[str, Any]:
        # Copies (deepcopy, pickle, an EMA) report to nobody: their embeddings are not the training's.
        return dict(self.__dict__, observer=None, mode_observer=None, feature_observer=None, warmup_vectors=None,
                    placing=False)

    def __getattr__(self, name: str) -> Any:
        # timm's --head-init-scale and --head-init-bias, and other code for linear classifiers, look for these two.
        if name in ('weight', 'bias'):
            raise AttributeError(f'a DL2PAHead has no {name}: its class vectors are fixed prototypes, so that there is '
                                 f'nothing to initialise or scale (--head-init-scale, --head-init-bias).')
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> 'DL2PAHead':
        before = {name: self._buffers[name] for name in ('prototypes', 'scale') if name in self._buffers}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(
            self,
            state_dict: dict[str, Any],
            prefix: str,
            local_metadata: dict[str, Any],
            *args: Any,
    ) -> None:
        # Everything is checked before anything is copied, the neck included, so that an error leaves the head whole.
        own = self.state_dict()
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise RuntimeError(
                    f'{prefix}{name} has the shape {tuple(value.shape)} in the state dict, but this head, with '
                    f'num_classes={self.num_classes}, num_prototypes={len(self.prototypes)}, dim={self.dim} and '
                    f'in_features={self.in_features}, has {tuple(own[name].shape)}. Make the head with the numbers '
                    f'of the saved one.')
        # With load_state_dict(assign=True) the given tensors themselves become the buffers: they need the right dtype.
        config = self.config
        try:
            # First: an average of checkpoints shows itself here, in words that say so.
            if 'assignment' in given:
                assignment = restore_whole_numbers(given['assignment'])
                check_assignment(assignment, self.num_classes, len(self.prototypes))
                state_dict[prefix + 'assignment'] = assignment.long()
            if 'prototypes' in given:
                check_prototypes(given['prototypes'])
                prototypes = state_dict[prefix + 'prototypes'] = unit_rows(given['prototypes'])
                if self.prototypes.is_meta or not torch.equal(prototypes.cpu(), self.prototypes.cpu()):
                    config = replace(config, own_prototypes=True)
            if 'scale' in given:
                state_dict[prefix + 'scale'] = given['scale'].float()
                # The config goes on telling how to build this head.
                config = replace(config, scale=float(given['scale']))
            if 'log_scale' in given and not math.isfinite(float(given['log_scale'])):
                raise ValueError(f'log_scale must be finite, not {float(given["log_scale"])}.')
        except ValueError as error:
            raise RuntimeError(f'the state dict does not fit the DL2PA head: {prefix}{error}') from None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.config = config


def heads_of(model: nn.Module) -> list[DL2PAHead]:
    """Return the DL2PA heads of a model, the main one first."""
    heads = [module for module in model.modules() if isinstance(module, DL2PAHead)]
    return sorted(heads, key=lambda head: head.auxiliary)
