"""A head for another backbone, with the prototypes and the assignment of a trained one."""
import copy
from dataclasses import replace

import torch.nn as nn

from .config import DL2PAConfig
from .module import DL2PAHead

__all__ = ['taken_over']


def taken_over(head: DL2PAHead, config: DL2PAConfig) -> DL2PAHead:
    """Return a head with prototypes, assignment and scale of another one, and its neck where that fits.

    Args:
        head: It stays as it is.
        config: That of the head, for another number of features perhaps: then the neck is new.
    """
    head.settle()  # an average, as of EMA weights
    if head.in_features == config.in_features:
        taken = copy.deepcopy(head)
        taken.before = nn.Identity()  # layers of the other model's classifier
    else:
        taken = DL2PAHead.from_config(config, head.prototypes)
        taken.assign(head.assignment)
        if config.learn_scale:
            taken.log_scale.data.copy_(head.log_scale.data)
        config = replace(config, held_scale=None)  # what suits a new neck is not known
    taken.config = config
    return taken
