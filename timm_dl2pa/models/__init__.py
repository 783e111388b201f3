"""timm models: replace their classifiers by DL2PA heads and fold the heads back; save, load and upload whole models."""
from .folding import fold_dl2pa
from .new_classes import add_classes
from .push import push_head_to_hub, push_model_to_hub
from .saved import load_model, save_model
from .wrapping import backbone_name, wrap_dl2pa

__all__ = ['add_classes', 'backbone_name', 'fold_dl2pa', 'load_model', 'push_head_to_hub', 'push_model_to_hub',
           'save_model', 'wrap_dl2pa']
