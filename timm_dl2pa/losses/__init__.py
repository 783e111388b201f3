"""The paper's two losses, on what a DL2PA head returns in training, and cross-entropies for many classes or long tails.
"""
from .balanced_softmax import BalancedSoftmaxLoss
from .class_weights import ClassWeights
from .prototype_losses import DotRegressionLoss, SquaredCosineLoss
from .sampled_cross_entropy import SampledCrossEntropyLoss
from .weighted_cross_entropy import WeightedCrossEntropyLoss

__all__ = ['BalancedSoftmaxLoss', 'ClassWeights', 'DotRegressionLoss', 'SampledCrossEntropyLoss', 'SquaredCosineLoss',
           'WeightedCrossEntropyLoss']
