"""Hyperspherical classification with dynamic label-to-prototype assignment (DL2PA, CVPR 2024) for timm models."""
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__  # noqa: F401

__all__ = [
    'AlignmentResult',
    'AssignmentResult',
    'AssignmentScheduler',
    'AssignmentUpdate',
    'BalancedSoftmaxLoss',
    'ClassMeans',
    'DL2PAConfig',
    'DL2PAHead',
    'DotRegressionLoss',
    'SampledCrossEntropyLoss',
    'Schedule',
    'SquaredCosineLoss',
    'WeightedCrossEntropyLoss',
    'add_classes',
    'align_prototypes',
    'default_scale',
    'fold_dl2pa',
    'load_head',
    'load_model',
    'load_prototypes',
    'make_prototypes',
    'max_cosine_lower_bound',
    'prime',
    'prototype_quality',
    'push_head_to_hub',
    'push_model_to_hub',
    'save_model',
    'save_prototypes',
    'solve_assignment',
    'uniformity',
    'wrap_dl2pa',
]


def _is_the_command() -> bool:
    """Return whether this process is `timm-dl2pa` or `python -m timm_dl2pa`, whose help should not wait for torch."""
    program, *arguments = getattr(sys, 'argv', None) or ['']
    if program == '-m':  # `python -m`, which imports the package before it knows the file
        return sys.orig_argv[-len(arguments) - 1] == __name__
    return os.path.splitext(os.path.basename(program))[0] == 'timm-dl2pa'


if TYPE_CHECKING or not _is_the_command():
    from .assignment import AlignmentResult, AssignmentResult, align_prototypes, solve_assignment
    from .head import DL2PAConfig, DL2PAHead, default_scale, load_head
    from .losses import (
        BalancedSoftmaxLoss,
        DotRegressionLoss,
        SampledCrossEntropyLoss,
        SquaredCosineLoss,
        WeightedCrossEntropyLoss,
    )
    from .models import (
        add_classes,
        fold_dl2pa,
        load_model,
        push_head_to_hub,
        push_model_to_hub,
        save_model,
        wrap_dl2pa,
    )
    from .models.registry import dl2pa as _dl2pa  # noqa: F401  puts 'dl2pa' into timm's registry
    from .prototypes import (
        load_prototypes,
        make_prototypes,
        max_cosine_lower_bound,
        prototype_quality,
        save_prototypes,
        uniformity,
    )
    from .scheduling import AssignmentScheduler, AssignmentUpdate, ClassMeans, Schedule, prime
else:
    # The command imports what it needs, the registry's entry before anything else. A script that it runs finds the
    # names all the same.
    def __getattr__(name: str) -> Any:
        if name in __all__:
            for room in ('assignment', 'head', 'losses', 'models', 'prototypes', 'scheduling'):
                module = import_module(f'.{room}', __name__)
                if name in module.__all__:
                    return getattr(module, name)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
