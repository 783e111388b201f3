"""The plugin for timm's scripts: `python train.py --device-modules timm_dl2pa.plugin --model-kwargs dl2pa_dim=128 ...`.

Importing this module installs hooks in timm. `timm.create_model` then takes the dl2pa_... options, and timm's training
tasks train the models that were created with them. Other models are not affected.
"""
from .timm_scripts import install

install()
