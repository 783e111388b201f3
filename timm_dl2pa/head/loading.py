"""Checked loading of a head's state dict: everything is checked before anything is copied."""
from dataclasses import replace
from typing import Any

import torch

from ..assignment import check_assignment, restore_whole_numbers
from ..files.tensors import check_variances
from ..prototypes import check_prototypes, unit_rows
from .config import MAX_LOG_SCALE, DL2PAConfig

__all__ = ['check_same_assignment', 'check_scale_in_file', 'check_state', 'head_prefixes']


def head_prefixes(state: dict[str, Any]) -> list[str]:
    """Return the prefixes of the DL2PA heads in a state dict ('head.', say; '' for that of a head alone): those under
    which there are prototypes and an assignment."""
    names = (name.removesuffix('prototypes') for name in state
             if name == 'prototypes' or name.endswith('.prototypes'))
    return [prefix for prefix in names if prefix + 'assignment' in state]


def check_same_assignment(state: dict[str, torch.Tensor]) -> None:
    """Check that all heads of a model have one assignment and one set of prototypes.

    Args:
        state: The state dict of the model.

    Raises:
        ValueError: Two heads differ.
    """
    first, *others = head_prefixes(state) or ['']
    for prefix in others:
        for name in ('assignment', 'prototypes'):
            if not torch.equal(state[first + name], state[prefix + name]):
                raise ValueError(f'{prefix}{name} differs from {first}{name}: all heads of a model share one '
                                 f'assignment and one set of prototypes.')


def check_scale_in_file(config: DL2PAConfig, tensors: dict[str, torch.Tensor], prefix: str = '') -> None:
    """Check that a file's config and its tensors do not contradict each other: a fixed scale is in both.

    Args:
        config: The config of a head.
        tensors: The tensors.
        prefix: That of the head's tensors.

    Raises:
        ValueError: They do.
    """
    if not config.learn_scale:
        scale = float(tensors[f'{prefix}scale'])
        if scale != torch.tensor(config.scale, dtype=torch.float32).item():
            raise ValueError(f'scale is {scale} in the tensors, and {config.scale} in the config.')


def check_state(
        config: DL2PAConfig,
        own: dict[str, torch.Tensor],
        given: dict[str, torch.Tensor],
        prefix: str,
) -> tuple[dict[str, torch.Tensor], DL2PAConfig]:
    """Return what is to be loaded into a head in the place of the given tensors, and the head's config from then on.

    The tensors returned have the dtypes of the head's buffers: with `load_state_dict(assign=True)` they become those.

    Args:
        config: Of the head.
        own: Its state dict.
        given: Of its tensors those that are given.
        prefix: Of its names in the whole state dict, for errors.

    Raises:
        RuntimeError: Shapes differ, or the values are no head's.
    """
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise RuntimeError(
                f'{prefix}{name} has the shape {tuple(value.shape)} in the state dict, but this head, with '
                f'num_classes={config.num_classes}, num_prototypes={config.num_prototypes}, dim={config.dim} and '
                f'in_features={config.in_features}, has {tuple(own[name].shape)}. Make the head with the numbers '
                f'of the saved one.')
    loaded: dict[str, torch.Tensor] = {}
    try:
        # First: an average of checkpoints shows itself here, in words that say so.
        if 'assignment' in given:
            assignment = restore_whole_numbers(given['assignment'])
            check_assignment(assignment, config.num_classes, config.num_prototypes)
            loaded['assignment'] = assignment.long()
        if 'prototypes' in given:
            check_prototypes(given['prototypes'])
            prototypes = loaded['prototypes'] = unit_rows(given['prototypes'])
            if own['prototypes'].is_meta or not torch.equal(prototypes.cpu(), own['prototypes'].cpu()):
                config = replace(config, own_prototypes=True)
        if 'scale' in given:
            loaded['scale'] = given['scale'].float()
            # The config goes on telling how to build this head.
            config = replace(config, scale=float(given['scale']))
        if 'log_scale' in given and not abs(_number(given['log_scale'])) <= MAX_LOG_SCALE:
            raise ValueError(f'log_scale must be between -{MAX_LOG_SCALE} and {MAX_LOG_SCALE}, not '
                             f'{_number(given["log_scale"])}.')
        check_variances(given)
    except ValueError as error:
        raise RuntimeError(f'the state dict does not fit the DL2PA head: {prefix}{error}') from None
    return loaded, config


def _number(tensor: torch.Tensor) -> float:
    """Return the number in a tensor (1,); of one that FSDP2 has sharded, on every process."""
    return float(tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor)
