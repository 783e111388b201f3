"""`heads_of`: the DL2PA heads of a model that are in use."""
from collections.abc import Iterator

import torch.nn as nn

from .module import DL2PAHead

__all__ = ['heads_of']


def heads_of(model: nn.Module) -> list[DL2PAHead]:
    """Return the DL2PA heads of a model, the main one first.

    PEFT's `modules_to_save` keeps the original of a module beside the copies that it trains: of these versions the one
    in use counts.
    """
    modules = list(model.modules())
    unused = {part for module in modules for version in _unused_versions(module) for part in version.modules()}
    heads = [module for module in modules if isinstance(module, DL2PAHead) and module not in unused]
    return sorted(heads, key=lambda head: head.auxiliary)


def _unused_versions(module: nn.Module) -> Iterator[nn.Module]:
    children = dict(module.named_children())
    if not {'original_module', 'modules_to_save'} <= children.keys():
        return
    adapters = [] if module.disable_adapters else module.active_adapters
    versions = dict(children['modules_to_save'].named_children())
    used = next((versions[name] for name in adapters if name in versions), children['original_module'])
    yield from (version for version in (children['original_module'], *versions.values()) if version is not used)
