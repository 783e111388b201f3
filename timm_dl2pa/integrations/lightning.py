"""DL2PACallback for the package `lightning`."""
from lightning.pytorch import Callback

from .lightning_hooks import LightningHooks

__all__ = ['DL2PACallback']


class DL2PACallback(LightningHooks, Callback):
    __doc__ = LightningHooks.__doc__
