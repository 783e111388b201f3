"""DL2PAHead: neck, unit embeddings, and logits against fixed prototypes under an assignment."""
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..assignment import check_assignment
from ..distributed import copy_from_rank_0, is_distributed
from ..files.saving import SavedModule
from ..prototypes import check_prototypes, load_prototypes, unit_rows
from ..recipes import DEFAULT_RECIPE, NeckName, RecipeName, find_recipe
from ..values import checked_value, whole_number
from . import numerics
from .averages import buffer_stamps, digits_of, settle_average
from .buffers import restore_float32
from .config import DL2PAConfig, TrainOutput
from .loading import check_scale_in_file, check_state
from .nearest import nearest_classes
from .neck import load_neck, make_neck
from .view import TrainingView

__all__ = ['DL2PAHead']


class DL2PAHead(SavedModule, nn.Module):
    """A classifier head whose class vectors are fixed prototypes on the unit sphere.

    An embedding z is the neck's output divided by its length. The logit of class c is `scale * <z, p_a(c)>`, where p_k
    are the prototypes and a the assignment (DL2PA, section 3). Lengths, cosines and logits are computed in float32,
    under autocast and in a bfloat16 or float16 model too; an embedding of length zero has logits and gradients zero.

    Buffers, both in the state dict: `prototypes` (K, d) float32, which stay float32 when the model's dtype changes, and
    `assignment` (C,) int64, the prototype of each class. `scale`, () float32, is a buffer too, or comes from the
    parameter `log_scale`, (1,), if it is learned. (FSDP2 shards no parameter without dimensions.) `averaged_assignment`
    (4, C) float32, not saved, lets averages that go over all buffers keep the assignment: see `settle_average`.

    In a timm model, `before` holds the layers of timm's classifier that come before its last, linear one (most often
    none). With `channels_first`, in the place of a 1x1 convolution, maps (B, in_features, H, W) become maps of logits
    (B, C, H, W); elsewhere any number of dimensions may come before the features. `auxiliary` marks every
    head but the main one.

    `training_view` is what a training sees of the head: see `TrainingView`. During a warm-up class vectors of its own
    may stand in for the prototypes in training mode.

    Args:
        in_features: Number of backbone features.
        num_classes: C, at least 2.
        dim: d, which may be far smaller than C.
        num_prototypes: K >= C. Default: the number of rows of `prototypes` if they are given, otherwise C.
        prototypes: (K, d) unit rows of your own, or a safetensors file of them (see `load_prototypes`). Default: the
            best set that about two seconds give, `make_prototypes(num_prototypes, dim, method='quick', seed=seed)`. Up
            to some hundred classes nothing is better; beyond, `make_prototypes(num_prototypes, dim, progress=True)` is
            a little more even, after half a minute or (with `effort`) more.
        recipe: 'placed', 'even' or 'paper': sets neck, scale and the first assignment, and what an
            `AssignmentScheduler` does (`timm_dl2pa.recipes.RECIPES`).
        neck: 'linear', 'linear_bn' (batch norm after it), or 'none', which needs `dim == in_features`. Default: the
            recipe's.
        scale: Factor on the cosines. Default: `default_scale(num_classes)`, the bound of CosFace; learned, from 4 on.
        learn_scale: Make the scale a parameter, in the log domain so that it stays positive. With cross-entropy that
            learns much better than a fixed scale: a large scale asks a young network for probabilities near one, which
            unit embeddings in few dimensions cannot give. Default: the recipe's, where no scale is given.
        train_output: 'logits', or 'embeddings' for a loss of this package at very many classes: the (B, C) logits are
            then made in evaluation mode only. A learned scale needs a `SampledCrossEntropyLoss` then.
        seed: Seed of the prototypes, and of a random first assignment. The neck's weights are drawn as PyTorch draws
            those of any layer.
        device: Where parameters and buffers are made.
        dtype: Of the parameters.

    Raises:
        ValueError: An argument is out of range, two exclude each other, or the prototypes are not finite unit rows.

    Example:
        >>> head = DL2PAHead(in_features=512, num_classes=100, dim=50)
        >>> head(torch.randn(8, 512)).shape
        torch.Size([8, 100])
    """

    prototypes: torch.Tensor
    assignment: torch.Tensor
    averaged_assignment: torch.Tensor
    scale: torch.Tensor  # unless it is learned
    log_scale: nn.Parameter  # if the scale is learned
    config_class = DL2PAConfig
    _is_replica = False  # set in the replicas of nn.DataParallel
    whole_numbers: ClassVar[tuple[str, ...]] = ('assignment', 'neck.1.num_batches_tracked')
    # TorchScript compiles properties, and knows no configs.
    __jit_unused_properties__: ClassVar[tuple[str, ...]] = (
        'in_features', 'num_classes', 'dim', 'train_output', 'class_prototypes', 'warming_up')

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            dim: int,
            *,
            num_prototypes: int | None = None,
            prototypes: torch.Tensor | str | os.PathLike[str] | None = None,
            recipe: RecipeName = DEFAULT_RECIPE,
            neck: NeckName | None = None,
            scale: float | None = None,
            learn_scale: bool | None = None,
            train_output: TrainOutput = 'logits',
            seed: int = 0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_classes = checked_value('num_classes', num_classes, int)
        dim = checked_value('dim', dim, int)
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
        self.config: DL2PAConfig = DL2PAConfig(
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
            recipe=recipe,
        )
        given = prototypes is not None
        device = torch.empty(0, device=device).device  # the default device where none is given
        if not given:
            # On the meta device tensors have shapes alone, and are given their values later.
            prototypes = torch.empty(self.config.num_prototypes, dim, device=device) if device.type == 'meta' \
                else self.config.first_prototypes()
        self.neck: nn.Module = make_neck(self.config.neck, self.config.in_features, dim, device=device, dtype=dtype)
        if self.config.learn_scale:
            self.log_scale = nn.Parameter(torch.tensor([math.log(self.config.scale)], device=device, dtype=dtype))
        else:
            self.register_buffer('scale', torch.tensor(self.config.scale, device=device, dtype=torch.float32))
        self.register_buffer('prototypes', prototypes.to(device, torch.float32, copy=given))
        self.register_buffer('assignment', self._first_assignment(device))
        self.register_buffer('averaged_assignment', digits_of(self.assignment), persistent=False)
        self._stamps = buffer_stamps(self)
        self.before: nn.Module = nn.Identity()
        self.channels_first = False
        self.auxiliary = False
        self.label_names: list[str] | None = None
        self.training_view: TrainingView = TrainingView()

    def _first_assignment(self, device: torch.device) -> torch.Tensor:
        if not find_recipe(self.config.recipe).random_start:
            return torch.arange(self.num_classes, device=device)
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(self.config.num_prototypes, generator=generator, device='cpu')
        return order[:self.num_classes].to(device)

    @classmethod
    def from_config(cls, config: DL2PAConfig, prototypes: torch.Tensor | None = None, **kwargs: Any) -> 'DL2PAHead':
        """Build a head from its config, and from its prototypes where they are at hand: then none are computed.

        Raises:
            ValueError: The config says that the prototypes were given, and they are not.
        """
        if config.own_prototypes and prototypes is None:
            raise ValueError('this head was made with prototypes of its own: pass them as prototypes=.')
        arguments = dict(vars(config), prototypes=prototypes, **kwargs)
        for kept in ('own_prototypes', 'pinned', 'held_scale'):
            del arguments[kept]
        head = cls(**arguments)
        head.config = config
        return head

    @classmethod
    def from_tensors(cls, config: DL2PAConfig, tensors: dict[str, torch.Tensor]) -> 'DL2PAHead':
        """Build a head from its config and its state dict, whose tensors become its own. Draws no random numbers.

        Raises:
            RuntimeError: The tensors are no head's.
            ValueError: Config and tensors contradict each other.
        """
        with torch.random.fork_rng(devices=[]):
            head = cls.from_config(config, torch.eye(config.dim)[:1].expand(config.num_prototypes, -1))
        head.load_state_dict(tensors, assign=True)
        check_scale_in_file(config, tensors)
        head.config = config  # to the digit, where the buffer is rounded
        return head

    def with_classes(self, num_classes: int) -> 'DL2PAHead':
        """Return a head for another number of classes on the neck of this one: prototypes and assignment are new.

        Args:
            num_classes: C, at least 2.

        Raises:
            ValueError: It is less; or the neck has tensors of another tool, such as a parametrisation's.
        """
        like = next(self.neck.parameters(), self.prototypes)
        with torch.random.fork_rng(devices=[]):
            other = DL2PAHead.from_config(self.config.for_classes(num_classes), device=like.device, dtype=like.dtype)
        if not load_neck(other.neck, self.neck.state_dict()):
            raise ValueError('the neck of this head has other tensors than it was made with: take off what was put '
                             'around it (remove_parametrizations of torch.nn.utils.parametrize, remove of '
                             'torch.nn.utils.prune, merge_and_unload of PEFT).')
        if hasattr(self, 'log_scale'):
            other.log_scale.data.copy_(self.log_scale.data)
        return other

    def check_saved_alone(self) -> None:
        """Raise a ValueError where layers of the backbone's own classifier stand before the neck."""
        self.settle()
        if any(True for _ in self.before.parameters()) or any(True for _ in self.before.buffers()):
            raise ValueError('layers of the backbone\'s classifier stand before the neck of this head (head.before), '
                             'and are part of the model: save the whole model.')

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
    def train_output(self) -> TrainOutput:
        return self.config.train_output

    @property
    def class_prototypes(self) -> torch.Tensor:
        """The prototype of each class, (C, d) float32."""
        return self.prototypes[self.assignment]

    def current_scale(self) -> torch.Tensor:
        """Return the factor on the cosines, () float32.

        A learned one has a hundredth of its gradient, and where `prime` has set it a gradient of zero. (None at all is
        what DistributedDataParallel would wait for. A scripted head knows no config, and goes on learning its scale.)
        """
        if not hasattr(self, 'log_scale'):
            return self.scale
        if torch.jit.is_scripting():
            return numerics.slowly_learned(self.log_scale.float()).exp().squeeze(0)
        else:
            factor = numerics.SCALE_GRADIENT if self.config.held_scale is None else 0.0
            return numerics.slowly_learned(self.log_scale.float(), factor).exp().squeeze(0)

    def hold_scale(self, scale: float | None) -> None:
        """Set a scale that is learned, and leave it so in training; None: let it be learned again, from where it is."""
        self.config = replace(self.config, held_scale=scale)
        self.restore_scale()

    @torch.no_grad()
    def restore_scale(self) -> None:
        """Undo what weight decay and an optimiser's momentum have done to a scale that is held."""
        log_scale = self._parameters.get('log_scale')
        # One that FSDP has sharded is no plain tensor, or none of the head's parameters.
        if self.config.held_scale is not None and log_scale is not None and type(log_scale.data) is torch.Tensor:
            log_scale.fill_(math.log(self.config.held_scale))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (B, d), float32, of features (B, in_features); maps of maps, as `forward` takes them.
        """
        embeddings = numerics.unit_embeddings(self.neck(self._features(x)))
        return numerics.rows_as_maps(embeddings, x) if self.channels_first else embeddings

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self.before(numerics.maps_as_rows(x) if self.channels_first else x)

    def cosines(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the cosines (B, C), float32, of unit embeddings (B, d) with the prototype of each class.

        In training mode they are those with the `class_vectors` of the training view, where it has some.
        """
        vectors = self.prototypes[self.assignment]
        if torch.jit.is_scripting():
            return numerics.cosines(embeddings, vectors)
        else:
            if self.training and self.training_view.class_vectors is not None:
                vectors = self.training_view.class_vectors
            return numerics.cosines(embeddings, vectors)

    def vectors_of(self, classes: torch.Tensor) -> torch.Tensor:
        """Return the class vectors (n, d), float32, that `cosines` uses of some classes (n,) int64, without the others.

        Raises:
            IndexError, RuntimeError: On the CPU, a class is below 0 or above C - 1.
        """
        if self.training and self.training_view.class_vectors is not None:
            return self.training_view.class_vectors.index_select(0, classes)
        # gather refuses negative numbers, which brackets would take.
        return self.prototypes[self.assignment.gather(0, classes)]

    @torch.no_grad()
    def nearest(self, embeddings: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k classes of the largest cosines with each embedding: evaluation at very many classes.

        No (N, C) matrix is made: beyond the answer, memory does not depend on the numbers of embeddings and classes.

        Args:
            embeddings: (N, d) unit rows, as `embed` returns them.
            k: From 1 to C.

        Returns:
            The cosines (N, k) float32, the largest first, and the classes (N, k) int64. The logits are the cosines
            times `current_scale()`. Of equal cosines, any may come first.

        Raises:
            ValueError: The shape or dtype does not fit, or k is out of range.

        Example:
            >>> cosines, classes = head.nearest(head.embed(features), k=5)
            >>> classes.shape
            torch.Size([8, 5])
        """
        if not isinstance(embeddings, torch.Tensor) or embeddings.shape[1:] != (self.dim,) \
                or not embeddings.is_floating_point():
            what = f'{embeddings.dtype} of the shape {tuple(embeddings.shape)}' \
                if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
            raise ValueError(f'embeddings must be floats (N, {self.dim}), as embed returns them, not {what}.')
        k = whole_number('k', k, 1, self.num_classes)
        if not self.training:
            self.settle()
        return nearest_classes(numerics.plain_tensor(embeddings), self.vectors_of, self.num_classes, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C), float32; or unit embeddings (B, d) in training with `train_output='embeddings'`."""
        if torch.jit.is_scripting():
            pass
        else:
            if self.prototypes.dtype != torch.float32:
                restore_float32(self)
                self.config = replace(self.config, own_prototypes=True)
            if not self.training and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
                self.settle()
        features = self._features(x)
        embeddings = numerics.unit_embeddings(self.neck(features))
        if torch.jit.is_scripting():
            out = self.cosines(embeddings) * self.current_scale()
            return numerics.rows_as_maps(out, x) if self.channels_first else out
        else:
            scale = self.current_scale()
            if self.training and self.train_output == 'embeddings':
                out = embeddings
                if self.config.learn_scale:
                    # The loss multiplies by it. DistributedDataParallel looks for parameters in use behind the output.
                    out = embeddings + 0.0 * scale
            else:
                out = self.cosines(embeddings) * scale
            if self.channels_first:
                out = numerics.rows_as_maps(out, x)
            self.training_view.hear(features, embeddings, out, scale, training=self.training, replica=self._is_replica)
            return out

    def settle(self) -> None:
        """Make the average of heads (EMA, SWA) a head again; of a head that nobody wrote into, nothing is read.

        Evaluation calls it, and saving does.

        Raises:
            ValueError: The average has no meaning: see `settle_average`.
        """
        if buffer_stamps(self) != self._stamps and not self.prototypes.is_meta and settle_average(self):
            self.config = replace(self.config, own_prototypes=True)

    def train(self, mode: bool = True) -> 'DL2PAHead':
        """Set the mode, and tell the training view."""
        super().train(mode)
        if not mode:
            self.settle()
        if self.training_view.on_mode is not None:
            self.training_view.on_mode(mode)
        return self

    @torch.no_grad()
    def assign(self, assignment: torch.Tensor, prototypes: torch.Tensor | None = None) -> None:
        """Give each class c the prototype `assignment[c]`.

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
            self._replace('prototypes', unit_rows(prototypes))
            # The seed alone does not make them again.
            self.config = replace(self.config, own_prototypes=True)
        self._replace('assignment', assignment)
        self._replace('averaged_assignment', digits_of(self.assignment))
        self._stamps = buffer_stamps(self)

    @torch.no_grad()
    def move_class_prototypes(self, vectors: torch.Tensor, classes: torch.Tensor | None = None) -> None:
        """Replace the prototypes of classes (n,) int64, all by default, by `vectors`, (n, d) float32 unit rows; both
        unchecked. Where a class occurs twice, so must its vector."""
        rows = self.assignment if classes is None else self.assignment[classes]
        if self.training_view.compiled:
            self._replace('prototypes', self.prototypes.index_copy(0, rows, vectors))
        else:  # only the rows that move
            self.prototypes.index_copy_(0, rows, vectors)
        if not self.config.own_prototypes:
            self.config = replace(self.config, own_prototypes=True)

    @torch.no_grad()
    def copy_from_rank_0(self) -> None:
        """Take over the prototypes and the assignment of rank 0. In a distributed run every process must call it."""
        if not is_distributed():
            return
        for name in ('prototypes', 'assignment'):
            value = self._buffers[name]
            if self.training_view.compiled:  # see `_replace`
                value = self._buffers[name] = value.clone()
            copy_from_rank_0(value)
        self._replace('averaged_assignment', digits_of(self.assignment))
        self._stamps = buffer_stamps(self)

    def _replace(self, name: str, value: torch.Tensor) -> None:
        """Give a buffer new values: in place, as recorded CUDA graphs need it. Only after a compiled forward, which may
        keep the buffer itself for its backward pass, a new tensor takes its place."""
        buffer = self._buffers[name]
        if self.training_view.compiled:
            self._buffers[name] = value.to(buffer, copy=True)
        else:
            buffer.copy_(value)

    @property
    def warming_up(self) -> bool:
        """Whether a warm-up is under way: the class vectors of training still move."""
        return self.training_view.warming_up

    def init_non_persistent_buffers(self) -> None:
        """Follow tensors that were put in place one by one: transformers' `from_pretrained` does that, and then calls
        this by timm's name for it. Waits for the device."""
        if self.prototypes.is_meta:
            return
        self.averaged_assignment = digits_of(self.assignment)
        self._stamps = buffer_stamps(self)
        self.config = replace(self.config, own_prototypes=True)
        if not hasattr(self, 'log_scale') and not torch.equal(self.scale, self.scale.new_tensor(self.config.scale)):
            self.config = replace(self.config, scale=float(self.scale))

    def extra_repr(self) -> str:
        config = self.config
        return (f'in_features={config.in_features}, num_classes={config.num_classes}, dim={config.dim}, '
                f'num_prototypes={config.num_prototypes}, scale={config.scale:.4g}'
                + (', learn_scale=True' if config.learn_scale else '')
                + (", train_output='embeddings'" if config.train_output == 'embeddings' else ''))

    def __getstate__(self) -> dict[str, Any]:
        # Copies (deepcopy, pickle, an EMA) report to nobody: their embeddings are not the training's.
        return dict(self.__dict__, training_view=TrainingView())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stamps = buffer_stamps(self)

    def __getattr__(self, name: str) -> Any:
        # timm's --head-init-scale, --head-init-bias and --test-pool, and other code for linear classifiers, look for
        # these two.
        if name in ('weight', 'bias'):
            raise AttributeError(f'a DL2PAHead has no {name}: its class vectors are fixed prototypes, so that there is '
                                 f'nothing to initialise or scale (--head-init-scale, --head-init-bias). For what '
                                 f'needs a linear classifier (--test-pool), fold the model first: timm-dl2pa fold, or '
                                 f'fold_dl2pa.')
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> 'DL2PAHead':
        before = {name: self._buffers[name] for name in ('prototypes', 'scale', 'averaged_assignment')
                  if name in self._buffers}
        untouched = [now == then for now, then in zip(buffer_stamps(self), self._stamps)]
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self._stamps = tuple(stamp if same else -1 for stamp, same in zip(buffer_stamps(self), untouched))
        view = self.training_view
        if view.class_vectors is not None:
            view.class_vectors = view.class_vectors.to(self.prototypes.device)
        return self

    def _load_from_state_dict(
            self,
            state_dict: dict[str, Any],
            prefix: str,
            local_metadata: dict[str, Any],
            *args: Any,
    ) -> None:
        own = self.state_dict()
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        loaded, config = check_state(self.config, own, given, prefix)
        state_dict.update((prefix + name, value) for name, value in loaded.items())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.averaged_assignment = digits_of(self.assignment)
        self._stamps = buffer_stamps(self)
        self.config = config
