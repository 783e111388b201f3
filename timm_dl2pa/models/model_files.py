"""A whole wrapped model in timm's own format: the config and weights of `timm.models.save_for_hf`, read with care."""
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from ..assignment import check_assignment
from ..files.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_finite,
    check_format,
    check_label_names,
    read_config,
    read_tensors,
    sha256_of,
)
from ..head import DL2PAConfig, head_prefixes, heads_of
from ..options import KINDS, PREFIX, is_kind
from ..prototypes import check_prototypes
from ..version import __version__
from .wrapping import REGISTRY_NAME, backbone_name, registry_options, wrap_dl2pa

__all__ = ['SavedModel', 'check_backbone', 'check_backbone_arguments', 'model_stage', 'read_model']

# Of what is ours in timm's config, under a key of its own.
_FORMAT = 1
_KEY = 'timm_dl2pa'

# What a model's config may say of its data, with the kinds of the values; the rest of timm's pretrained_cfg is the
# backbone's, or names files.
_SIZES = ('input_size', 'test_input_size', 'min_input_size', 'pool_size', 'test_pool_size')
_DATA = {**dict.fromkeys(_SIZES, list), 'mean': list, 'std': list, 'fixed_input_size': bool, 'num_classes': int,
         'crop_pct': (int, float), 'test_crop_pct': (int, float), 'interpolation': str, 'crop_mode': str,
         'license': str, 'label_descriptions': dict}
# A config's arguments may not name other weights than those beside it.
_REFUSED = {*inspect.signature(timm.create_model).parameters, 'features_only', 'file', 'url'} - {'kwargs'}


@dataclass(frozen=True)
class SavedModel:
    """What the config of a saved model says, checked.

    Attributes:
        backbone: Name of a timm model.
        arguments: Those that timm makes it with, beside `num_classes`.
        options: Those of `wrap_dl2pa`, but for the prototypes, which are among the weights.
        num_classes: C.
        data: Of timm's pretrained_cfg, what concerns images and labels.
        label_names: C names, or None; in `data` too, as timm has it.
        head: The head's config, where it was written down (timm's own functions do not).
        digest: The sha256 of the weights, likewise.
        versions: Of what wrote it, likewise.
    """
    backbone: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    num_classes: int
    data: dict[str, Any]
    label_names: list[str] | None
    head: DL2PAConfig | None
    digest: str | None
    versions: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Make the model, with random weights and prototypes that wait for those of the file. None are computed.

        Raises:
            ValueError: timm cannot make it.
        """
        options = dict(self.options)
        count, dim = options.pop('num_prototypes', None) or self.num_classes, options['dim']
        try:
            model = timm.create_model(self.backbone, num_classes=self.num_classes, **self.arguments)
            wrap_dl2pa(model, **options, prototypes=torch.eye(1, dim).expand(count, -1))
        except Exception as error:  # whatever a backbone does with arguments that it does not know
            wrote, have, why = self.versions.get('timm'), timm.__version__, str(error).rstrip('.')
            hint = f' It was written with timm {wrote}; this is {have}.' if wrote not in (None, have) else ''
            raise ValueError(f'timm cannot make {self.backbone!r} of {self.num_classes} classes with the arguments '
                             f'{self.arguments} and the head {self.options}: {why}.{hint}') from error
        model._model_args = {**self.arguments, **model._model_args}
        for head in heads_of(model):
            # Those that the config speaks of, not the ones that wait.
            head.config = replace(self.head or head.config, in_features=head.in_features)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **self.data, 'custom_load': False}
        model.label_names = self.label_names
        return model


def read_model(folder: Path, origin: str) -> tuple[SavedModel, dict[str, torch.Tensor]]:
    """Read the config and the weights of a model, checked before any model is made. Nothing is unpickled.

    The model is tried on PyTorch's meta device first, which costs no memory, whatever sizes the config asks for.

    Args:
        folder: Holds the two files.
        origin: How to call it in errors.

    Returns:
        What the config says, and the tensors by their names.

    Raises:
        ValueError: The config is not that of a DL2PA model, or of a newer format; it asks for files elsewhere; the
            weights are damaged, not those that the config asks for, not finite, or no head's.
    """
    saved = _read_saved(folder, origin)
    try:
        with torch.device('meta'):
            plan = saved.build()
    except ValueError as error:
        raise ValueError(f'{origin}: {error}') from error
    _check_head(saved, plan, origin)
    state = plan.state_dict()
    tensors = read_tensors(
        folder / WEIGHTS_NAME, origin, {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name for name, tensor in state.items() if not tensor.is_floating_point()}, saved.digest)
    for prefix in head_prefixes(tensors):
        config = plan.get_submodule(prefix.rstrip('.')).config
        try:
            check_prototypes(tensors[f'{prefix}prototypes'])
            check_assignment(tensors[f'{prefix}assignment'], config.num_classes, config.num_prototypes)
        except ValueError as error:
            raise ValueError(f'{origin}: {WEIGHTS_NAME}: {prefix}{error}') from None
    return saved, tensors


def _check_head(saved: SavedModel, plan: nn.Module, origin: str) -> None:
    """Raise a ValueError unless what is said of the head twice is the same."""
    if saved.head is None:
        return
    in_features = heads_of(plan)[0].in_features
    expected = {**registry_options(saved.head), 'in_features': saved.head.in_features,
                'num_classes': saved.head.num_classes}
    given = {**{PREFIX + name: value for name, value in saved.options.items()}, 'in_features': in_features,
             'num_classes': saved.num_classes}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(f'{origin}: {CONFIG_NAME} contradicts itself: {name} is {expected.get(name)!r} by its '
                             f'head, and {given.get(name)!r} by its other values.')


def check_backbone(name: Any) -> None:
    """Raise a ValueError unless a backbone's name is one of timm's registry: no folder, no repository, not ours."""
    if not isinstance(name, str) or name.partition('.')[0] == REGISTRY_NAME or not timm.is_model(name):
        raise ValueError(f'{PREFIX}backbone must be a name of timm\'s registry, as timm.list_models() has '
                         f'them, not {name!r}.')


def check_backbone_arguments(arguments: dict[str, Any]) -> None:
    """Raise a ValueError if arguments of a backbone name weights, which a config could do behind its user's back."""
    refused = sorted(name for name in arguments if name in _REFUSED or name.startswith('pretrained'))
    if refused:
        raise ValueError(f'{refused[0]}={arguments[refused[0]]!r} cannot be among the arguments of a saved model: its '
                         f'weights are those beside its {CONFIG_NAME}, and no others.')


def _read_saved(folder: Path, origin: str) -> SavedModel:
    config = read_config(folder, origin)
    where = f'{origin}: {CONFIG_NAME}'
    if config.get('architecture') != REGISTRY_NAME:
        name = config.get('architecture')
        hint = ' It is that of a head alone: load it with load_head.' if config.get('library_name') == _KEY else \
            " It is a plain timm model: load it with timm.create_model('hf-hub:...')." \
            if isinstance(name, str) and timm.is_model(name) else ''
        raise ValueError(f'{where} is not that of a DL2PA model: its architecture is {name!r}, '
                         f'not {REGISTRY_NAME!r}.{hint}')
    data, arguments, ours = (config.get(name) or {} for name in ('pretrained_cfg', 'model_args', _KEY))
    for name, value in (('pretrained_cfg', data), ('model_args', arguments), (_KEY, ours)):
        if not isinstance(value, dict):
            raise ValueError(f'{where}: {name} must not be {value!r}.')
    arguments = dict(arguments)
    try:
        check_backbone(arguments.pop(f'{PREFIX}backbone', None))
        check_backbone_arguments(arguments)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    num_classes = config.get('num_classes', data.get('num_classes'))
    if not is_kind(num_classes, int) or arguments.pop('num_classes', num_classes) != num_classes:
        raise ValueError(f'{where} does not say, once and for all, how many classes there are.')
    label_names = config.get('label_names', data.get('label_names'))
    check_label_names(label_names, num_classes, f'{where}: label_names')
    options = {name.removeprefix(PREFIX): arguments.pop(name) for name in list(arguments)
               if name.startswith(PREFIX)}
    options.pop('prototypes', None)  # a file of the one who made the model: they are among the weights
    defaults = {name: parameter.default for name, parameter in inspect.signature(wrap_dl2pa).parameters.items()}
    for name, value in options.items():
        if name not in KINDS or name not in defaults or not (is_kind(value, KINDS[name]) or value is defaults[name]):
            raise ValueError(f'{where}: {PREFIX}{name} must not be {value!r}.')
    head = versions = digest = None
    if ours:
        check_format(ours.get('format'), _FORMAT, origin)
        if not isinstance(ours.get('head'), dict):
            raise ValueError(f'{where}: {_KEY} has no head.')
        head = DL2PAConfig.from_json(ours['head'], where)
        versions, digest = ours.get('versions'), ours.get('weights_sha256')
        if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
            raise ValueError(f'{where}: versions must not be {versions!r}.')
        if not isinstance(digest, str | None):
            raise ValueError(f'{where}: weights_sha256 must not be {digest!r}.')
    return SavedModel(
        backbone=config['model_args'][f'{PREFIX}backbone'],
        arguments=arguments,
        options={'dim': defaults['dim'], **options},
        num_classes=num_classes,
        data=_data(data, where) | {'num_classes': num_classes, 'label_names': label_names},
        label_names=label_names,
        head=head,
        digest=digest,
        versions=versions or {},
    )


def _data(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what a pretrained_cfg says of images and labels, checked."""
    data = {name: given[name] for name in _DATA if given.get(name) is not None}
    for name, value in data.items():
        parts = value if isinstance(value, list) else [value]
        numbers = (int,) if name in _SIZES else (int, float)
        fine = is_kind(value, _DATA[name])
        if name in _SIZES or name in ('mean', 'std', 'crop_pct', 'test_crop_pct'):
            fine = fine and all(is_kind(part, numbers) and abs(part) < 10 ** 9 and math.isfinite(part)
                                for part in parts) and 1 <= len(parts) <= 5
        if name in ('input_size', 'test_input_size', 'min_input_size'):
            fine = fine and len(parts) == 3
        if not fine:
            raise ValueError(f'{where}: {name} must not be {value!r}.')
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


@contextmanager
def model_stage(
        model: nn.Module,
        *,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        label_names: list[str] | None = None,
        parent: str | os.PathLike | None = None,
) -> Iterator[Path]:
    """Write a model's two files to a folder that is removed again, once timm has made the same model from them.

    Args:
        model: A wrapped model, or a folded one.
        model_args: The arguments that `timm.create_model` made the backbone with, where timm does not know them.
        data_config: How images are prepared.
        label_names: C names of the classes.
        parent: Where the folder is made.

    Yields:
        The folder.

    Raises:
        ValueError: timm does not know what made the model, a tensor is not finite, the number of names is not C, the
            arguments are no JSON values, or the files make another model.
    """
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        raise ValueError(f'model ({type(model).__name__}) was not made by timm.create_model, so that timm could not '
                         f'make it again: save or push the head alone.')
    label_names = None if label_names is None else list(label_names)
    check_label_names(label_names, model.num_classes, 'label_names')
    # Copies: safetensors takes neither shared memory nor other strides.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    check_finite(state, 'the model')
    with TemporaryDirectory(prefix='.part-', dir=parent) as place:
        folder = Path(place)
        save_file(state, folder / WEIGHTS_NAME, metadata={'format': 'pt'})
        config = _config(model, model_args or {}, data_config, label_names, folder)
        _check_that_timm_makes_it(state, config.get('model_args', {}), folder)
        yield folder


def _config(
        model: nn.Module,
        model_args: dict[str, Any],
        data_config: dict[str, Any] | None,
        label_names: list[str] | None,
        folder: Path,
) -> dict[str, Any]:
    """Write the config as timm does, with what is ours; return it."""
    heads = heads_of(model)
    ours = {**registry_options(heads[0].config), f'{PREFIX}backbone': backbone_name(model)} if heads else {}
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise ValueError(f'model_args must be JSON values: {error}.') from None
    options = {'data_config': data_config} if data_config else {}
    if options and 'data_config' not in inspect.signature(save_config_for_hf).parameters:
        raise ValueError(f'data_config needs timm 1.0.31 or newer, not {timm.__version__}.')
    # timm adds what it has recorded: of ours, also what concerns training and a file of prototypes.
    recorded = [name for name in getattr(model, '_model_args', {}) if name.startswith(PREFIX)]
    path = folder / CONFIG_NAME
    extra: dict[str, Any] = {'label_names': label_names} if label_names else {}
    if heads:
        extra[_KEY] = {
            'format': _FORMAT,
            'head': asdict(heads[0].config),
            'weights_sha256': sha256_of(folder / WEIGHTS_NAME),
            'versions': {_KEY: __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
        }
    save_config_for_hf(model, path, model_config=extra, model_args={**dict.fromkeys(recorded), **ours, **model_args},
                       **options)
    config = json.loads(path.read_text(encoding='utf-8'))
    arguments = {name: value for name, value in (config.get('model_args') or {}).items()
                 if name in ours or not name.startswith(PREFIX)}
    config['model_args'] = arguments
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    return config


def _check_that_timm_makes_it(state: dict[str, torch.Tensor], arguments: dict[str, Any], folder: Path) -> None:
    remedy = 'Give model_args, those of timm.create_model.'
    with torch.random.fork_rng(devices=[]):
        try:
            again = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
        except Exception as error:
            raise ValueError(f'timm cannot make the model again, with the arguments {arguments}: '
                             f'{str(error).rstrip(".")}. {remedy}') from error
    for name in sorted(state.keys() | again.keys()):
        if name not in state or name not in again or state[name].shape != again[name].shape or not torch.equal(
                state[name], again[name].cpu().to(state[name].dtype)):
            raise ValueError(f'timm makes another model, with the arguments {arguments}: {name} differs. {remedy}')
