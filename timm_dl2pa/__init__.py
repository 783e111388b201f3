"""Hyperspherical classification with dynamic label-to-prototype assignment (DL2PA, CVPR 2024) for timm models."""
from .alignment import AlignmentResult, align_prototypes
from .assignment import AssignmentResult, solve_assignment
from .class_means import ClassMeans
from .folding import fold_dl2pa
from .head import DL2PAConfig, DL2PAHead, default_scale
from .head_files import load_head
from .hub import load_model, save_model
from .hub_upload import push_head_to_hub, push_model_to_hub
from .losses import BalancedSoftmaxLoss, DotRegressionLoss, SquaredCosineLoss
from .models import wrap_dl2pa
from .priming import prime
from .prototypes import (
    load_prototypes,
    make_prototypes,
    max_cosine_lower_bound,
    prototype_quality,
    save_prototypes,
    uniformity,
)
from .registry import dl2pa as _dl2pa  # noqa: F401  puts 'dl2pa' into timm's registry
from .schedule import Schedule
from .scheduler import AssignmentScheduler, AssignmentUpdate

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
