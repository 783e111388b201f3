"""add_classes: new classes for a trained model, on prototypes that no class has yet."""
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn as nn

from ..assignment import solve_assignment
from ..distributed import solve_on_rank_0
from ..files.labels import read_label_names
from ..head import DL2PAHead, extend_head, free_prototypes, heads_of
from ..prototypes.spare import spread_spare
from ..scheduling.neck_fit import refuse_sharded
from ..scheduling.new_means import gather_new_means, means_found
from ..values import plain_value, whole_number
from .wrapping import Model, record_registry_entry

__all__ = ['add_classes']

Place = Literal['mean', 'free']
# Class vectors with a larger cosine are as good as one.
_SAME = 0.99


def add_classes(
        model: Model,
        data: Iterable[Any] | tuple[torch.Tensor, torch.Tensor],
        names: Sequence[str] | int,
        *,
        place: Place = 'mean',
) -> Model:
    """Give a trained model new classes, on prototypes that no class has yet, in place. Nothing is trained.

    A head with `num_prototypes > num_classes` has spare prototypes. Each new class gets one, by the mean direction of
    its embeddings: of all ways to hand them out, the one with the largest sum of cosines. The old classes keep theirs,
    and their logits (to rounding). The model then has C + n classes; the new ones are the classes C..C+n-1.

    With `place='mean'` the prototype moves to that mean direction, so that the model classifies new images at once, as
    the nearest class mean does. With `place='free'` it stays where old classes are far, and the new class is recognised
    only after some training of the neck, with images of old and new classes. In many dimensions that then ends higher.
    Before that, with the recipe 'placed', the spare prototypes are spread anew beside those that classes have.

    What was made with the model's C classes is out of date: an `AssignmentScheduler` (`step` says so), EMA copies,
    losses with class counts or weights. An optimiser goes on: the parameters are the same.

    Args:
        model: A wrapped model (also inside DistributedDataParallel or PEFT), or a head. A few images a class suffice.
        data: Batches of images and labels as for `prime`, or a pair of tensors: features (N, F), as `head.embed` takes
            them, and labels (N,). Labels number the new classes from 0, in the order of `names`. In a distributed run
            every process gives its own part.
        names: The names of the n new classes where the model has names of its classes, otherwise n.
        place: 'mean' or 'free'.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no DL2PA head, too few spare prototypes, heads that differ, or is sharded; a warm-up
            is under way; a new class has no sample; labels or names do not fit. The model was not changed.

    Example:
        >>> model = wrap_dl2pa(timm.create_model('resnet50', num_classes=10), dim=8, num_prototypes=16)
        >>> new_images, new_labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> model = add_classes(model, [(new_images, new_labels)], 2)
        >>> model(images).shape
        torch.Size([8, 12])
    """
    heads = _heads_with_one_assignment(model)
    if place not in get_args(Place):
        raise ValueError(f'place must be one of {", ".join(get_args(Place))}, not {place!r}.')
    wrapped = next((module for module in model.modules() if 'reset_classifier' in vars(module)), None)
    num_new, label_names = _read_names(names, heads[0], getattr(wrapped or heads[0], 'label_names', None))
    _check_room(heads[0], num_new)
    refuse_sharded(model, 'add_classes')
    inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    inner = getattr(inner, '_orig_mod', inner)  # not what torch.compile recorded
    means = gather_new_means(inner, heads, data, num_new)
    rows, prototypes = solve_on_rank_0(lambda: _placed(heads[0], means_found(means), place),
                                       heads[0].prototypes.device)
    for head in heads:
        extend_head(head, rows, prototypes)
        head.label_names = label_names
    if wrapped is not None:
        _tell(wrapped, heads[0], label_names)
    return model


def _heads_with_one_assignment(model: nn.Module) -> list[DL2PAHead]:
    heads = heads_of(model)
    if not heads:
        raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
    for head in heads:
        head.settle()  # an average, as of EMA weights
        if head.warming_up:
            raise ValueError('the warm-up of the model is under way, and still moves its prototypes: train to its end, '
                             'or call scheduler.skip_warmup(), before classes are added.')
        if not (torch.equal(head.assignment, heads[0].assignment) and torch.equal(head.prototypes,
                                                                                  heads[0].prototypes)):
            raise ValueError('the DL2PA heads of the model differ in prototypes or assignment, which all heads of a '
                             'model share: add the classes to each head, with its features.')
    return heads


def _read_names(names: Sequence[str] | int, head: DL2PAHead, old: list[str] | None) -> tuple[int, list[str] | None]:
    """Return the number of new classes, and the names of all classes or None."""
    if isinstance(plain_value(names), int):
        if old is not None:
            raise ValueError(f'names must be those of the new classes, not {names!r}: the model has names of its '
                             f'{head.num_classes} classes.')
        return whole_number('names', names, least=1), None
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)) or not len(names):
        raise ValueError(f'names must be a list of names of new classes, or their number, not {names!r:.80}.')
    names = read_label_names(names, len(names), 'names')
    if old is None:
        raise ValueError(f'the model has no names of its {head.num_classes} classes, to which names could be added: '
                         f'give the number of new classes, names={len(names)}, or set model.label_names first.')
    old = read_label_names(old, head.num_classes)
    for number, name in enumerate(names):
        if name in old or name in names[:number]:
            raise ValueError(f'names must be new, and different: {name!r} is '
                             + (f'class {old.index(name)} of the model.' if name in old else 'there twice.'))
    return len(names), [*old, *names]


def _check_room(head: DL2PAHead, num_new: int) -> None:
    spare, needed = head.config.num_prototypes - head.num_classes, head.num_classes + num_new
    if num_new > spare:
        raise ValueError(f'names are {num_new} new classes, but the head has {spare} spare prototypes, as many as '
                         f'num_prototypes={head.config.num_prototypes} exceeds num_classes={head.num_classes}. Train '
                         f'the model with a larger one, wrap_dl2pa(model, num_prototypes={needed}) or more; or call '
                         f'model.reset_classifier({needed}), and train or prime it with all classes.')


def _placed(head: DL2PAHead, means: torch.Tensor, place: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows of the prototypes for new classes with mean directions (n, d), and the set if it changed."""
    free, prototypes = free_prototypes(head).cpu(), head.prototypes.cpu()
    moves = place == 'mean'
    if place == 'free' and head.config.recipe == 'placed' and not head.config.pinned:
        # A placed warm-up moved those of the classes, and has left these where they were.
        prototypes, moves = spread_spare(prototypes, free), True
    rows = free[solve_assignment(class_means=means, prototypes=prototypes[free]).assignment]
    if place == 'mean':
        prototypes = prototypes.index_copy(0, rows, means.float())
        _warn_of_same(head, means.float())
    return rows, prototypes if moves else None


def _warn_of_same(head: DL2PAHead, means: torch.Tensor) -> None:
    """Warn where two classes cannot be told apart."""
    vectors = torch.cat([head.class_prototypes.cpu(), means])
    cosines = means @ vectors.t()
    cosines[torch.arange(len(means)), head.num_classes + torch.arange(len(means))] = -1
    closest, other = cosines.max(dim=1)
    if bool((closest > _SAME).any()):
        number = int((closest > _SAME).nonzero()[0])
        warnings.warn(f'the embeddings of new class {number} lie where class {int(other[number])} has its prototype '
                      f'(cosine {float(closest[number]):.3f}): is it the same class? The model cannot tell them apart.',
                      stacklevel=6)


def _tell(wrapped: nn.Module, head: DL2PAHead, label_names: list[str] | None) -> None:
    """Let the attributes of a timm model say that it has the classes of its head."""
    wrapped.num_classes, wrapped.label_names = head.num_classes, label_names
    record_registry_entry(wrapped, head.config)
    cfg = getattr(wrapped, 'pretrained_cfg', None)
    if isinstance(cfg, dict) and 'label_names' in cfg:  # of a saved model, whose classes they were
        cfg.update(num_classes=head.num_classes, label_names=label_names, label_descriptions=None)
