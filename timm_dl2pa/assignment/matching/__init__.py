"""The maximum assignment of a large, dense problem by way of small, sparse ones, with a proof."""
from .generation import Matching, best_matching
from .sources import Products, Scores, Table

__all__ = ['Matching', 'Products', 'Scores', 'Table', 'best_matching']
