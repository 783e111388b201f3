"""The DL2PA heads of a model that are in use, also where PEFT keeps several versions of one."""
from collections.abc import Iterator

import torch.nn as nn

from .module import DL2PAHead

__all__ = ['heads_of', 'left_out_by_peft']


def heads_of(model: nn.Module) -> list[DL2PAHead]:
    """Return the DL2PA heads of a model, the main one first.

    PEFT's `modules_to_save` keeps the original of a module beside the copies that it trains: of these versions the one
    in use counts.
    """
    modules = list(model.modules())
    unused = {part for module in modules for version in _unused_versions(module) for part in version.modules()}
    heads = [module for module in modules if isinstance(module, DL2PAHead) and module not in unused]
    return sorted(heads, key=lambda head: head.auxiliary)


def left_out_by_peft(model: nn.Module) -> list[str]:
    """Return the paths of the heads that PEFT does not save with its adapters; none outside of a PEFT model."""
    if not hasattr(model, 'peft_config'):
        return []
    kept = {part for module in model.modules() if _has_versions(module) for part in module.modules()}
    return [path for path, module in model.named_modules() if isinstance(module, DL2PAHead) and module not in kept]


def _has_versions(module: nn.Module) -> bool:
    return {'original_module', 'modules_to_save'} <= dict(module.named_children()).keys()


def _unused_versions(module: nn.Module) -> Iterator[nn.Module]:
    if not _has_versions(module):
        return
    children = dict(module.named_children())
    adapters = [] if module.disable_adapters else module.active_adapters
    versions = dict(children['modules_to_save'].named_children())
    used = next((versions[name] for name in adapters if name in versions), children['original_module'])
    yield from (version for version in (children['original_module'], *versions.values()) if version is not used)
