"""Where the points go: K fixed unit vectors in d dimensions, spread as evenly as can be."""
import torch

from .closed_form import regular_polygon, regular_simplex
from .uniform import minimise_uniformity, uniformity

__all__ = ['check_prototypes', 'make_prototypes', 'uniformity', 'unit_rows']


def make_prototypes(num_prototypes: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    """Spread K points on the unit sphere of R^d.

    A regular simplex in closed form where K <= d + 1, a regular polygon in the plane, and elsewhere a minimum of the
    paper's uniformity objective, `log mean_{i<j} exp(-2 |p_i - p_j|^2)` (DL2PA, Eq. 4-5, after Wang & Isola 2020), by
    L-BFGS. Both closed forms are minima of that objective too (Cohn & Kumar 2007, "Universally optimal distribution of
    points on spheres"). The optimisation converges in seconds at hundreds of points; at thousands its iterations are
    rationed (see `minimise_uniformity`), and beyond ten thousand the result is its start, randomly rotated
    cross-polytopes. The objective is an average: where K is very large for d (a thousand points in three dimensions),
    it is hardly higher when two of the points nearly touch.

    On one machine, with one number of threads, the result depends on the arguments alone; elsewhere rounding may
    differ. The global random states of torch and numpy are neither read nor written.

    Args:
        num_prototypes: K, the number of points, at least 1.
        dim: d, the dimension of the space, at least 1.
        seed: Seed of the points' own generator: of the rotation of a closed form, of the start of the optimisation.

    Returns:
        Unit rows (K, d), float32, on the CPU.

    Raises:
        ValueError: `num_prototypes` or `dim` is below 1, or more than two points are asked for in one dimension.
    """
    if num_prototypes < 1 or dim < 1:
        raise ValueError(f'num_prototypes and dim must be at least 1, not {num_prototypes} and {dim}.')
    if dim == 1 and num_prototypes > 2:
        raise ValueError(f'dim=1 has room for 2 distinct unit vectors, not for num_prototypes={num_prototypes}: '
                         f'take dim=2 or more.')
    if num_prototypes <= dim + 1:
        points = regular_simplex(num_prototypes, dim, seed)
    elif dim == 2:
        points = regular_polygon(num_prototypes, seed)
    else:
        points = minimise_uniformity(num_prototypes, dim, seed)
    return torch.from_numpy(points).float()


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
