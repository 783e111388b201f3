"""Where the plugin takes part in timm: four places, each put back on leaving.

A script has bound timm's names before it imports the plugin, so that replacing those names would change nothing: what
is replaced is what timm itself looks up when the script calls it.
"""
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import timm
import timm.models._factory as factory
import timm.utils
import torch.nn as nn

from ..options import PluginOptions

__all__ = ['install', 'plugged_in', 'uninstall']

_originals: list[tuple[Any, str, Any]] = []
# The tasks of running scripts by the folder of their checkpoints.
_tasks: WeakValueDictionary = WeakValueDictionary()


def _check_timm() -> None:
    """Raise a RuntimeError unless this timm has everything that the plugin needs."""
    missing = []
    if not hasattr(factory, 'model_entrypoint'):
        missing.append('timm.models._factory.model_entrypoint')
    try:
        from timm.task import TrainingTask
    except ImportError:
        missing.append('timm.task')
    else:
        missing += [f'TrainingTask.{name}' for name in ('get_task_state', 'load_task_state', 'update_ema')
                    if not hasattr(TrainingTask, name)]
    if 'task' not in inspect.signature(timm.utils.CheckpointSaver).parameters:
        missing.append('CheckpointSaver(task=)')
    if not hasattr(timm.utils, 'update_summary'):
        missing.append('timm.utils.update_summary')
    if missing:
        raise RuntimeError(f'timm_dl2pa.plugin works with timm 1.0.27 and newer; timm {timm.__version__} lacks '
                           f'{", ".join(missing)}.')


def install(first_model: PluginOptions | None = None) -> None:
    """Take part in timm's model creation and training tasks from now on. A second call changes nothing.

    Args:
        first_model: Options for the first model that is created without any, for scripts that pass none on.

    Raises:
        RuntimeError: This timm lacks something that is needed. Nothing was changed.
    """
    if _originals:
        return
    _check_timm()
    from timm.task import TrainingTask
    try:
        _replace(factory, 'model_entrypoint', _entrypoint_lookup(factory.model_entrypoint, first_model))
        _replace(TrainingTask, '__new__', _new_task)
        _replace(timm.utils.CheckpointSaver, '__init__', _saver_init(timm.utils.CheckpointSaver.__init__))
        _replace(timm.utils, 'update_summary', _summary(timm.utils.update_summary))
    except BaseException:
        uninstall()
        raise


def uninstall() -> None:
    """Put back what `install` replaced."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    _tasks.clear()


@contextmanager
def plugged_in(first_model: PluginOptions | None = None) -> Iterator[None]:
    """Have the plugin installed within the context only."""
    install(first_model)
    try:
        yield
    finally:
        uninstall()


def _replace(owner: Any, name: str, new: Any) -> None:
    original = getattr(owner, name)
    if name == '__new__':
        # A class that once had a __new__ of its own refuses object's with arguments, even when it is taken away again.
        original = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))
    _originals.append((owner, name, original))
    setattr(owner, name, new)


def _entrypoint_lookup(lookup: Callable, first_model: PluginOptions | None) -> Callable:
    """timm's `create_model` gets the function that makes an architecture from here."""
    waiting = [first_model] if first_model is not None else []

    @functools.wraps(lookup)
    def model_entrypoint(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
        make_backbone = lookup(*args, **kwargs)

        @functools.wraps(make_backbone)
        def make_model(**arguments: Any) -> nn.Module:
            registered = {name: arguments.pop(name) for name in ('dl2pa_backbone',) if name in arguments}
            options = PluginOptions.take(arguments)
            if options is None and waiting:
                options = waiting.pop()
            if options is None:
                return make_backbone(**arguments, **registered)
            from .creation import create_registered, create_wrapped
            if registered:
                return create_registered(make_backbone, options, **arguments, **registered)
            return create_wrapped(make_backbone, options, **arguments)

        return make_model

    return model_entrypoint


def _new_task(cls: type, *args: Any, **kwargs: Any) -> Any:
    """A training task that is given a model made with dl2pa options is of the subclass that serves it."""
    from .creation import plugin_options
    from .task import DL2PATask, task_class_for
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))
    if any(plugin_options(model) is not None for model in given) and not issubclass(cls, DL2PATask):
        cls = task_class_for(cls)
    return object.__new__(cls)


def _saver_init(init: Callable) -> Callable:
    """The checkpoint saver is what knows the run's folder; and it comes before training."""
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from .creation import plugin_options
        from .task import DL2PATask
        init(self, *args, **kwargs)
        task = getattr(self, 'task', None)
        if isinstance(task, DL2PATask):
            task.saver_made(self)
            _tasks[str(Path(self.checkpoint_dir))] = task
        elif any(plugin_options(module) is not None for module in self.model.modules()):
            raise RuntimeError(
                'this script trains without the tasks of timm.task, so that nothing would move the assignment or save '
                'its state: use the train.py of timm 1.0.27 or newer, or leave the dl2pa options out.')

    return __init__


def _summary(update_summary: Callable) -> Callable:
    """The figures of the assignment stand in timm's summary.csv, and go where the script logs that."""
    @functools.wraps(update_summary)
    def with_assignment(epoch: int, train_metrics: dict, eval_metrics: dict, filename: str, *args: Any, **kwargs: Any):
        task = _tasks.get(str(Path(filename).parent))
        if task is not None:
            train_metrics = {**train_metrics, **task.summary()}
        return update_summary(epoch, train_metrics, eval_metrics, filename, *args, **kwargs)

    return with_assignment
