"""Forwards: what a head returned in training mode since the last step, and which embeddings belong to an output."""
import torch

from ..head.numerics import unit_embeddings

__all__ = ['Forwards']

# Of how many forwards the embeddings are kept. A loop that never claims them must not fill the memory.
_KEPT = 4


class Forwards:
    """Keeps the embeddings of the forwards that no step has claimed yet, with the outputs by which they are found.

    Args:
        num_classes: C.
        dim: d.
    """

    def __init__(self, num_classes: int, dim: int):
        self.num_classes = num_classes
        self.dim = dim
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._asked_for = False

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        """Note a forward: its unit embeddings (B, d) and its output, both detached. `torch.compile` traces this.

        A forward that activation checkpointing repeats within a backward pass is not a new one.
        """
        # PyTorch's own checkpointing tells a backward pass by the same call. A compiled graph holds no repetition.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if self._asked_for:  # by a step that failed, which is over when training goes on
            self.clear()
        if len(self._kept) == _KEPT:
            self._kept.pop(0)
        self._kept.append((embeddings, output))

    def clear(self) -> None:
        """Forget them."""
        self._kept = []
        self._asked_for = False

    def embeddings_of(self, given: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings (B, d) that a step is for. If the step fails, the next forward drops them.

        Args:
            given: The output of one of the forwards, or rows of it as a slice; or embeddings (B, d) of one's own; None
                for those of the only forward.

        Raises:
            RuntimeError: None was given, and there was no forward, or more than one.
            ValueError: What was given is neither.
        """
        self._asked_for = True
        if given is None:
            return self._only()
        if not isinstance(given, torch.Tensor):
            raise ValueError(f'embeddings must be a tensor, an output of the model or embeddings (B, {self.dim}), not '
                             f'{type(given).__name__}.')
        given = given.detach()
        for embeddings, output in reversed(self._kept):
            rows = _rows_within(given, output)
            if rows is not None:  # a head on maps (B, F, H, W) has one embedding for each place
                places = len(embeddings) // max(len(output), 1) if output.ndim == 4 else 1
                return embeddings[rows] if places == 1 else embeddings.unflatten(0, (-1, places))[rows].flatten(0, 1)
        fits = given.ndim == 2 and given.shape[1] == self.dim and given.is_floating_point()
        # Where C = d, logits have the shape of embeddings.
        if not fits or (self.dim == self.num_classes and not _has_unit_rows(given)):
            raise ValueError(f'embeddings must be an output of the model since the last step() (itself or a slice of '
                             f'it: a copy cannot be told apart), or unit embeddings (B, {self.dim}), not a tensor of '
                             f'the shape {tuple(given.shape)} and the dtype {given.dtype}.')
        return unit_embeddings(given)

    def _only(self) -> torch.Tensor:
        if not self._kept:
            raise RuntimeError('step() found no embeddings: call it once after each forward of the model in training '
                               'mode. (A newer scheduler takes them over; a copy of a model reports to no scheduler. '
                               'With PEFT, make the scheduler after get_peft_model.)')
        if len(self._kept) > 1:
            number = f'at least {_KEPT}' if len(self._kept) == _KEPT else len(self._kept)
            raise RuntimeError(f'{number} forwards in training mode came since the last step(), which cannot know '
                               f'which of them the targets are for: pass that output of the model as '
                               f'step(targets, embeddings=output), or call step() after each forward.')
        return self._kept[0][0]


def _has_unit_rows(rows: torch.Tensor) -> bool:
    return bool(((rows.float().norm(dim=1) - 1).abs() < 0.01).all())


def _rows_within(part: torch.Tensor, whole: torch.Tensor) -> slice | None:
    """Return which rows of a tensor another one is, by the memory that it shares with it; None if it is none."""
    if part.shape[1:] != whole.shape[1:] or part.dtype != whole.dtype or part.stride()[1:] != whole.stride()[1:]:
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    height = whole.stride(0)
    first, rest = divmod(part.storage_offset() - whole.storage_offset(), height) if height else (0, 0)
    step = part.stride(0) // height if height and len(part) > 1 else 1
    if rest or first < 0 or step < 1 or first + step * (len(part) - 1) >= len(whole):
        return None
    return slice(first, first + step * (len(part) - 1) + 1, step)
