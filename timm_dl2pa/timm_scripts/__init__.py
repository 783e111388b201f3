"""timm's tasks and scripts: what makes its unmodified train.py move labels between prototypes."""
from .hooks import install, plugged_in, uninstall
from .options import PluginOptions

__all__ = ['PluginOptions', 'install', 'plugged_in', 'uninstall']
