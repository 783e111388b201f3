"""Hyperspherical classification with dynamic label-to-prototype assignment (DL2PA, CVPR 2024) for timm models."""
from .assignment.alignment import AlignmentResult, align_prototypes
from .assignment.solve import AssignmentResult, solve_assignment
from .head.head import DL2PAConfig, DL2PAHead, default_scale
from .head.head_files import load_head
from .losses import BalancedSoftmaxLoss, DotRegressionLoss, SquaredCosineLoss
from .models.folding import fold_dl2pa
from .models.push import push_head_to_hub, push_model_to_hub
from .models.registry import dl2pa as _dl2pa  # noqa: F401  puts 'dl2pa' into timm's registry
from .models.saved import load_model, save_model
from .models.wrapping import wrap_dl2pa
from .prototypes import (
    load_prototypes,
    make_prototypes,
    max_cosine_lower_bound,
    prototype_quality,
    save_prototypes,
    uniformity,
)
from .scheduling.class_means import ClassMeans
from .scheduling.priming import prime
from .scheduling.schedule import Schedule
from .scheduling.scheduler import AssignmentScheduler, AssignmentUpdate

__version__ = '0.1.0'

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
    'Schedule',
    'SquaredCosineLoss',
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
