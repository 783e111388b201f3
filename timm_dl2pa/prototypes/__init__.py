"""Prototype sets: K fixed unit vectors in d dimensions, spread as evenly as possible over the unit sphere."""
from .bounds import max_cosine_lower_bound
from .checks import check_prototypes, unit_rows
from .energy import uniformity
from .files import load_prototypes, save_prototypes
from .make import METHODS, PrototypeInfo, make_prototypes
from .optimise import OBJECTIVES
from .quality import PrototypeQuality, prototype_quality

__all__ = [
    'METHODS',
    'OBJECTIVES',
    'PrototypeInfo',
    'PrototypeQuality',
    'check_prototypes',
    'load_prototypes',
    'make_prototypes',
    'max_cosine_lower_bound',
    'prototype_quality',
    'save_prototypes',
    'uniformity',
    'unit_rows',
]
