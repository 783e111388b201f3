"""Assign classes to prototypes: by matching, and where the set may be rotated, by matching and rotation in turns."""
from .alignment import AlignmentResult, align_prototypes
from .solve import MAX_SCORES, AssignmentResult, check_assignment, restore_whole_numbers, solve_assignment

__all__ = [
    'MAX_SCORES',
    'AlignmentResult',
    'AssignmentResult',
    'align_prototypes',
    'check_assignment',
    'restore_whole_numbers',
    'solve_assignment',
]
