"""Checks and normalisation of prototype sets from any source."""
import torch

__all__ = ['check_prototypes', 'unit_rows']

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_prototypes(prototypes: torch.Tensor, num_classes: int | None = None) -> None:
    """Check that prototypes are finite unit rows, and enough for the classes.

    The length of a row may differ from 1 by 0.004. Prototypes that were stored in bfloat16, which changes the length by
    up to 0.002, therefore pass.

    Args:
        prototypes: (K, d) float32, float16, bfloat16 or float64, on any device.
        num_classes: C. Default: K is not checked.

    Raises:
        ValueError: The dtype is no such one, the shape is not (K, d), a row is not finite or not of unit length (the
            first one is named), or K < C.
    """
    if prototypes.dtype not in _DTYPES:
        raise ValueError(f'prototypes must be float32 (or float16, bfloat16, float64), not {prototypes.dtype}: convert '
                         f'them by .float().')
    if prototypes.ndim != 2:
        raise ValueError(f'prototypes must have the shape (K, d), not {tuple(prototypes.shape)}.')
    if not torch.isfinite(prototypes).all():
        row = int((~torch.isfinite(prototypes).all(dim=1)).nonzero()[0])
        raise ValueError(f'prototypes must be finite: row {row} is not.')
    lengths = prototypes.float().norm(dim=1)
    off = (lengths - 1).abs()
    if bool((off > 4e-3).any()):
        row = int(off.argmax())
        raise ValueError(f'prototypes must have unit rows: row {row} has length {lengths[row].item():.6g}. '
                         f'Divide each row by its length.')
    if num_classes is not None and len(prototypes) < num_classes:
        raise ValueError(f'{num_classes} classes need as many prototypes, but prototypes has {len(prototypes)} rows.')


def unit_rows(prototypes: torch.Tensor) -> torch.Tensor:
    """Normalise prototypes that passed `check_prototypes` to unit length in float32.

    Args:
        prototypes: (K, d), any floating-point dtype, on any device.

    Returns:
        (K, d) float32 rows of length 1 up to rounding. Float32 prototypes that are already of unit length (to 1e-6) are
        returned unchanged.
    """
    lengths = prototypes.double().norm(dim=1, keepdim=True)
    if prototypes.dtype == torch.float32 and bool(((lengths - 1).abs() < 1e-6).all()):
        return prototypes
    return (prototypes.double() / lengths).float()
