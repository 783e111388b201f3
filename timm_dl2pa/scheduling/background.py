"""Background: a function that runs in a thread beside the training."""
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ['Background']

T = TypeVar('T')


class Background(Generic[T]):
    """Calls a function at once, in a daemon thread: the program's exit does not wait for it.

    Args:
        function: A function without arguments. It should release Python's global lock for most of its time, as NumPy
            and PyTorch do while they compute.
    """

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name='dl2pa-solver', daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Wait for the function and return what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer
