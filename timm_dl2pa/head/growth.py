"""Classes that a head gets later: the assignment is enlarged in place, and all else of the head stays."""
from dataclasses import replace

import torch
import torch.nn as nn

from ..assignment import check_assignment
from ..prototypes import check_prototypes
from .averages import digits_of

__all__ = ['extend_head', 'free_prototypes']


def free_prototypes(head: nn.Module) -> torch.Tensor:
    """Return the numbers of the prototypes that no class of a DL2PAHead has, (K - C,) int64, in their order."""
    is_free = torch.ones(len(head.prototypes), dtype=torch.bool, device=head.assignment.device)
    is_free[head.assignment] = False
    return is_free.nonzero().flatten()


@torch.no_grad()
def extend_head(head: nn.Module, rows: torch.Tensor, prototypes: torch.Tensor | None = None) -> None:
    """Add n classes after the C that there are: class C + i gets the prototype `rows[i]`.

    The parameters are the same tensors as before, so that an optimiser goes on. Where the prototypes of the C classes
    stay, so do their logits. A scheduler that hears of the head is detached: what it keeps is of C classes.

    Args:
        head: A DL2PAHead.
        rows: (n,) int64, prototypes that no class has, no two the same.
        prototypes: (K, d) unit rows that take the place of the head's.

    Raises:
        ValueError: They are not that. Nothing was changed.
    """
    assignment = torch.cat([head.assignment, rows.to(head.assignment)])
    check_assignment(assignment, len(assignment), len(head.prototypes))
    if prototypes is not None:
        check_prototypes(prototypes)
        if prototypes.shape != head.prototypes.shape:
            raise ValueError(f'prototypes must have the shape {tuple(head.prototypes.shape)}, not '
                             f'{tuple(prototypes.shape)}.')
    head.training_view.detach()
    head.config = replace(head.config, num_classes=len(assignment))
    head.label_names = None
    head.assignment, head.averaged_assignment = assignment, digits_of(assignment)
    head.assign(assignment, prototypes)
