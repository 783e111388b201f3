"""The command `timm-dl2pa finetune`: fine-tunes a pretrained timm model with a DL2PA head on a folder of images."""
from .command import run_finetune

__all__ = ['run_finetune']
