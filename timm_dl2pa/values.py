"""Plain Python values of what people give: a number of numpy's or torch's becomes Python's, and its type is checked."""
import math
import reprlib
from typing import Any

__all__ = ['checked_value', 'is_kind', 'plain_value', 'real_number', 'shown', 'whole_number']

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40


def shown(value: Any) -> str:
    """Return a short text of any value for messages. Files may hold lists of lists whose whole text would never end.

    Example:
        >>> shown('word'), shown(list(range(100)))
        ("'word'", '[0, 1, 2, 3, 4, 5, ...]')
    """
    try:
        return _REPR.repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return f'a huge {type(value).__name__}'


def is_kind(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a kind; True and False are no numbers."""
    allows_bool = kinds is bool or (isinstance(kinds, tuple) and bool in kinds)
    return isinstance(value, kinds) and (allows_bool or not isinstance(value, bool))


def plain_value(value: Any) -> Any:
    """Return the Python value of a scalar of numpy or torch, and anything else as it is.

    Example:
        >>> plain_value(np.int64(3)), plain_value(torch.tensor(0.5)), plain_value('word')
        (3, 0.5, 'word')
    """
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item') and not getattr(value, 'is_meta', False):
        return value.item()
    return value


def checked_value(name: str, value: Any, kinds: type | tuple[type, ...]) -> Any:
    """Return a plain value after its type has been checked.

    Args:
        name: The name of the argument for error messages.
        value: The value.
        kinds: The types that it may have. Whole numbers are no floats unless both are named.

    Raises:
        ValueError: It has another type.
    """
    value = plain_value(value)
    if not is_kind(value, kinds):
        expected = ' or '.join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f'{name} must be {expected}, not {shown(value)}.')
    return value


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None, remedy: str = '') -> int:
    """Return a whole number of Python, numpy or torch as an int.

    Args:
        name: The name of the argument for error messages.
        value: The number. No bool, no float.
        least: The smallest value allowed.
        most: The largest value allowed.
        remedy: A sentence for the end of the error.

    Raises:
        ValueError: It is none, or out of range.
    """
    number = plain_value(value)
    if not is_kind(number, int):
        raise ValueError(f'{name} must be a whole number, not {shown(value)}.{remedy and " " + remedy}')
    _check_range(name, number, least, most, remedy)
    return number


def real_number(name: str, value: Any, least: float | None = None, most: float | None = None, remedy: str = ''
                ) -> float:
    """Return a number of Python, numpy or torch that is not NaN as a float. See `whole_number`."""
    number = plain_value(value)
    try:
        found = float(number) if is_kind(number, (int, float)) else math.nan
    except OverflowError:  # an integer beyond the largest float
        found = math.nan
    if math.isnan(found):
        raise ValueError(f'{name} must be a number, not {shown(value)}.{remedy and " " + remedy}')
    _check_range(name, number, least, most, remedy)
    return found


def _check_range(name: str, number: float, least: float | None, most: float | None, remedy: str) -> None:
    if (least is None or number >= least) and (most is None or number <= most):
        return
    bounds = f'from {least} to {most}' if None not in (least, most) else \
        f'at least {least}' if least is not None else f'at most {most}'
    raise ValueError(f'{name} must be {bounds}, not {shown(number)}.{remedy and " " + remedy}')
