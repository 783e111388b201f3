"""Which class gets which prototype: matching for a set that stays, rotation and matching in turns for one that turns."""
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
