"""Clock: how far a training has come, in batches, epochs and shares."""
import math
import re
from dataclasses import dataclass

from ..values import plain_value

__all__ = ['Clock', 'Duration']

_UNITS = ('batches', 'epochs', 'share')


@dataclass(frozen=True)
class Duration:
    """A part of a training: a number of batches, of epochs, or a share of the whole.

    Args:
        count: Batches or epochs, or a share above 0 and below 1. math.inf batches never pass.
        unit: 'batches', 'epochs' or 'share'.

    Raises:
        ValueError: The unit is unknown, or the count is out of range.
    """
    count: float
    unit: str = 'batches'

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f'unit must be one of {", ".join(_UNITS)}, not {self.unit!r}.')
        if not (0 < self.count < 1 if self.unit == 'share' else self.count >= 1):
            raise ValueError(f'a duration must be at least 1 batch or epoch, or a share between 0 and 1, not '
                             f'{self.count} {self.unit}.')

    @classmethod
    def of(cls, given: 'Duration | float | str', name: str = 'duration') -> 'Duration':
        """Return the duration that a number or a text stands for.

        Args:
            given: A number of batches; '2000 batches'; '5 epochs'; 'half' or '30 %' of the training; math.inf.
            name: Of the argument, for errors.

        Raises:
            ValueError: It is none of these.
        """
        if isinstance(given, Duration):
            return given
        given = plain_value(given)
        text = str(given).strip()
        found = re.fullmatch(r'(\d+) ?(batch|batches|epoch|epochs|)', text)
        share = re.fullmatch(r'(\d+(?:\.\d+)?) ?%', text)
        try:
            if text == 'half':
                return cls(0.5, 'share')
            if text == 'inf':
                return cls(math.inf)
            if found and not isinstance(given, bool):
                return cls(int(found[1]), 'epochs' if found[2].startswith('epoch') else 'batches')
            if share:
                return cls(float(share[1]) / 100, 'share')
        except ValueError:
            pass
        raise ValueError(f"{name} must be a number of batches >= 1, '5 epochs', 'half' or '30 %' of the training, "
                         f"or math.inf, not {given!r}. (To train without a warm-up, use warmup='none'.)")

    def __str__(self) -> str:
        if self.unit == 'share':
            return f'{100 * self.count:g} % of the training'
        return f'{self.count:g} {self.unit}'


class Clock:
    """Counts the batches and epochs of a training.

    Args:
        total: Length of the training in batches or epochs, which shares refer to; None where it is not known.

    Raises:
        ValueError: `total` is a share.
    """

    def __init__(self, total: Duration | None = None):
        self.batches: int = 0
        self.epochs: int = 0
        self.epoch_began: int = 0  # after so many batches
        self.epoch_length: int = 0  # batches of the last epoch
        self.settled_batch: int = 0  # the counts when the warm-up ended
        self.settled_epoch: int = 0
        self.total = total

    @property
    def total(self) -> Duration | None:
        """Length of the training, in batches or epochs."""
        return self._total

    @total.setter
    def total(self, total: 'Duration | float | str | None') -> None:
        total = None if total is None else Duration.of(total, 'total')
        if total is not None and total.unit == 'share':
            raise ValueError(f'total must be a number of batches or epochs, not {total}.')
        self._total = total

    def count(self, unit: str) -> int:
        """Count one more batch or epoch ('batches' or 'epochs'), and return how many there are now."""
        if unit == 'epochs':
            self.epochs += 1
            self.epoch_began, self.epoch_length = self.batches, self.batches - self.epoch_began
            return self.epochs
        self.batches += 1
        return self.batches

    def measures(self, duration: Duration, interval: Duration) -> bool:
        """Return whether a duration can be measured: a share needs `total`; epochs need a total or an interval in
        epochs, which show that epochs are told."""
        if duration.unit == 'share':
            return self.total is not None
        return duration.unit == 'batches' or 'epochs' in (interval.unit, self.total and self.total.unit)

    def resolve(self, duration: Duration) -> Duration:
        """Return a duration in batches or epochs: of a share that part of `total`, at least 1.

        Raises:
            ValueError: It is a share, and `total` is not known.
        """
        if duration.unit != 'share':
            return duration
        if self.total is None:
            raise ValueError(f'{duration} needs the length of the training: give total, its number of batches or '
                             f"'N epochs'.")
        return Duration(max(1, math.floor(duration.count * self.total.count)), self.total.unit)

    def reached(self, duration: Duration) -> bool:
        """Return whether a duration, in whatever unit, has passed since the training began."""
        duration = self.resolve(duration)
        return (self.epochs if duration.unit == 'epochs' else self.batches) >= duration.count

    def settle(self) -> None:
        """Note that the warm-up is over. Of an epoch that is under way the rest does not count as one."""
        self.settled_batch = self.batches
        self.settled_epoch = self.epochs + (self.batches > self.epoch_began)

    def since_settled(self, unit: str) -> int:
        """Return how many whole 'batches' or 'epochs' have passed since the warm-up ended."""
        return self.epochs - self.settled_epoch if unit == 'epochs' else self.batches - self.settled_batch

    def state_dict(self) -> dict[str, int]:
        """Return the numbers that were counted."""
        return {'batches': self.batches, 'epochs': self.epochs, 'epoch_began': self.epoch_began,
                'epoch_length': self.epoch_length, 'settled_batch': self.settled_batch,
                'settled_epoch': self.settled_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a checked state."""
        for name in self.state_dict():
            setattr(self, name, state[name])

    def check_state(self, state: dict[str, int]) -> None:
        """Raise a ValueError unless a state has all the numbers."""
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise ValueError(f'the saved state of the clock must have {", ".join(self.state_dict())}.')

    def share_of(self, duration: Duration) -> float | None:
        """Return which share of a duration from the beginning has passed, from 0 to 1; None where it never passes.

        Of the first epoch nobody knows how long it is: its share is 0 until it is over.
        """
        duration = self.resolve(duration)
        if math.isinf(duration.count):
            return None
        passed: float = self.batches
        if duration.unit == 'epochs':
            passed = self.epochs + (min(1, (self.batches - self.epoch_began) / self.epoch_length)
                                    if self.epoch_length else 0)
        return min(1.0, passed / duration.count)
