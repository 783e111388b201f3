"""What `timm-dl2pa fold` and `push` make of a DL2PA model's checkpoint: a plain timm model's, a repository."""
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.models import clean_state_dict

from ..files.card import Training
from ..files.folder import CONFIG_NAME
from ..head import head_prefixes, heads_of
from ..models import backbone_name, fold_dl2pa, load_model, push_head_to_hub, push_model_to_hub, wrap_dl2pa
from ..options import PREFIX, PluginOptions
from .inspection import read_checkpoint
from .record import class_means_of, metrics_of, read_training

__all__ = ['fold_checkpoint', 'load_wrapped', 'push_checkpoint']


def load_wrapped(
        path: str | Path,
        *,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Make the DL2PA model of a checkpoint, in evaluation mode. No prototypes are computed.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder that `save_model` wrote.
        model: The backbone's name. Default: what the checkpoint says.
        model_kwargs: Further arguments of the backbone and dl2pa_... options, beside what the checkpoint says.
        use_ema: Take the averaged weights.

    Returns:
        The model, the backbone's name, and the arguments (without `num_classes`) that timm makes the backbone with.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint of a DL2PA model, does not say what made the model, or does not fit that.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():  # a folder
        if use_ema:
            raise ValueError(f'{path} has no averaged weights: save_model saves one set.')
        wrapped = load_model(path)
        arguments = {name: value for name, value in wrapped._model_args.items()
                     if name != 'num_classes' and not name.startswith(PREFIX)}
        return wrapped, backbone_name(wrapped).partition('.')[0], arguments
    checkpoint = read_checkpoint(path)
    if use_ema and 'state_dict_ema' not in checkpoint:
        raise ValueError(f'{path} has no averaged weights (state_dict_ema): leave --use-ema out.')
    state = clean_state_dict(checkpoint['state_dict_ema' if use_ema else 'state_dict'])
    prefix = next(iter(head_prefixes(state)), None)
    if prefix is None:
        raise ValueError(f'{path} has no DL2PA head: no prototypes with an assignment are among its tensors.')
    said = checkpoint.get('args')
    arguments: dict[str, Any] = {'in_chans': getattr(said, 'in_chans', None),
                                 'global_pool': getattr(said, 'gp', None),
                                 **(getattr(said, 'model_kwargs', None) or {}), **(model_kwargs or {})}
    registered = arguments.pop('dl2pa_backbone', None)
    name = model or registered or getattr(said, 'model', None)
    if not name:
        raise ValueError(f"{path} does not say what model it is of: give its name, --model.")
    options = PluginOptions.take(arguments) or PluginOptions()
    arguments = {key: value for key, value in arguments.items() if value is not None}
    prototypes, classes = state[prefix + 'prototypes'], len(state[prefix + 'assignment'])
    head = options.head_arguments()
    head.update(dim=prototypes.shape[1], num_prototypes=None, prototypes=prototypes,
                learn_scale=prefix + 'log_scale' in state)
    try:
        with torch.random.fork_rng(devices=[]):
            wrapped = wrap_dl2pa(timm.create_model(name, num_classes=classes, **arguments), **head)
        wrapped.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{path} does not fit {name!r} with {arguments or "no arguments"} and the head of '
                         f'{PREFIX}neck={options.neck!r}: {error}. Give --model and --model-kwargs.') from error
    return wrapped.eval(), name, arguments


def fold_checkpoint(path: str | Path, output: str | Path, *, normalize: bool = False, **source: Any) -> str:
    """Write the state dict of the folded model, and return a line that says how to load it.

    Args:
        path: What `load_wrapped` takes.
        output: A new file: .safetensors, or any other name for what `torch.save` writes.
        normalize: See `fold_dl2pa`.
        source: Further arguments of `load_wrapped`.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: There is such an output already.
        ValueError: See `load_wrapped` and `fold_dl2pa`.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f'{output} exists already.')
    model, name, arguments = load_wrapped(path, **source)
    classes, count = model.num_classes, len(heads_of(model))
    if count > 1 and not normalize:
        raise ValueError(f'{name} combines the logits of {count} classifiers, so that a plain model ranks classes only '
                         f'nearly the same: use --normalize, or fold_dl2pa with images to measure how nearly.')
    plain = fold_dl2pa(model, normalize=normalize)
    state = {key: value.contiguous().clone() for key, value in plain.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == '.safetensors':
        save_file(state, output, metadata={'format': 'pt'})
    else:
        torch.save(state, output)
    if normalize:
        return f'{output}: {name}, {classes} classes, with a classifier of three layers: no model of timm\'s by itself.'
    given = ''.join(f', {key}={value!r}' for key, value in arguments.items())
    return f'{output}: timm.create_model({name!r}, num_classes={classes}{given}, checkpoint_path={str(output)!r})'


def push_checkpoint(
        path: str | Path,
        repo_id: str,
        *,
        head_only: bool = False,
        folded: bool = False,
        use_ema: bool = False,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **upload: Any,
) -> str:
    """Upload the model of a checkpoint to the Hub, and return the commit's address.

    The card shows what the checkpoint, and the files summary.csv and args.yaml beside it, say of the training.

    Args:
        path: What `load_wrapped` takes, as `use_ema`, `model` and `model_kwargs`.
        repo_id: 'me/name'.
        head_only: The head alone.
        folded: The plain timm model.
        upload: Arguments of `push_model_to_hub` and `push_head_to_hub`.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: See `load_wrapped`, `push_model_to_hub` and `push_head_to_hub`.
    """
    wrapped, _, arguments = load_wrapped(path, use_ema=use_ema, model=model, model_kwargs=model_kwargs)
    path = Path(path)
    if path.is_file():
        checkpoint = read_checkpoint(path)
        training = read_training(path, checkpoint)
        if training != Training():
            upload.setdefault('training', training)
        upload.setdefault('metrics', metrics_of(training, checkpoint, use_ema))
        upload.setdefault('class_means', class_means_of(checkpoint))
        said = checkpoint.get('args')
        weights = wrapped.pretrained_cfg.get('hf_hub_id') or ''
        if getattr(said, 'pretrained', False) and weights.startswith('timm/') and upload.get('base_model') is None:
            upload['base_model'] = weights
        if getattr(said, 'pretrained', None) is False and upload.get('license') is None:
            upload['license'] = ''  # timm's weights took no part
    if head_only:
        return push_head_to_hub(wrapped, repo_id, **upload)
    return push_model_to_hub(wrapped, repo_id, folded=folded, model_args=arguments, **upload)
