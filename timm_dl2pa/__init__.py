"""Hyperspherical classification with dynamic label-to-prototype assignment (DL2PA, CVPR 2024) for timm models."""
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
