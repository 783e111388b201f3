"""How near classes stand to each other."""
import math

import torch

__all__ = ['margins']

_BLOCK = 2 ** 24  # scores at a time: 64 MB


def margins(class_prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each class's angle to the nearest other class's prototype (C,), float32, in degrees, and that class (C,).

    An embedding is classified rightly as long as it is within half that angle of its prototype.

    Args:
        class_prototypes: (C, d) unit rows, at least two.
    """
    rows = max(1, _BLOCK // len(class_prototypes))
    cosines, nearest = [], []
    for begin in range(0, len(class_prototypes), rows):
        block = class_prototypes[begin:begin + rows] @ class_prototypes.t()
        index = torch.arange(len(block))
        block[index, begin + index] = -math.inf
        best = block.max(dim=1)
        cosines.append(best.values)
        nearest.append(best.indices)
    return torch.rad2deg(torch.cat(cosines).clamp(-1, 1).acos()), torch.cat(nearest)
