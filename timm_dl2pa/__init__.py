"""Hyperspherical classification with dynamic label-to-prototype assignment (DL2PA, CVPR 2024) for timm models."""
from .alignment import AlignmentResult, align_prototypes
from .assignment import AssignmentResult, solve_assignment
from .class_means import ClassMeans
from .head import DL2PAConfig, DL2PAHead, default_scale
from .hub import load_model, save_model
from .losses import DotRegressionLoss, SquaredCosineLoss
from .models import wrap_dl2pa
from .priming import prime
from .prototypes import make_prototypes, uniformity
from .scheduler import AssignmentScheduler, AssignmentUpdate

__version__ = '0.1.0'

__all__ = [
    'AlignmentResult',
    'AssignmentResult',
    'AssignmentScheduler',
    'AssignmentUpdate',
    'ClassMeans',
    'DL2PAConfig',
    'DL2PAHead',
    'DotRegressionLoss',
    'SquaredCosineLoss',
    'align_prototypes',
    'default_scale',
    'load_model',
    'make_prototypes',
    'prime',
    'save_model',
    'solve_assignment',
    'uniformity',
    'wrap_dl2pa',
]
