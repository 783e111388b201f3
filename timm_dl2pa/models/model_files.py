"""Read the files of a whole wrapped model in timm's own format: check and read config and weights."""
import inspect
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..assignment import check_assignment
from ..files.folder import CONFIG_NAME, WEIGHTS_NAME, check_format, read_config
from ..files.labels import read_label_names
from ..files.tensors import read_header, read_tensors
from ..head import DL2PAConfig, check_same_assignment, check_scale_in_file, head_prefixes, heads_of
from ..options import KINDS, PREFIX
from ..prototypes import check_prototypes
from ..values import is_kind
from .budget import BuildBudget
from .wrapping import REGISTRY_NAME, registry_options, wrap_dl2pa

__all__ = ['FORMAT', 'PACKAGE_KEY', 'SavedModel', 'check_backbone', 'check_backbone_arguments', 'check_model',
           'names_weights', 'read_model']

# The key of this package's part of timm's config, and the number of its format.
PACKAGE_KEY = 'timm_dl2pa'
FORMAT = 1

# The entries of timm's pretrained_cfg that concern images and labels, with the types of their values. The other entries
# belong to the backbone or name files, and are ignored.
_SIZE_ENTRIES = ('input_size', 'test_input_size', 'min_input_size', 'pool_size', 'test_pool_size')
_DATA_ENTRIES = {
    **dict.fromkeys(_SIZE_ENTRIES, list), 'mean': list, 'std': list, 'fixed_input_size': bool, 'num_classes': int,
    'crop_pct': (int, float), 'test_crop_pct': (int, float), 'interpolation': str, 'crop_mode': str, 'license': str,
    'label_descriptions': dict}
# Arguments that a config must not have, because they could name weights other than the file beside it.
_REFUSED_ARGUMENTS = {*inspect.signature(timm.create_model).parameters, 'features_only', 'file', 'url'} - {'kwargs'}
# Larger whole numbers are refused among the arguments of a backbone: sizes of images and layers are far smaller.
_MAX_NUMBER = 2 ** 24


@dataclass(frozen=True)
class SavedModel:
    """The checked contents of the config of a saved model.

    Attributes:
        backbone: The name of a timm model.
        arguments: The arguments of `timm.create_model` for the backbone, without `num_classes`.
        options: The arguments of `wrap_dl2pa`, without the prototypes, which are among the weights.
        num_classes: C.
        data: The entries of timm's pretrained_cfg that concern images and labels.
        label_names: The names of the C classes, or None. They are in `data` too, as in timm.
        head: The head's config, or None in files that timm's own functions wrote.
        digest: The sha256 of the weights, or None in files that timm's own functions wrote.
        versions: The versions of the packages that wrote the files; empty if timm's own functions did.
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
        """Make the model with random weights and placeholder prototypes. No prototypes are computed.

        Returns:
            The wrapped model.

        Raises:
            ValueError: timm cannot make the model.
        """
        options = dict(self.options)
        count, dim = options.pop('num_prototypes', None) or self.num_classes, options['dim']
        try:
            model = timm.create_model(self.backbone, num_classes=self.num_classes, **self.arguments)
            wrap_dl2pa(model, **options, prototypes=torch.eye(1, dim).expand(count, -1))
        except Exception as error:  # backbones raise various errors for unknown arguments
            writer, installed, reason = self.versions.get('timm'), timm.__version__, str(error).rstrip('.')
            hint = f' It was written with timm {writer}; this is {installed}.' if writer not in (None, installed) \
                else ''
            raise ValueError(f'timm cannot make {self.backbone!r} with {self.num_classes} classes, the arguments '
                             f'{self.arguments} and the head {self.options}: {reason}.{hint}') from error
        model._model_args = {**self.arguments, **model._model_args}
        for head in heads_of(model):
            # The saved config; the head's own one describes the placeholder prototypes.
            head.config = replace(self.head or head.config, in_features=head.in_features)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **self.data, 'custom_load': False}
        model.label_names = self.label_names
        return model


def check_model(folder: Path, origin: str) -> tuple[SavedModel, nn.Module]:
    """Read and check the config of a saved model, and make the model of it on PyTorch's meta device.

    That takes no memory, whatever sizes the config states, and ends early where the config asks for far more layers
    than there are weights. If the weights are beside it, their names and shapes are compared; they are not read.

    Args:
        folder: The folder that holds the config, and the weights or not.
        origin: The name of the source for error messages.

    Returns:
        The contents of the config, and the model.

    Raises:
        ValueError: The config is not that of a DL2PA model, is of a newer format or names other files; timm cannot
            make the model; or the weights are damaged or do not match the config.
    """
    saved = _read_saved_config(folder, origin)
    path = folder / WEIGHTS_NAME
    header = read_header(path, origin) if path.is_file() else None
    try:
        with BuildBudget(header and len(header.shapes)), torch.device('meta'):
            meta_model = saved.build()
    except ValueError as error:
        raise ValueError(f'{origin}: {error}') from error
    _check_head(saved, meta_model, origin)
    if header is not None:
        header.check(*_expected_tensors(meta_model))
    return saved, meta_model


def _expected_tensors(meta_model: nn.Module) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the shapes of a model's tensors by name, and the names of those of an integer dtype."""
    state = meta_model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, \
        {name for name, tensor in state.items() if not tensor.is_floating_point()}


def read_model(folder: Path, origin: str) -> tuple[SavedModel, dict[str, torch.Tensor]]:
    """Read and check the config and the weights of a saved model. Nothing is unpickled.

    The model is first made by `check_model`.

    Args:
        folder: The folder that holds the two files.
        origin: The name of the source for error messages.

    Returns:
        The contents of the config, and the tensors by name.

    Raises:
        ValueError: The config is not that of a DL2PA model, is of a newer format or names other files; or the weights
            are damaged, do not match the config, are not finite or do not make a head.
    """
    saved, meta_model = check_model(folder, origin)
    tensors = read_tensors(folder / WEIGHTS_NAME, origin, *_expected_tensors(meta_model), saved.digest)
    for prefix in head_prefixes(tensors):
        config = meta_model.get_submodule(prefix.rstrip('.')).config
        try:
            check_prototypes(tensors[f'{prefix}prototypes'])
            check_assignment(tensors[f'{prefix}assignment'], config.num_classes, config.num_prototypes)
            check_scale_in_file(config, tensors, prefix)
        except ValueError as error:
            raise ValueError(f'{origin}: {WEIGHTS_NAME}: {prefix}{error}') from None
    try:
        check_same_assignment(tensors)
    except ValueError as error:
        raise ValueError(f'{origin}: {WEIGHTS_NAME}: {error}') from None
    return saved, tensors


def _check_head(saved: SavedModel, meta_model: nn.Module, origin: str) -> None:
    """Raise a ValueError if the head's config and the other entries of the config contradict each other."""
    if saved.head is None:
        return
    in_features = heads_of(meta_model)[0].in_features
    expected = {**registry_options(saved.head), 'in_features': saved.head.in_features,
                'num_classes': saved.head.num_classes}
    given = {**{PREFIX + name: value for name, value in saved.options.items()}, 'in_features': in_features,
             'num_classes': saved.num_classes}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(f'{origin}: {CONFIG_NAME} contradicts itself: {name} is {expected.get(name)!r} in the '
                             f'config of the head, and {given.get(name)!r} in the other entries.')


def check_backbone(name: Any) -> None:
    """Check that the name of a backbone is in timm's registry: not a folder, a repository or the entry `dl2pa`.

    Args:
        name: The value to check.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(name, str) or name.partition('.')[0] == REGISTRY_NAME or not timm.is_model(name):
        raise ValueError(f'{PREFIX}backbone must be a name in timm\'s registry (see timm.list_models()), not {name!r}.')


def names_weights(name: str) -> bool:
    """Return whether an argument of `timm.create_model` of that name could name weights, or make no classifier.

    Args:
        name: The name of the argument.
    """
    return name in _REFUSED_ARGUMENTS or name.startswith('pretrained')


def check_backbone_arguments(arguments: dict[str, Any]) -> None:
    """Check that the arguments of a backbone name no weights, and no absurd sizes.

    A downloaded config must not load any other file, nor keep Python busy with counting.

    Args:
        arguments: The arguments by name.

    Raises:
        ValueError: One of the arguments concerns weights, or a whole number is absurd.
    """
    refused = sorted(filter(names_weights, arguments))
    if refused:
        raise ValueError(f'{refused[0]}={arguments[refused[0]]!r} cannot be among the arguments of a saved model: its '
                         f'weights must be those beside its {CONFIG_NAME}.')
    queue = [(name, value) for name, value in arguments.items() if not name.startswith(PREFIX)]
    while queue:
        name, value = queue.pop()
        if isinstance(value, (list, tuple, dict)):
            parts = value.values() if isinstance(value, dict) else value
            queue.extend((name, part) for part in parts)
        elif is_kind(value, int) and abs(value) > _MAX_NUMBER:
            raise ValueError(f'{name} must not be {value!r:.30} or hold it: no model has such a size.')


def _read_saved_config(folder: Path, origin: str) -> SavedModel:
    """Read and check the config of a saved model."""
    config = read_config(folder, origin)
    where = f'{origin}: {CONFIG_NAME}'
    if config.get('architecture') != REGISTRY_NAME:
        name = config.get('architecture')
        is_head = config.get('library_name') == PACKAGE_KEY
        hint = ' It is that of a head alone: load it with load_head.' if is_head else \
            " It is a plain timm model: load it with timm.create_model('hf-hub:...')." \
            if isinstance(name, str) and timm.is_model(name) else ''
        raise ValueError(f'{where} is not that of a DL2PA model: its architecture is {name!r}, '
                         f'not {REGISTRY_NAME!r}.{hint}')
    data, arguments, package_entry = (config.get(name) or {} for name in ('pretrained_cfg', 'model_args', PACKAGE_KEY))
    for name, value in (('pretrained_cfg', data), ('model_args', arguments), (PACKAGE_KEY, package_entry)):
        if not isinstance(value, dict):
            raise ValueError(f'{where}: {name} must be an object, not {value!r}.')
    arguments = dict(arguments)
    try:
        check_backbone(arguments.pop(f'{PREFIX}backbone', None))
        check_backbone_arguments(arguments)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    num_classes = config.get('num_classes', data.get('num_classes'))
    if not is_kind(num_classes, int) or arguments.pop('num_classes', num_classes) != num_classes:
        raise ValueError(f'{where} must state one number of classes: num_classes must be an integer, and the same in '
                         f'model_args.')
    label_names = read_label_names(config.get('label_names', data.get('label_names')), num_classes,
                                   f'{where}: label_names')
    options = {name.removeprefix(PREFIX): arguments.pop(name) for name in list(arguments)
               if name.startswith(PREFIX)}
    options.pop('prototypes', None)  # a file on the author's machine; the prototypes are among the weights
    defaults = {name: parameter.default for name, parameter in inspect.signature(wrap_dl2pa).parameters.items()}
    for name, value in options.items():
        if name not in KINDS or name not in defaults:
            raise ValueError(f'{where}: {PREFIX}{name} is not an option of wrap_dl2pa.')
        if not (is_kind(value, KINDS[name]) or value is defaults[name]):
            expected = ' or '.join(kind.__name__ for kind in KINDS[name])
            raise ValueError(f'{where}: {PREFIX}{name} must be {expected}, not {value!r}.')
    head = versions = digest = None
    if package_entry:
        check_format(package_entry.get('format'), FORMAT, origin)
        if not isinstance(package_entry.get('head'), dict):
            raise ValueError(f'{where}: {PACKAGE_KEY} must state the config of the head, an object, not '
                             f'{package_entry.get("head")!r}.')
        head = DL2PAConfig.from_json(package_entry['head'], where)
        versions, digest = package_entry.get('versions'), package_entry.get('weights_sha256')
        if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
            raise ValueError(f'{where}: versions must be an object of strings, not {versions!r}.')
        if not isinstance(digest, str | None):
            raise ValueError(f'{where}: weights_sha256 must be a string, not {digest!r}.')
    return SavedModel(
        backbone=config['model_args'][f'{PREFIX}backbone'],
        arguments=arguments,
        options={'dim': defaults['dim'], **options},
        num_classes=num_classes,
        data=_checked_data(data, where) | {'num_classes': num_classes, 'label_names': label_names},
        label_names=label_names,
        head=head,
        digest=digest,
        versions=versions or {},
    )


def _checked_data(pretrained_cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of a pretrained_cfg that concern images and labels, checked."""
    data = {name: pretrained_cfg[name] for name in _DATA_ENTRIES if pretrained_cfg.get(name) is not None}
    for name, value in data.items():
        parts = value if isinstance(value, list) else [value]
        number_kinds = (int,) if name in _SIZE_ENTRIES else (int, float)
        is_valid = is_kind(value, _DATA_ENTRIES[name])
        if name in _SIZE_ENTRIES or name in ('mean', 'std', 'crop_pct', 'test_crop_pct'):
            is_valid = is_valid and all(is_kind(part, number_kinds) and abs(part) < 10 ** 9 and math.isfinite(part)
                                        for part in parts) and 1 <= len(parts) <= 5
        if name in ('input_size', 'test_input_size', 'min_input_size'):
            is_valid = is_valid and len(parts) == 3
        if not is_valid:
            raise ValueError(f'{where}: {name} has the wrong type, length or range: {value!r}.')
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
