"""Model creation: with the plugin, `timm.create_model(..., dl2pa_dim=128)` makes a wrapped model."""
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers import is_scriptable
from timm.models import load_state_dict

from ..head import head_prefixes, load_neck
from ..models import wrap_dl2pa
from ..options import PREFIX, PluginOptions, named_as_options
from ..scheduling import Duration, Schedule

__all__ = ['check_times', 'create_registered', 'create_wrapped', 'plugin_options']

_logger = logging.getLogger(__name__)

_OPTIONS_ATTRIBUTE = 'dl2pa_options'


def plugin_options(model: nn.Module) -> PluginOptions | None:
    """Return the options that a model was created with.

    Args:
        model: Any module.

    Returns:
        The options, or None if the model was created without any.
    """
    return getattr(model, _OPTIONS_ATTRIBUTE, None)


def check_times(options: PluginOptions) -> None:
    """Check the texts of an interval and a length, before a model is made.

    Args:
        options: The options of the training.

    Raises:
        ValueError: One of them cannot be read. The option is named.
    """
    with named_as_options():
        Schedule.of(options.interval)
        if options.warmup_length is not None:
            Duration.of(options.warmup_length, 'warmup_length')


def create_wrapped(make_backbone: Callable[..., nn.Module], options: PluginOptions, **arguments: Any) -> nn.Module:
    """Make a timm model by its entry point, with pretrained weights if requested, and wrap it with a new DL2PA head.

    If the pretrained weights come from the file of a DL2PA model, its neck is loaded too if it fits, and a warning
    tells what was loaded.

    Args:
        make_backbone: timm's entry point of the architecture.
        options: The options of the head and its training.
        arguments: Arguments of the entry point.

    Returns:
        The wrapped model, which `plugin_options` recognises.

    Raises:
        ValueError: The model is to be scripted, or cannot be wrapped.
    """
    check_times(options)
    if is_scriptable():
        raise ValueError('a model with a DL2PA head cannot be made for TorchScript: leave out --torchscript, or use '
                         '--torchcompile.')
    overlay = dict(arguments.get('pretrained_cfg_overlay') or {})
    source = overlay.get('file')
    head_state: dict[str, torch.Tensor] = {}
    if arguments.get('pretrained') and source and Path(source).suffix not in ('.npz', '.npy'):
        state = load_state_dict(source)
        prefixes = tuple(head_prefixes(state))
        if prefixes:
            # timm gets the weights of the backbone alone.
            head_state = {name: state.pop(name) for name in list(state) if name.startswith(prefixes)}
            overlay.update(file=None, state_dict=state)
            arguments['pretrained_cfg_overlay'] = overlay
    model = make_backbone(**arguments)
    if head_state:
        model.pretrained_cfg.update(file=source, state_dict=None)
    with named_as_options():
        wrap_dl2pa(model, **options.head_arguments())
    if head_state:
        _load_old_neck(model, head_state, source)
    setattr(model, _OPTIONS_ATTRIBUTE, options)
    return model


def create_registered(make_model: Callable[..., nn.Module], options: PluginOptions, **arguments: Any) -> nn.Module:
    """Make a model by the entry `dl2pa` of timm's registry, with options for its training.

    Args:
        make_model: The entry point.
        options: The options of the head and its training.
        arguments: Arguments of the entry point, `dl2pa_backbone` among them.

    Returns:
        The wrapped model, which `plugin_options` recognises.
    """
    check_times(options)
    head = {PREFIX + name: value for name, value in options.head_arguments().items()}
    with named_as_options():
        model = make_model(**arguments, **head)
    setattr(model, _OPTIONS_ATTRIBUTE, options)
    return model


def _load_old_neck(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load the neck of a state dict into every head that it fits, and log what was loaded."""
    fits = True
    for prefix in head_prefixes(model.state_dict()):
        neck = f'{prefix}neck.'
        old = {key.removeprefix(neck): value for key, value in state.items() if key.startswith(neck)}
        fits = load_neck(model.get_submodule(neck.rstrip('.')), old) and fits
    loaded = 'backbone and its neck were loaded' if fits else 'backbone was loaded, its neck does not fit'
    _logger.warning(f'{source} holds a model with a DL2PA head: its {loaded}; the rest of the head is new. '
                    f'(--initial-checkpoint and --resume load the whole model.)')
