"""Checks of numbers that a caller gives: Python's, NumPy's and 0-dimensional tensors are taken, all else is refused."""
import math
import numbers
import operator
from contextlib import suppress
from typing import Any

import torch

__all__ = ['real_number', 'whole_number']


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None, remedy: str = '') -> int:
    """Return a whole number as an int.

    Args:
        name: Of the argument, for the error.
        value: An int, or what stands for one (`np.int64`, a tensor () of an integer dtype). No bool, no float.
        least: Smallest value allowed.
        most: Largest value allowed.
        remedy: A sentence for the end of the error.

    Raises:
        ValueError: It is none, or out of range.
    """
    number = None
    # A tensor of several numbers raises the second or the third.
    with suppress(TypeError, RuntimeError, ValueError):
        number = None if _is_truth_value(value) else operator.index(value)
    if number is None:
        raise ValueError(f'{name} must be a whole number, not {value!r}.{_sentence(remedy)}')
    _check_range(name, number, least, most, remedy)
    return number


def real_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, remedy: str = '') -> float:
    """Return a number that is not NaN as a float.

    Args:
        name: Of the argument, for the error.
        value: A number of Python or NumPy, or a tensor () of a real dtype. No bool.
        least: Smallest value allowed.
        most: Largest value allowed. Infinity is allowed where this is infinite.
        remedy: A sentence for the end of the error.

    Raises:
        ValueError: It is none, or out of range.
    """
    if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex():
        number = float(value)
    else:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    if _is_truth_value(value) or math.isnan(number):
        raise ValueError(f'{name} must be a number, not {value!r}.{_sentence(remedy)}')
    _check_range(name, number, None if least == -math.inf else least, None if most == math.inf else most, remedy)
    return number


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, 'dtype', '')) in ('bool', 'torch.bool')


def _check_range(name: str, number: float, least: float | None, most: float | None, remedy: str) -> None:
    if (least is None or number >= least) and (most is None or number <= most):
        return
    bounds = f'from {least} to {most}' if None not in (least, most) else \
        f'at least {least}' if least is not None else f'at most {most}'
    raise ValueError(f'{name} must be {bounds}, not {number}.{_sentence(remedy)}')


def _sentence(remedy: str) -> str:
    return f' {remedy}' if remedy else ''
