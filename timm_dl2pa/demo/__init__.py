"""The command `timm-dl2pa demo`: trains one small backbone with five heads on the same batches of real images."""
from .command import run_demo

__all__ = ['run_demo']
