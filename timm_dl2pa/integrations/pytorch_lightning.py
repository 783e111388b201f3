"""DL2PACallback for the package `pytorch_lightning`, whose callbacks `lightning` does not take, nor the other way."""
from pytorch_lightning import Callback

from .lightning_hooks import LightningHooks

__all__ = ['DL2PACallback']


class DL2PACallback(LightningHooks, Callback):
    __doc__ = LightningHooks.__doc__
