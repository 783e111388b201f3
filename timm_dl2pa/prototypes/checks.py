"""What every prototype set must be, whoever made it."""
import torch

__all__ = ['check_prototypes', 'unit_rows']


def check_prototypes(prototypes: torch.Tensor, num_classes: int | None = None) -> None:
    """Raise a ValueError unless `prototypes` (K, d) has finite unit rows, and at least `num_classes` of them.

    A row may be off by 0.004 in length, so that points that were stored in bfloat16 (off by up to 0.002) still pass.
    """
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
    """Return checked prototypes (K, d) as float32 rows of length 1 to rounding; float32 ones that are so already as
    they are, to the bit."""
    lengths = prototypes.double().norm(dim=1, keepdim=True)
    if prototypes.dtype == torch.float32 and bool(((lengths - 1).abs() < 1e-6).all()):
        return prototypes
    return (prototypes.double() / lengths).float()
