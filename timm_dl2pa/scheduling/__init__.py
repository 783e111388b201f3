"""When and from what the assignment is solved: class means, warm-ups, the schedule, and a head set by features."""
from .backbone_modes import BackboneModes
from .class_means import ClassMeans, MovingClassMeans
from .clock import Clock, Duration
from .priming import Primer, prime
from .schedule import Schedule
from .scheduler import AssignmentScheduler
from .update import AssignmentUpdate
from .warmup import Warmup
from .warmups import WARMUPS

__all__ = ['WARMUPS', 'AssignmentScheduler', 'AssignmentUpdate', 'BackboneModes', 'ClassMeans', 'Clock', 'Duration',
           'MovingClassMeans', 'Primer', 'Schedule', 'Warmup', 'prime']
