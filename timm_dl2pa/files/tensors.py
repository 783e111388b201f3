"""The tensors in a safetensors file: checked by its header, read, and checked by their values."""
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ['check_finite', 'check_variances', 'read_header', 'read_tensors', 'sha256_of']

# As safetensors names them.
_FLOAT_DTYPES = ('F16', 'BF16', 'F32', 'F64')
_WHOLE_NUMBER_DTYPES = ('I8', 'I16', 'I32', 'I64', 'U8')
_REMEDY = 'Download it again (force_download=True), or ask its owner to save it again.'


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors, without any of them having been read.

    Attributes:
        origin: The name of the source for error messages.
        shapes: The shapes by name.
        dtypes: The dtypes by name, as safetensors calls them.
    """
    origin: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def check(self, shapes: Mapping[str, tuple[int, ...]], whole_numbers: Collection[str]) -> None:
        """Check that the file has the expected tensors.

        Args:
            shapes: The shapes of all expected tensors by name.
            whole_numbers: The names of the tensors that are not of a floating-point dtype.

        Raises:
            ValueError: The file has other tensors, shapes or kinds of dtype. The first difference is named.
        """
        for name in sorted(shapes.keys() | self.shapes.keys()):
            if shapes.get(name) != self.shapes.get(name):
                problem = 'is missing' if name not in self.shapes else 'is not expected' if name not in shapes else \
                    f'has the shape {self.shapes[name]}, not {shapes[name]}'
                raise ValueError(f'{self.origin}: {WEIGHTS_NAME} does not match {CONFIG_NAME}: {name} {problem}.')
            if self.dtypes[name] not in (_WHOLE_NUMBER_DTYPES if name in whole_numbers else _FLOAT_DTYPES):
                expected = 'an integer' if name in whole_numbers else 'a floating-point'
                raise ValueError(f'{self.origin}: {name} in {WEIGHTS_NAME} must have {expected} dtype, not '
                                 f'{self.dtypes[name]}.')


def read_header(path: Path, origin: str) -> Header:
    """Read the header of a safetensors file.

    Args:
        path: The file.
        origin: The name of the source for error messages.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with safe_open(path, framework='pt') as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return Header(origin, {name: tuple(part.get_shape()) for name, part in slices.items()},
                          {name: part.get_dtype() for name, part in slices.items()})
    except SafetensorError as error:
        raise ValueError(f'{origin}: {WEIGHTS_NAME} is damaged: {error}. {_REMEDY}') from None


def read_tensors(
        path: Path,
        origin: str,
        shapes: dict[str, tuple[int, ...]],
        whole_numbers: Collection[str],
        digest: str | None,
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, after their names and shapes in its header have been checked.

    Args:
        path: The file.
        origin: The name of the source for error messages.
        shapes: The shapes of all expected tensors by name.
        whole_numbers: The names of the tensors that are not of a floating-point dtype.
        digest: The sha256 of the file, or None if it is unknown.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: The file is damaged, it has other tensors, shapes or kinds of dtype, or a value is not finite or a
            negative variance.
    """
    read_header(path, origin).check(shapes, whole_numbers)
    if digest is not None and sha256_of(path) != digest:
        raise ValueError(f'{origin}: {WEIGHTS_NAME} does not match {CONFIG_NAME}: its sha256 differs. {_REMEDY}')
    try:
        with safe_open(path, framework='pt') as file:
            # Cloned, because the file's tensors are views at arbitrary offsets, and kernels for unaligned weights round
            # differently.
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except SafetensorError as error:
        raise ValueError(f'{origin}: {WEIGHTS_NAME} is damaged: {error}. {_REMEDY}') from None
    check_finite(tensors, f'{origin}: {WEIGHTS_NAME}')
    check_variances(tensors, f'{origin}: {WEIGHTS_NAME}: ')
    return tensors


def check_finite(tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Check that all floating-point tensors are finite.

    Args:
        tensors: The tensors by name.
        origin: The name of their source for error messages.

    Raises:
        ValueError: A tensor has values that are not finite. The first one is named.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f'{origin}: {name} is not finite.')


def check_variances(tensors: Mapping[str, torch.Tensor], origin: str = '') -> None:
    """Check that no running variance of a batch norm is negative.

    Args:
        tensors: The tensors by name.
        origin: The beginning of error messages.

    Raises:
        ValueError: One is. It is named.
    """
    for name, tensor in tensors.items():
        if name.endswith('running_var') and tensor.is_floating_point() and bool((tensor < 0).any()):
            raise ValueError(f'{origin}{name} must not be negative: it holds variances.')


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file.

    Args:
        path: The file.

    Returns:
        The digest, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()
