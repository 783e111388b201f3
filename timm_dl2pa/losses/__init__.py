"""The paper's two losses, on what a DL2PA head returns in training, and cross-entropies for long tails."""
from .balanced_softmax import BalancedSoftmaxLoss
from .class_weights import ClassWeights
from .prototype_losses import DotRegressionLoss, SquaredCosineLoss
from .weighted_cross_entropy import WeightedCrossEntropyLoss

__all__ = ['BalancedSoftmaxLoss', 'ClassWeights', 'DotRegressionLoss', 'SquaredCosineLoss', 'WeightedCrossEntropyLoss']
