"""What is measured of embeddings and predictions: pure functions in blocks, without (N, C) and (N, N) matrices."""
from .accuracy import class_counts, top_k_accuracy
from .calibration import Reliability, calibration_error, fit_temperature, reliability
from .confusion import NeighbourErrors, confusions, neighbour_errors
from .detection import auroc, false_positive_rate
from .neighbours import nearest_neighbours, neighbour_blocks
from .retrieval import RetrievalMetrics, retrieval_metrics
from .softmax import SoftmaxStatistics, softmax_statistics
from .unknown import unknown_scores

__all__ = [
    'NeighbourErrors',
    'Reliability',
    'RetrievalMetrics',
    'SoftmaxStatistics',
    'auroc',
    'calibration_error',
    'class_counts',
    'confusions',
    'false_positive_rate',
    'fit_temperature',
    'nearest_neighbours',
    'neighbour_blocks',
    'neighbour_errors',
    'reliability',
    'retrieval_metrics',
    'softmax_statistics',
    'top_k_accuracy',
    'unknown_scores',
]
