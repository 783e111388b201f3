"""The commands `timm-dl2pa fold` and `timm-dl2pa push`: convert a checkpoint to a plain timm model, or upload it."""
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..files.card import Training
from ..files.folder import CONFIG_NAME, new_folder
from ..head import heads_of
from ..models import backbone_name, fold_dl2pa, load_model, push_head_to_hub, push_model_to_hub, wrap_dl2pa
from ..models.budget import BuildBudget
from ..models.model_files import names_weights
from ..options import PREFIX, PluginOptions
from ..prototypes.files import staging_folder, write_tensors
from ..values import shown
from .checkpoint import Checkpoint, one_line, read_checkpoint
from .record import class_means_of, metrics_of, read_training

__all__ = ['fold_checkpoint', 'load_wrapped', 'push_checkpoint']


def load_wrapped(
        path: str | Path,
        *,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Load the DL2PA model of a checkpoint, in evaluation mode. No prototypes are computed.

    The weights are the checkpoint's alone: what its script arguments say of other weights is ignored, and a backbone
    that they name must be in timm's registry.

    Args:
        path: A checkpoint of timm's train.py, a state dict, a safetensors file, or a folder of `save_model`.
        model: The name of the backbone. Default: that in the checkpoint.
        model_kwargs: Arguments of the backbone and dl2pa_... options, which override those in the checkpoint.
        use_ema: Whether to load the averaged weights.

    Returns:
        The model, the name of the backbone, and the arguments of `timm.create_model` for it, without `num_classes`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint of a DL2PA model, it does not name the backbone, or its tensors do not
            fit the model.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():  # a folder
        if use_ema:
            raise ValueError(f'{path} has no averaged weights: save_model saves one set of weights.')
        wrapped = load_model(path)
        arguments = {name: value for name, value in wrapped._model_args.items()
                     if name != 'num_classes' and not name.startswith(PREFIX)}
        return wrapped, backbone_name(wrapped).partition('.')[0], arguments
    checkpoint = read_checkpoint(path)
    if use_ema and checkpoint.averaged_state is None:
        raise ValueError(f'{path} has no averaged weights (state_dict_ema): leave --use-ema out.')
    state = checkpoint.averaged_state if use_ema else checkpoint.state
    prefix, (prototypes, assignment) = next(iter(checkpoint.heads(use_ema).items()))
    arguments = {**_model_arguments(checkpoint), **(model_kwargs or {})}
    backbone = arguments.pop('dl2pa_backbone', None)
    name = model or (getattr(checkpoint.args, 'model', None) if backbone is None else backbone)
    if name is None:
        raise ValueError(f'{path} does not name its backbone: give --model.')
    if not model and not (isinstance(name, str) and timm.is_model(name)):
        raise ValueError(f"{path} names the backbone {shown(name)}, which is not in timm's registry: give --model, "
                         f'also if it is that one.')
    options = PluginOptions.take(arguments) or PluginOptions()
    arguments = {key: value for key, value in arguments.items() if value is not None}
    head = options.head_arguments()
    head.update(dim=prototypes.shape[1], num_prototypes=None, prototypes=prototypes,
                learn_scale=prefix + 'log_scale' in state)
    try:
        with torch.random.fork_rng(devices=[]):
            _check_size(name, arguments, state)
            wrapped = wrap_dl2pa(timm.create_model(name, num_classes=len(assignment), **arguments), **head)
        wrapped.load_state_dict(state)
        if checkpoint.record is not None and checkpoint.record.is_scale_held:
            for each in heads_of(wrapped):
                each.hold_scale(each.current_scale().item())
    except OSError:
        raise
    except Exception as error:  # timm's models raise whatever their arguments lead to
        raise ValueError(f'{path} does not fit {name!r} with {shown(arguments) if arguments else "no arguments"} and '
                         f'the head of {PREFIX}neck={options.neck!r}: {one_line(error)} Give --model and '
                         f'--model-kwargs.') from error
    return wrapped.eval(), name, arguments


def _model_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the arguments of the script say of the model, without what concerns weights."""
    arguments = {'in_chans': getattr(checkpoint.args, 'in_chans', None),
                 'global_pool': getattr(checkpoint.args, 'gp', None), **checkpoint.model_kwargs}
    return {name: value for name, value in arguments.items()
            if name != 'num_classes' and not names_weights(name)}


def _check_size(name: str, arguments: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise a ValueError if the arguments, which somebody else may have written, ask for far more than the weights."""
    arguments = {key: value for key, value in arguments.items() if not names_weights(key)}
    with BuildBudget(len(state)), torch.device('meta'):
        meta_model = timm.create_model(name, **{**arguments, 'num_classes': 2})
    asked = sum(value.numel() for value in meta_model.state_dict().values())
    held = sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))
    if asked > 2 * held:
        raise ValueError(f'it asks for {asked} numbers, and holds {held}.')


def fold_checkpoint(path: str | Path, output: str | Path, *, normalize: bool = False, **source: Any) -> str:
    """Fold the model of a checkpoint and write its state dict.

    Args:
        path: The checkpoint, see `load_wrapped`.
        output: The new file: in safetensors format if its suffix is .safetensors, otherwise by `torch.save`.
        normalize: See `fold_dl2pa`.
        source: Further arguments of `load_wrapped`.

    Returns:
        A line of text on how to load the file.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: The output exists already.
        OSError: The output cannot be written. There is no part of it then.
        ValueError: See `load_wrapped` and `fold_dl2pa`.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f'{output} exists already: give the name of a new file.')
    model, name, arguments = load_wrapped(path, **source)
    classes, count = model.num_classes, len(heads_of(model))
    if count > 1 and not normalize:
        raise ValueError(f'{name} combines the logits of {count} classifiers, so that a plain model preserves the '
                         f'order of the classes only approximately: use --normalize, or fold_dl2pa with images, which '
                         f'measures the agreement.')
    plain = fold_dl2pa(model, normalize=normalize)
    _write_state({key: value.contiguous().clone() for key, value in plain.state_dict().items()}, output)
    if normalize:
        return f'{output}: {name}, {classes} classes, with a classifier of three layers, which timm alone cannot load.'
    given = ''.join(f', {key}={value!r}' for key, value in arguments.items())
    return f'{output}: timm.create_model({name!r}, num_classes={classes}{given}, checkpoint_path={str(output)!r})'


def _write_state(state: dict[str, torch.Tensor], output: Path) -> None:
    """Write a state dict to a new file, which is there only when it is complete."""
    try:
        with new_folder(output.parent) as folder, staging_folder(folder) as stage:
            part = stage / 'state'
            if output.suffix == '.safetensors':
                write_tensors(part, state, metadata={'format': 'pt'})
            else:
                torch.save(state, part)
            part.rename(output)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where the disk is full
        raise OSError(f'{output} cannot be written: {one_line(error)}') from error


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
    """Upload the model of a checkpoint to the Hub.

    The model card shows the record of the training in the checkpoint and in the files summary.csv and args.yaml beside
    it.

    Args:
        path: The checkpoint, see `load_wrapped`.
        repo_id: The repository, 'user/name'.
        head_only: Whether to upload the head alone.
        folded: Whether to upload the folded model, a plain timm model.
        use_ema: See `load_wrapped`.
        model: See `load_wrapped`.
        model_kwargs: See `load_wrapped`.
        upload: Arguments of `push_model_to_hub` or `push_head_to_hub`.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: See `load_wrapped`, `push_model_to_hub` and `push_head_to_hub`.
        RuntimeError: See `push_model_to_hub`.
    """
    wrapped, _, arguments = load_wrapped(path, use_ema=use_ema, model=model, model_kwargs=model_kwargs)
    path = Path(path)
    if path.is_file():
        checkpoint = read_checkpoint(path)
        training = read_training(checkpoint)
        if training != Training():
            upload.setdefault('training', training)
        upload.setdefault('metrics', metrics_of(training, checkpoint, use_ema))
        upload.setdefault('class_means', class_means_of(checkpoint))
        weights = wrapped.pretrained_cfg.get('hf_hub_id') or ''
        is_pretrained = getattr(checkpoint.args, 'pretrained', None)
        if is_pretrained and weights.startswith('timm/') and upload.get('base_model') is None:
            upload['base_model'] = weights
        if is_pretrained is False and upload.get('license') is None:
            upload['license'] = ''  # trained from scratch: the licence of timm's weights does not apply
    if head_only:
        return push_head_to_hub(wrapped, repo_id, **upload)
    return push_model_to_hub(wrapped, repo_id, folded=folded, model_args=arguments, **upload)
