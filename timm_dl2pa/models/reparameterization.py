"""timm's reparameterisation for inference (`validate.py --reparam`): it fuses the backbone, and no head."""
import torch.nn as nn

from ..head import DL2PAHead

__all__ = ['fuse_around_heads', 'fuse_everything']

# The methods that timm.models.reparameterize_model calls, and the models' own fuse().
_METHODS = ('fuse', 'reparameterize', 'switch_to_deploy')


class _Unchanged:
    """Such a method of a module around or before a head.

    timm's own (of RepViT's and LeViT's classifiers, for example) multiplies the layers before the logits into one
    linear layer, which a head is not.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        """Return the module as it is."""
        return self.module


def fuse_around_heads(model: nn.Module) -> None:
    """Let timm fuse all of a model but the classifiers that hold a head, or stand before one.

    Args:
        model: A wrapped model. Attributes of its modules are set.
    """
    for module in model.modules():
        if module is model:
            continue
        is_around = any(isinstance(part, DL2PAHead) for part in module.modules())
        for part in [module.before] if isinstance(module, DL2PAHead) else [module] if is_around else []:
            for name in _METHODS:
                if hasattr(part, name):
                    setattr(part, name, _Unchanged(part))


def fuse_everything(model: nn.Module) -> None:
    """Undo `fuse_around_heads`.

    Args:
        model: A model whose heads have been replaced.
    """
    for module in model.modules():
        for name in _METHODS:
            if isinstance(vars(module).get(name), _Unchanged):
                delattr(module, name)
