"""timm models: their classifiers found, replaced and folded back; whole models saved, loaded and pushed."""
from .folding import fold_dl2pa
from .push import push_head_to_hub, push_model_to_hub
from .saved import load_model, save_model
from .wrapping import backbone_name, wrap_dl2pa

__all__ = ['backbone_name', 'fold_dl2pa', 'load_model', 'push_head_to_hub', 'push_model_to_hub', 'save_model',
           'wrap_dl2pa']
