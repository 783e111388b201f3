"""Schedule: after which batches or epochs a re-solve falls due."""
import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..values import whole_number

__all__ = ['Schedule']

Unit = Literal['batches', 'epochs']
_INTERVALS = "interval must be 'epoch' or a number of batches >= 1, a Schedule or its text 'every:until,every'"


@dataclass(frozen=True)
class Schedule:
    """Says after which batches, or epochs, a re-solve falls due: often at first, when labels still move, rarely later.

    Args:
        stages: Pairs (every, until): up to the count `until` a re-solve falls due after every `every`, counted from the
            end of the stage before. With None for `until` the last stage never ends.
        unit: 'batches' or 'epochs', what is counted.

    Raises:
        ValueError: There is no stage, an `every` is below 1, `until` does not rise, or the unit is unknown.

    Example:
        >>> schedule = Schedule(((100, 1000), (1000, None)))
        >>> schedule == Schedule.of('100:1000,1000')        # the text, which any `interval` takes
        True
        >>> [count for count in range(1, 3001) if schedule.due(count)][8:]
        [900, 1000, 2000, 3000]
    """
    stages: tuple[tuple[int, int | None], ...]
    unit: Unit = 'batches'

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be 'batches' or 'epochs', not {self.unit!r}.")
        if not self.stages:
            raise ValueError('stages must have at least one pair (every, until).')
        begin = 0
        for number, (every, until) in enumerate(self.stages):
            if whole_number(f'stages: every of stage {number}', every) < 1:
                raise ValueError(f'stages must have every >= 1, not {every} in stage {number}.')
            if until is not None:
                whole_number(f'stages: until of stage {number}', until)
            last = number + 1 == len(self.stages)
            if (until is None and not last) or (until is not None and until <= begin):
                raise ValueError(f'stages must end one after the other: stage {number} ends at {until}, after {begin}.')
            begin = until

    @classmethod
    def of(cls, interval: 'int | str | Schedule') -> 'Schedule':
        """Return the schedule that an interval stands for.

        Args:
            interval: A number of batches; 'epoch'; a text 'every:until,every:until,every' in batches, or in epochs if
                ' epochs' follows; a schedule itself.

        Raises:
            ValueError: It is none of these.
        """
        if isinstance(interval, Schedule):
            return interval
        if interval == 'epoch':
            return cls(((1, None),), 'epochs')
        if not isinstance(interval, str):
            try:
                return cls(((whole_number('interval', interval, least=1), None),))
            except ValueError:
                raise ValueError(f'{_INTERVALS}, not {interval!r}.') from None
        found = re.fullmatch(r'((?:\d+:\d+,)*\d+(?::\d+)?)( ?epochs)?', interval)
        if not found:
            raise ValueError(f'{_INTERVALS}, not {interval!r}.')
        pairs = [stage.split(':') for stage in found[1].split(',')]
        try:
            return cls(tuple((int(pair[0]), int(pair[1]) if pair[1:] else None) for pair in pairs),
                       'epochs' if found[2] else 'batches')
        except ValueError as error:
            raise ValueError(f'interval must not be {interval!r}: {error}') from None

    def due(self, count: int, since: int | None = None) -> bool:
        """Return whether a re-solve falls due after `count` batches, or epochs.

        Args:
            count: Since the training began.
            since: Since the class means began, which last for a whole interval at least. Default: `count`.
        """
        begin = 0
        for every, until in self.stages:
            if until is None or count <= until:
                return (count - begin) % every == 0 and (since is None or since >= every)
            begin = until
        return False

    def __str__(self) -> str:
        if self == Schedule.of('epoch'):
            return 'epoch'
        parts = [f'{every}' if until is None else f'{every} (up to {until})' for every, until in self.stages]
        return f'{", then ".join(parts)} {self.unit}'
