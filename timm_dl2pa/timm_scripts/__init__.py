"""timm's training tasks and scripts: the plugin that lets its unmodified train.py train a DL2PA head."""
from ..options import PluginOptions
from .hooks import install, plugged_in, uninstall

__all__ = ['PluginOptions', 'install', 'plugged_in', 'uninstall']
