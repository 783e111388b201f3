"""The warm-ups by their names."""
from collections.abc import Callable, Sequence

from ..head import DL2PAHead
from ..recipes import WarmupName
from .placement import PlacedWarmup
from .rotation import RotatedWarmup
from .warmup import Warmup

__all__ = ['WARMUPS', 'warmup_maker']

WARMUPS = {kind.name: kind for kind in (PlacedWarmup, RotatedWarmup)}


def warmup_maker(name: WarmupName, heads: Sequence[DL2PAHead], evenness: float | None) -> Callable[[], Warmup | None]:
    """Return a function that makes a warm-up of that name.

    Args:
        name: 'placed', 'rotated' or 'none'.
        heads: Of the model.
        evenness: For a warm-up that has such a setting.

    Raises:
        ValueError: There is no such warm-up, or it has no evenness.
    """
    if not isinstance(name, str) or (name != 'none' and name not in WARMUPS):
        raise ValueError(f'warmup must be one of {", ".join(WARMUPS)} or none, not {name!r}.')
    if evenness is not None and name != PlacedWarmup.name:
        raise ValueError(f"evenness={evenness!r} is for the warm-up 'placed', and has no meaning for {name!r}: leave "
                         f"it out.")
    if name == 'none':
        return lambda: None
    if name == PlacedWarmup.name:
        return lambda: PlacedWarmup(heads, evenness)
    return lambda: WARMUPS[name](heads)
