"""The plugin's four hooks in timm, which can be removed again.

A script imports timm's functions before it imports the plugin, so replacing those names in timm would have no effect.
The hooks therefore replace what timm itself looks up when the script calls it.
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

# The replaced attributes: owner, name and original value.
_originals: list[tuple[Any, str, Any]] = []
# The tasks of running scripts, by the folder of their checkpoints.
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
    """Install the hooks in timm's model creation and training tasks. A second call has no effect.

    Args:
        first_model: Options for the first model that is created without options, for scripts without `--model-kwargs`.

    Raises:
        RuntimeError: The installed timm lacks something that the hooks need. Nothing was changed.
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
    """Remove the hooks of `install`."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    _tasks.clear()


@contextmanager
def plugged_in(first_model: PluginOptions | None = None) -> Iterator[None]:
    """Context manager that installs the hooks, and removes them on leaving.

    Args:
        first_model: See `install`.
    """
    install(first_model)
    try:
        yield
    finally:
        uninstall()


def _replace(owner: Any, name: str, new: Any) -> None:
    original = getattr(owner, name)
    if name == '__new__':
        # Once a class has had its own __new__, object.__new__ refuses arguments, even after the attribute was deleted.
        original = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))
    _originals.append((owner, name, original))
    setattr(owner, name, new)


def _entrypoint_lookup(lookup: Callable, first_model: PluginOptions | None) -> Callable:
    """Return a replacement for the lookup of entry points in `timm.create_model`, which takes dl2pa_... options."""
    unused_options = [first_model] if first_model is not None else []

    @functools.wraps(lookup)
    def model_entrypoint(*args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
        make_backbone = lookup(*args, **kwargs)

        @functools.wraps(make_backbone)
        def make_model(**arguments: Any) -> nn.Module:
            registry_arguments = {name: arguments.pop(name) for name in ('dl2pa_backbone',) if name in arguments}
            options = PluginOptions.take(arguments)
            if options is None and unused_options:
                options = unused_options.pop()
            if options is None:
                return make_backbone(**arguments, **registry_arguments)
            from .creation import create_registered, create_wrapped
            if registry_arguments:
                return create_registered(make_backbone, options, **arguments, **registry_arguments)
            return create_wrapped(make_backbone, options, **arguments)

        return make_model

    return model_entrypoint


def _new_task(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Replacement for `TrainingTask.__new__`: a model made with dl2pa_... options gets a subclass of `DL2PATask`."""
    from .creation import plugin_options
    from .task import DL2PATask, task_class_for
    models = (value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))
    if any(plugin_options(model) is not None for model in models) and not issubclass(cls, DL2PATask):
        cls = task_class_for(cls)
    return object.__new__(cls)


def _saver_init(init: Callable) -> Callable:
    """Return a replacement for `CheckpointSaver.__init__`, which tells the task about the saver.

    The saver is created before training, and it knows the folder of the run.
    """
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from .creation import plugin_options
        from .task import DL2PATask
        init(self, *args, **kwargs)
        task = getattr(self, 'task', None)
        if isinstance(task, DL2PATask):
            task.on_saver_created(self)
            _tasks[str(Path(self.checkpoint_dir))] = task
        elif any(plugin_options(module) is not None for module in self.model.modules()):
            raise RuntimeError(
                'this script trains without the tasks of timm.task, so that the assignment would never be updated or '
                'saved: use the train.py of timm 1.0.27 or newer, or leave out the dl2pa_... options.')

    return __init__


def _summary(update_summary: Callable) -> Callable:
    """Return a replacement for `update_summary`, which adds the figures of the assignment to timm's summary.csv."""
    @functools.wraps(update_summary)
    def with_assignment(epoch: int, train_metrics: dict, eval_metrics: dict, filename: str, *args: Any, **kwargs: Any):
        task = _tasks.get(str(Path(filename).parent))
        if task is not None:
            train_metrics = {**train_metrics, **task.summary()}
        return update_summary(epoch, train_metrics, eval_metrics, filename, *args, **kwargs)

    return with_assignment
