"""The head: its config, neck, arithmetic in float32, training view, and the checked loading of a state dict."""
from .broadcasts import leave_out_of_broadcasts
from .config import DL2PAConfig, TrainOutput, default_scale
from .finding import heads_of, left_out_by_peft
from .growth import extend_head, free_prototypes
from .inheriting import taken_over
from .loading import check_same_assignment, check_scale_in_file, head_prefixes
from .module import DL2PAHead
from .neck import NECKS, load_neck
from .numerics import plain_tensor
from .sampling import MANY_CLASSES, NUM_SAMPLED, ClassSample, ClassSampler, first_of_each
from .view import TrainingView

__all__ = ['MANY_CLASSES', 'NECKS', 'NUM_SAMPLED', 'ClassSample', 'ClassSampler', 'DL2PAConfig', 'DL2PAHead',
           'TrainOutput', 'TrainingView', 'check_same_assignment', 'check_scale_in_file', 'default_scale',
           'extend_head', 'first_of_each', 'free_prototypes', 'head_prefixes', 'heads_of', 'leave_out_of_broadcasts',
           'left_out_by_peft', 'load_head', 'load_neck', 'plain_tensor', 'taken_over']

load_head = DL2PAHead.from_pretrained
