"""timm's tasks and scripts: what makes its unmodified train.py move labels between prototypes."""
from ..options import PluginOptions
from .hooks import install, plugged_in, uninstall

__all__ = ['PluginOptions', 'install', 'plugged_in', 'uninstall']
