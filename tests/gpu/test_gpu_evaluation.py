"""The measures on a device, beside those on the CPU in float64."""
import pytest
import torch
import torch.nn as nn

from timm_dl2pa import DL2PAHead
from timm_dl2pa.evaluate.measure import measure
from timm_dl2pa.evaluation import auroc, false_positive_rate, retrieval_metrics, unknown_scores


def problem():
    """A head for 40 classes, embeddings around their prototypes, and the labels."""
    with torch.random.fork_rng(devices=[]):
        head = DL2PAHead(16, 40, 8, neck='linear').eval()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(40, (200,), generator=generator)
    noise = nn.functional.normalize(torch.randn(200, 8, generator=generator))
    return head, nn.functional.normalize(head.class_prototypes[labels] + 0.9 * noise), labels


def test_all_measures_of_a_head(device):
    head, embeddings, labels = problem()
    expected = measure(head, embeddings, labels, queries=100, voters=5, seed=0)
    found = measure(head.to(device), embeddings, labels, queries=100, voters=5, seed=0)
    assert found.top1 == pytest.approx(expected.top1, abs=0.01) and found.near.errors == (
        found.labels != found.predictions).sum()
    assert found.calibration.temperature == pytest.approx(expected.calibration.temperature, rel=0.02)
    assert found.calibration.before.error == pytest.approx(expected.calibration.before.error, abs=0.02)
    assert found.retrieval.map_at_r == pytest.approx(expected.retrieval.map_at_r, abs=0.01)


def test_retrieval_and_scores_on_the_device(device):
    head, embeddings, labels = problem()
    exact = retrieval_metrics(embeddings.double(), labels, ks=[1, 5], knn=3)
    found = retrieval_metrics(embeddings.to(device), labels.to(device), ks=[1, 5], knn=3)
    assert found.map_at_r == pytest.approx(exact.map_at_r, abs=0.01) and found.queries == exact.queries
    for name, score in unknown_scores(embeddings.to(device), head.class_prototypes.to(device), 9.0).items():
        expected = unknown_scores(embeddings, head.class_prototypes, 9.0)[name]
        assert score.device.type == device.type and torch.allclose(score.cpu(), expected, atol=1e-4)
        other = score.flip(0) - 0.1
        assert auroc(score, other) == pytest.approx(auroc(score.cpu(), other.cpu()))
        assert false_positive_rate(score, other) == pytest.approx(false_positive_rate(score.cpu(), other.cpu()))
