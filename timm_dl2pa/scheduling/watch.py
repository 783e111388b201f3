"""LoopWatch: notices a training loop that leaves out `step()` or `epoch_end()`, and says so once."""
import warnings

__all__ = ['LoopWatch']

# After this many signs of an epoch's end nothing but a forgotten call explains why none was told.
_SIGNS = 2
# Batches, or forwards without a step, after which a loop without any such sign is told too.
_MANY_BATCHES = 10_000
_MANY_FORWARDS = 20


class LoopWatch:
    """Counts signs that an epoch is over: `train()` or `eval()` after batches, or a batch after a smaller one.

    Args:
        needs_epochs: Whether the training is measured in epochs, so that `epoch_end()` must tell them.
    """

    def __init__(self, needs_epochs: bool):
        self.needs_epochs = needs_epochs
        self._epochs_told = False
        self._signs = 0
        self._batches = 0
        self._since_sign = 0
        self._last_size = 0
        self._forwards = 0
        self._warned = False

    def on_forward(self) -> None:
        """Note a forward in training mode."""
        self._forwards += 1
        if not self._batches and self._forwards == _MANY_FORWARDS:
            self._warn_of_steps()

    def on_drop(self) -> None:
        """Note that the forwards since the last step were no training."""
        self._forwards = 0

    def on_step(self, size: int) -> None:
        """Note a batch of `size` samples that was folded in."""
        if size > self._last_size and self._since_sign:
            self._note_sign()
        self._last_size = size
        self._batches += 1
        self._since_sign += 1
        if self._batches == _MANY_BATCHES:
            self._warn_of_epochs()

    def on_epoch(self) -> None:
        """Note that an epoch was told."""
        self._epochs_told = True

    def on_mode(self, training: bool) -> None:
        """Note a change of mode, or its repetition."""
        if self._since_sign:
            self._note_sign()
        elif not self._batches and self._forwards > 1:
            self._signs += 1
            if self._signs == _SIGNS:
                self._warn_of_steps()

    def _note_sign(self) -> None:
        self._since_sign = 0
        self._signs += 1
        if self._signs >= _SIGNS:
            self._warn_of_epochs()

    def _warn_of_epochs(self) -> None:
        if self.needs_epochs and not self._epochs_told:
            self._warn(f'{self._batches} batches were folded in and no epoch_end() came. The assignment is re-solved, '
                       f'or the warm-up ends, after epochs: call scheduler.epoch_end() after each, or give '
                       f'interval=len(loader) and a length in batches.')

    def _warn_of_steps(self) -> None:
        self._warn(f'{self._forwards} forwards in training mode came and no step(): neither class means nor '
                   f'prototypes follow the training. Call scheduler.step(targets) once for each batch.')

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f'AssignmentScheduler: {text}', stacklevel=4)
