"""The entry `dl2pa` in timm's registry: wrapped models by `timm.create_model`, and by timm's own loaders."""
import inspect
import logging
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg, load_pretrained, register_model

from .head import heads_of
from .models import wrap_dl2pa
from .prototypes import make_prototypes

__all__ = ['dl2pa']

_logger = logging.getLogger(__name__)

_PREFIX = 'dl2pa_'
_SOURCES = ('source', 'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename')
_OPTIONS = tuple(name for name in inspect.signature(wrap_dl2pa).parameters
                 if name not in ('model', 'num_classes', 'head'))


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
            `local-dir:` names do), otherwise timm's for the backbone. With another number of classes than the source
            has, the head starts anew; its neck is taken over if it fits.
        dl2pa_backbone: Name of a timm model.
        pretrained_cfg: timm's, of the whole model.
        pretrained_cfg_overlay: timm's, of the whole model.
        cache_dir: For downloads.
        kwargs: Those named dl2pa_... are arguments of `wrap_dl2pa`; the others go to the backbone.

    Raises:
        ValueError: There is no backbone, no such option, or the weights are not those of a DL2PA model.
    """
    if not dl2pa_backbone:
        raise ValueError("the model 'dl2pa' is a head on another model: name it, dl2pa_backbone='resnet50'.")
    if isinstance(pretrained_cfg, str):
        raise ValueError(f"'dl2pa.{pretrained_cfg}': give the tag to the backbone, "
                         f"dl2pa_backbone='{dl2pa_backbone}.{pretrained_cfg}'.")
    options = {name.removeprefix(_PREFIX): kwargs.pop(name) for name in list(kwargs) if name.startswith(_PREFIX)}
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ValueError(f'{", ".join(_PREFIX + name for name in unknown)}: no such option. There are '
                         f'{", ".join(_PREFIX + name for name in _OPTIONS)}. (What concerns training takes the plugin, '
                         f'timm_dl2pa.plugin.)')
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    given.update(pretrained_cfg_overlay or {})
    whole = pretrained and any(given.get(name) for name in _SOURCES)
    kwargs.pop('pretrained_model_args', None)
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
        points = torch.eye(dim)[:1].expand(count, -1)
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
    return model


def _fit_head(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Check that a state dict is a DL2PA model's; give it the model's own head if it has other classes."""
    sizes = {len(value) for name, value in state.items() if name.endswith('.assignment')}
    if not sizes:
        raise ValueError("the weights are not those of a DL2PA model: they have no assignment. To load a backbone's, "
                         'make it with timm.create_model and wrap it with wrap_dl2pa.')
    if sizes == {model.num_classes}:
        return state
    kept = True
    for path, module in model.named_modules():
        if module not in heads_of(model):
            continue
        config = module.config
        points = make_prototypes(config.num_prototypes, config.dim, seed=config.seed)
        module.assign(module.assignment, points)
        for name, own in module.state_dict(prefix=f'{path}.').items():
            fits = name in state and state[name].shape == own.shape
            if not name.startswith((f'{path}.neck.', f'{path}.before.')) or not fits:
                kept = kept and not name.startswith(f'{path}.neck.')
                state[name] = own
    _logger.warning(f'the weights are of {sizes.pop()} classes, the model has {model.num_classes}: its head starts anew'
                    + (', on the neck that was loaded.' if kept else '.'))
    return state
