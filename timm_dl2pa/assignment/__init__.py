"""Assign classes to prototypes: exact matching, and rotation and matching in alternation."""
from .alignment import AlignmentResult, align_prototypes
from .checks import MAX_SCORES, check_assignment, restore_whole_numbers
from .solve import AssignmentResult, solve_assignment

__all__ = [
    'MAX_SCORES',
    'AlignmentResult',
    'AssignmentResult',
    'align_prototypes',
    'check_assignment',
    'restore_whole_numbers',
    'solve_assignment',
]
