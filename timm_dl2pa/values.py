"""Plain Python values of what people give: a number of numpy's or torch's becomes Python's, and its type is checked."""
import reprlib
from typing import Any

__all__ = ['checked_value', 'is_kind', 'plain_value', 'shown']

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
