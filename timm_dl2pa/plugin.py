"""The door for timm's scripts: `python train.py --device-modules timm_dl2pa.plugin --model-kwargs dl2pa_dim=128 ...`.

Importing it makes `timm.create_model` take the dl2pa_... options, and timm's training tasks train the models so made.
Models without these options, and everything that is done with them, stay as they are.
"""
from .timm_scripts import install

install()
