"""Solve a large, dense assignment problem through small, sparse ones, with a proof of optimality."""
from .generation import Matching, best_matching
from .sources import Products, Scores, Table

__all__ = ['Matching', 'Products', 'Scores', 'Table', 'best_matching']
