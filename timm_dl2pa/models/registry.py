"""The entry `dl2pa` in timm's registry: wrapped models by `timm.create_model`, and by timm's own loaders."""
import inspect
import logging
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg, load_pretrained, register_model

from ..files.folder import find_files
from ..head import default_scale, head_prefixes, load_neck
from ..options import PREFIX, names_of
from ..prototypes import make_prototypes
from .model_files import SavedModel, check_backbone, check_backbone_arguments, read_model
from .wrapping import wrap_dl2pa

__all__ = ['dl2pa']

_logger = logging.getLogger(__name__)

_SOURCES = ('source', 'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename')
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
    """Make a timm model with a DL2PA head: `timm.create_model('dl2pa', dl2pa_backbone='resnet50', dl2pa_dim=128)`.

    Args:
        pretrained: Load weights: those of a whole DL2PA model, if a config or overlay names a source (`hf-hub:` and
            `local-dir:` names do), otherwise timm's for the backbone. Folders and repositories are read as by
            `load_model`: from safetensors, and checked. With another number of classes than the source has, the head
            starts anew; its neck is taken over if it fits.
        dl2pa_backbone: Name of a timm model.
        pretrained_cfg: timm's, of the whole model.
        pretrained_cfg_overlay: timm's, of the whole model.
        cache_dir: For downloads.
        kwargs: Those named dl2pa_... are arguments of `wrap_dl2pa`; the others go to the backbone.

    Raises:
        ValueError: There is no backbone, no such option, or the weights are not those of a DL2PA model.
        FileNotFoundError: A folder lacks a file.
    """
    if not dl2pa_backbone:
        raise ValueError("the model 'dl2pa' is a head on another model: name it, dl2pa_backbone='resnet50'.")
    if isinstance(pretrained_cfg, str):
        raise ValueError(f"'dl2pa.{pretrained_cfg}': give the tag to the backbone, "
                         f"dl2pa_backbone='{dl2pa_backbone}.{pretrained_cfg}'.")
    check_backbone(dl2pa_backbone)
    source_args = kwargs.pop('pretrained_model_args', None) or {}  # a config's, which timm has merged with the caller's
    options = {name.removeprefix(PREFIX): kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ValueError(f'{", ".join(PREFIX + name for name in unknown)}: no such option. There are '
                         f'{", ".join(PREFIX + name for name in _OPTIONS)}. (What concerns training takes the plugin, '
                         f'timm_dl2pa.plugin.)')
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    given.update(pretrained_cfg_overlay or {})
    check_backbone_arguments({name: value for name, value in kwargs.items() if name != 'features_only'})
    if source_args.get('dl2pa_prototypes') is not None and options.get('prototypes') == source_args['dl2pa_prototypes']:
        del options['prototypes']  # a file that was the saver's; the points are among the weights
    whole = pretrained and any(given.get(name) for name in _SOURCES)
    repository = _repository(given) if whole and not kwargs.get('features_only') else None
    if repository:
        saved, tensors = read_model(*find_files(repository, 'a DL2PA model', cache_dir=cache_dir))
        given = {**saved.data, **(pretrained_cfg_overlay or {}), **dict.fromkeys(_SOURCES), 'state_dict': tensors}
        if kwargs.get('num_classes', saved.num_classes) != saved.num_classes:
            given.update(label_names=None, label_descriptions=None)
            options = _for_other_classes(options, saved)
    if (given.get('num_classes') or 0) > 0:  # train.py says -1 for another number than the file's
        kwargs.setdefault('num_classes', given['num_classes'])
    backbone = timm.create_model(dl2pa_backbone, pretrained=pretrained and not whole, cache_dir=cache_dir, **kwargs)
    if kwargs.get('features_only'):
        if whole:
            raise ValueError("features_only=True takes the backbone's weights alone. For a DL2PA model's, load the "
                             'model and give it to timm.models.FeatureGetterNet.')
        return backbone  # which has no classifier
    if whole and options.get('prototypes') is None:
        # Those of the file take their place: none need to be computed.
        dim = options.get('dim', inspect.signature(wrap_dl2pa).parameters['dim'].default)
        count = options.get('num_prototypes') or kwargs.get('num_classes') or backbone.num_classes
        points = torch.eye(1, dim).expand(count, -1)
        model = wrap_dl2pa(backbone, **{**options, 'num_prototypes': None, 'prototypes': points})
    else:
        model = wrap_dl2pa(backbone, **options)
    given = {name: value for name, value in given.items() if value is not None}
    cfg = {**model.pretrained_cfg, 'tag': None, **given, 'architecture': 'dl2pa', 'custom_load': False}
    if whole:
        load_pretrained(model, pretrained_cfg={**cfg, 'classifier': None}, num_classes=model.num_classes,
                        in_chans=kwargs.get('in_chans', 3), filter_fn=_fit_head, cache_dir=cache_dir)
    else:
        for name in _SOURCES:
            cfg.pop(name, None)
    cfg.pop('state_dict', None)
    model.pretrained_cfg = model.default_cfg = cfg
    model._model_args['dl2pa_backbone'] = dl2pa_backbone
    if repository:
        model.label_names = cfg.get('label_names')
    return model


def _repository(given: dict[str, Any]) -> str | None:
    """Return where a config finds its weights, if that is a folder or a repository: as `find_files` takes it."""
    if given.get('source') == 'local-dir':
        return f'local-dir:{given["file"]}'
    named = given.get('source') == 'hf-hub' or not any(given.get(name) for name in ('state_dict', 'file'))
    if not named or not given.get('hf_hub_id'):
        return None
    return f'hf-hub:{given["hf_hub_id"]}'


def _for_other_classes(options: dict[str, Any], saved: SavedModel) -> dict[str, Any]:
    """Return the options without those that a config has for its own number of classes alone."""
    options = dict(options)
    if options.get('num_prototypes') == saved.options.get('num_prototypes'):
        options.pop('num_prototypes', None)
    if options.get('scale') == default_scale(saved.num_classes):
        del options['scale']
    return options


def _fit_head(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Check that a state dict is a DL2PA model's; give it the model's own head if it has other classes."""
    sizes = {len(value) for name, value in state.items() if name.endswith('.assignment')}
    if not sizes:
        raise ValueError("the weights are not those of a DL2PA model: they have no assignment. To load a backbone's, "
                         'make it with timm.create_model and wrap it with wrap_dl2pa.')
    if sizes == {model.num_classes}:
        return state
    kept = True
    for prefix in head_prefixes(model.state_dict()):
        head = model.get_submodule(prefix.rstrip('.'))
        head.assign(head.assignment, make_prototypes(head.config.num_prototypes, head.dim, seed=head.config.seed))
        necks = {name.removeprefix(f'{prefix}neck.'): value for name, value in state.items()
                 if name.startswith(f'{prefix}neck.')}
        kept = load_neck(head.neck, necks) and kept
        for name, own in head.state_dict(prefix=prefix).items():
            if not name.startswith(f'{prefix}before.') or name not in state or state[name].shape != own.shape:
                state[name] = own
    _logger.warning(f'the weights are of {sizes.pop()} classes, the model has {model.num_classes}: its head starts anew'
                    + (', on the neck that was loaded.' if kept else '.'))
    return state
