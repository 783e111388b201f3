"""The names of the classes, in the forms in which people hold them."""
from collections.abc import Mapping, Sequence
from typing import Any

from ..values import is_kind, plain_value

__all__ = ['LabelNames', 'read_label_names']

LabelNames = Sequence[str] | Mapping[Any, Any]


def read_label_names(given: Any, num_classes: int, where: str = 'label_names') -> list[str] | None:
    """Return the names of the classes in the order of their indices.

    Args:
        given: C names: a list, tuple or array of them, by index; a mapping from index to name (`id2label`, whose
            indices may be strings, as JSON has them); a mapping from name to index (`label2id`, `class_to_idx`);
            or None.
        num_classes: C.
        where: The name of the argument for error messages.

    Returns:
        A list of C strings, or None if None is given.

    Raises:
        ValueError: It is nothing of that kind, the indices are not 0..C-1, or the number of names is not C.

    Example:
        >>> read_label_names({'0': 'cat', '1': 'dog'}, 2), read_label_names({'dog': 1, 'cat': 0}, 2)
        (['cat', 'dog'], ['cat', 'dog'])
    """
    if given is None:
        return None
    expected = f'{where} must be {num_classes} names, one for each class'
    if isinstance(given, Mapping):
        names = _in_order(given, num_classes, expected)
    elif hasattr(given, 'tolist') and getattr(given, 'ndim', 1) == 1:  # an array, or a column of a table
        names = given.tolist()
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes, bytearray)):
        names = list(given)
    else:
        raise ValueError(f'{expected}, not {_short(given)}: give a list of strings in the order of the class indices.')
    if len(names) != num_classes:
        raise ValueError(f'{expected}, not {len(names)}.')
    names = [plain_value(name) for name in names]
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f'{expected}: that of class {index} is {_short(name)}, which is no string.')
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{expected}: that of class {index}, {_short(name)}, is no valid Unicode.') from None
    return [str.__str__(name) for name in names]


def _in_order(given: Mapping[Any, Any], num_classes: int, expected: str) -> list[Any]:
    """Return the names in a mapping from index to name, or from name to index, by index."""
    pairs = [(plain_value(key), plain_value(value)) for key, value in given.items()]
    if pairs and all(isinstance(key, str) and is_kind(value, int) for key, value in pairs):
        pairs = [(value, key) for key, value in pairs]
    # JSON has indices as strings.
    by_index = {int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key: name
                for key, name in pairs}
    indices = [index for index in by_index if is_kind(index, int)]
    if len(indices) < len(given) or set(indices) != set(range(len(indices))):
        raise ValueError(f'{expected}: the mapping must go from the indices 0..{num_classes - 1} to names, or from '
                         f'names to these indices, each once, not {_short(given)}.')
    return [by_index[index] for index in range(len(indices))]


def _short(value: Any) -> str:
    """Return a value as error messages show it."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
