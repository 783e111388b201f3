"""The entry `dl2pa` in timm's registry, by which `timm.create_model` makes and loads wrapped models."""
import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg, load_pretrained, register_model

from ..files.labels import read_label_names
from ..files.source import find_files
from ..head import check_same_assignment, default_scale, head_prefixes, heads_of, load_neck
from ..options import PREFIX, names_of
from .budget import BuildBudget
from .model_files import SavedModel, check_backbone, check_backbone_arguments, check_model, read_model
from .wrapping import wrap_dl2pa

__all__ = ['dl2pa']

_logger = logging.getLogger(__name__)

# The entries of timm's pretrained_cfg that name the source of the weights.
_SOURCE_ENTRIES = ('source', 'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename')
_OPTIONS = (*names_of('head'), 'train_output')


@register_model
def dl2pa(
        pretrained: bool = False,
        *,
        dl2pa_backbone: str | None = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Make a timm model with a DL2PA head, for `timm.create_model('dl2pa', ...)`.

    Args:
        pretrained: Whether to load weights. If a config or overlay names a source (as `hf-hub:` and `local-dir:` names
            do), they are those of a whole DL2PA model; otherwise timm's for the backbone. Folders and repositories are
            read as by `load_model`, from checked safetensors. If the source has another number of classes, the head is
            new, and its neck is loaded if it fits.
        dl2pa_backbone: The name of a timm model.
        pretrained_cfg: timm's config of the whole model.
        pretrained_cfg_overlay: timm's changes to that config.
        cache_dir: The folder of downloads.
        kwargs: Arguments dl2pa_... of `wrap_dl2pa`, and arguments of the backbone.

    Returns:
        The wrapped model; with `features_only=True` the backbone alone.

    Raises:
        ValueError: No backbone is given, an option is unknown, or the weights are not those of a DL2PA model.
        FileNotFoundError: A folder lacks one of the files.

    Example:
        >>> model = timm.create_model('dl2pa', dl2pa_backbone='test_resnet', dl2pa_dim=8, num_classes=10)
        >>> type(model).__name__, model.get_classifier().dim
        ('ResNet', 8)
    """
    if not dl2pa_backbone:
        raise ValueError("the model 'dl2pa' needs a backbone: give its name, such as dl2pa_backbone='resnet50'.")
    if isinstance(pretrained_cfg, str):
        raise ValueError(f"'dl2pa.{pretrained_cfg}': give the tag to the backbone, "
                         f"dl2pa_backbone='{dl2pa_backbone}.{pretrained_cfg}'.")
    check_backbone(dl2pa_backbone)
    source_args = kwargs.pop('pretrained_model_args', None) or {}  # from a config; timm also merged them into kwargs
    options = {name.removeprefix(PREFIX): kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ValueError(f'{", ".join(PREFIX + name for name in unknown)}: no such option. The options are '
                         f'{", ".join(PREFIX + name for name in _OPTIONS)}. (Options of the training need the plugin, '
                         f'timm_dl2pa.plugin.)')
    data = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    data.update(pretrained_cfg_overlay or {})
    check_backbone_arguments({name: value for name, value in kwargs.items() if name != 'features_only'})
    if source_args.get('dl2pa_prototypes') is not None and options.get('prototypes') == source_args['dl2pa_prototypes']:
        del options['prototypes']  # a file on the author's machine; the prototypes are among the weights
    load_whole_model = pretrained and any(data.get(name) for name in _SOURCE_ENTRIES)
    repository = _repository(data) if load_whole_model and not kwargs.get('features_only') else None
    if repository:
        saved, tensors = read_model(*find_files(repository, 'a DL2PA model', cache_dir=cache_dir))
        data = {**saved.data, **(pretrained_cfg_overlay or {}), **dict.fromkeys(_SOURCE_ENTRIES),
                'state_dict': tensors}
        if kwargs.get('num_classes', saved.num_classes) != saved.num_classes:
            options = _for_other_classes(options, saved)
    elif data.get('source') == 'local-dir':
        check_model(Path(data['file']), data['file'])
    if (data.get('num_classes') or 0) > 0:  # train.py passes -1 if the file has another number of classes
        kwargs.setdefault('num_classes', data['num_classes'])
    if data.get('source') == 'hf-hub' and not repository:  # its config was read, its weights are not here
        with BuildBudget(), torch.device('meta'):
            timm.create_model(dl2pa_backbone, **kwargs)
    backbone = timm.create_model(
        dl2pa_backbone, pretrained=pretrained and not load_whole_model, cache_dir=cache_dir, **kwargs)
    if kwargs.get('features_only'):
        if load_whole_model:
            raise ValueError("features_only=True takes the backbone's weights alone. For the weights of a DL2PA model, "
                             'load the model and pass it to timm.models.FeatureGetterNet.')
        return backbone  # without a classifier
    if load_whole_model and options.get('prototypes') is None:
        # Placeholders, which the prototypes of the file replace. None are computed.
        dim = options.get('dim', inspect.signature(wrap_dl2pa).parameters['dim'].default)
        count = options.get('num_prototypes') or kwargs.get('num_classes') or backbone.num_classes
        points = torch.eye(1, dim).expand(count, -1)
        model = wrap_dl2pa(backbone, **{**options, 'num_prototypes': None, 'prototypes': points})
    else:
        model = wrap_dl2pa(backbone, **options)
    if data.get('num_classes', model.num_classes) != model.num_classes:
        data.update(label_names=None, label_descriptions=None)
    given_names = (pretrained_cfg_overlay or {}).get('label_names', data.get('label_names'))
    model.label_names = data['label_names'] = read_label_names(given_names, model.num_classes)
    data = {name: value for name, value in data.items() if value is not None}
    cfg = {**model.pretrained_cfg, 'tag': None, **data, 'architecture': 'dl2pa', 'custom_load': False}
    if load_whole_model:
        load_pretrained(model, pretrained_cfg={**cfg, 'classifier': None}, num_classes=model.num_classes,
                        in_chans=kwargs.get('in_chans', 3), filter_fn=_fit_head, cache_dir=cache_dir)
        if repository and saved.head is not None and saved.num_classes == model.num_classes:
            for head in heads_of(model):
                head.config = replace(head.config, pinned=saved.head.pinned, held_scale=saved.head.held_scale)
    else:
        for name in _SOURCE_ENTRIES:
            cfg.pop(name, None)
    cfg.pop('state_dict', None)
    model.pretrained_cfg = model.default_cfg = cfg
    model._model_args['dl2pa_backbone'] = dl2pa_backbone
    return model


def _repository(data: dict[str, Any]) -> str | None:
    """Return the folder or repository that a pretrained_cfg names, in the notation of `find_files`, or None."""
    if data.get('source') == 'local-dir':
        return f'local-dir:{data["file"]}'
    is_on_hub = data.get('source') == 'hf-hub' or not any(data.get(name) for name in ('state_dict', 'file'))
    if not is_on_hub or not data.get('hf_hub_id'):
        return None
    return f'hf-hub:{data["hf_hub_id"]}'


def _for_other_classes(options: dict[str, Any], saved: SavedModel) -> dict[str, Any]:
    """Return the options without those that depend on the saved model's number of classes."""
    options = dict(options)
    if options.get('num_prototypes') == saved.options.get('num_prototypes'):
        options.pop('num_prototypes', None)
    if options.get('scale') == default_scale(saved.num_classes):
        del options['scale']
    return options


def _fit_head(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Check that a state dict is that of a DL2PA model. If it has other classes, insert the model's own head."""
    sizes = {len(value) for name, value in state.items() if name.endswith('.assignment')}
    if not sizes:
        raise ValueError('the weights are not those of a DL2PA model: they have no assignment. To load the weights of '
                         'a backbone, make it with timm.create_model and wrap it with wrap_dl2pa.')
    check_same_assignment(state)
    if sizes == {model.num_classes}:
        return state
    neck_fits = True
    for prefix in head_prefixes(model.state_dict()):
        head = model.get_submodule(prefix.rstrip('.'))
        head.assign(head.assignment, head.config.first_prototypes())
        neck_state = {name.removeprefix(f'{prefix}neck.'): value for name, value in state.items()
                      if name.startswith(f'{prefix}neck.')}
        neck_fits = load_neck(head.neck, neck_state) and neck_fits
        for name, own in head.state_dict(prefix=prefix).items():
            if not name.startswith(f'{prefix}before.') or name not in state or state[name].shape != own.shape:
                state[name] = own
    _logger.warning(f'The weights are for {sizes.pop()} classes, the model has {model.num_classes}: its prototypes and '
                    f'assignment are new, and its neck '
                    + ('was loaded.' if neck_fits else 'is new too, because the saved one does not fit.'))
    return state
