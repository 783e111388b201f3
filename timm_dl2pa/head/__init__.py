"""The head: its config, neck, arithmetic in float32, training view, and the checked loading of a state dict."""
from .config import DL2PAConfig, default_scale
from .loading import check_same_assignment, check_scale_in_file, head_prefixes
from .module import DL2PAHead, heads_of
from .neck import NECKS, load_neck
from .view import TrainingView

__all__ = ['NECKS', 'DL2PAConfig', 'DL2PAHead', 'TrainingView', 'check_same_assignment', 'check_scale_in_file',
           'default_scale', 'head_prefixes', 'heads_of', 'load_head', 'load_neck']

load_head = DL2PAHead.from_pretrained
