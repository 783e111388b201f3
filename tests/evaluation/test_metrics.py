"""The measures against brute force in float64, scikit-learn and torchmetrics; in blocks, without large matrices."""
import doctest
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from tests.helpers.largest_output import LargestOutput
from timm_dl2pa import DL2PAHead, evaluation
from timm_dl2pa.evaluation import (
    auroc,
    calibration_error,
    class_counts,
    confusions,
    false_positive_rate,
    fit_temperature,
    nearest_neighbours,
    neighbour_errors,
    reliability,
    retrieval_metrics,
    softmax_statistics,
    top_k_accuracy,
    unknown_scores,
)
from timm_dl2pa.evaluation import neighbours as neighbours_module
from timm_dl2pa.evaluation import softmax as softmax_module

D = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return nn.functional.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def clustered(num, num_classes, noise, seed=0):
    """Embeddings around the vectors of their classes, the labels, and the vectors."""
    vectors = unit(num_classes, D, seed=seed + 1)
    labels = torch.randint(num_classes, (num,), generator=generator(seed))
    return nn.functional.normalize(vectors[labels] + noise * unit(num, D, seed=seed + 2)), labels, vectors


@pytest.fixture(scope='module', autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_module, '_ROWS', 16)
        patch.setattr(softmax_module, '_CLASSES', 5)
        patch.setattr(neighbours_module, '_ENTRIES', 100)
        patch.setattr(neighbours_module, '_COLUMNS', 7)
        yield


# --- brute force

def retrieval_reference(queries, labels, gallery, gallery_labels, own, ks, knn):
    """One query at a time, in float64, as the definitions read."""
    found = []
    for index, query in enumerate(queries.double()):
        cosines = gallery.double() @ query
        order = [place for place in cosines.argsort(descending=True).tolist() if not (own and place == index)]
        matches = [int(gallery_labels[place] == labels[index]) for place in order]
        relevant = sum(matches)
        if not relevant:
            continue
        precisions = [sum(matches[:i + 1]) / (i + 1) for i in range(relevant)]
        votes = [int(gallery_labels[place]) for place in order[:knn]]
        winner = max(votes, key=lambda label: (votes.count(label), -votes.index(label)))
        found.append([*(float(any(matches[:k])) for k in ks), float(winner == labels[index]),
                      sum(matches[:relevant]) / relevant,
                      sum(p * match for p, match in zip(precisions, matches)) / relevant])
    return np.mean(found, axis=0), len(found)


@pytest.mark.parametrize('with_gallery', [False, True])
@pytest.mark.parametrize('num, num_classes, noise', [(40, 3, 1.5), (60, 12, 0.8), (25, 20, 0.5), (9, 2, 3.0)])
def test_retrieval_is_that_of_the_definitions(num, num_classes, noise, with_gallery):
    queries, labels, _ = clustered(num, num_classes, noise)
    gallery, gallery_labels, _ = clustered(31, num_classes, noise, seed=0) if with_gallery else (queries, labels, None)
    ks, knn = [1, 3, 5], 4
    expected, count = retrieval_reference(queries, labels, gallery, gallery_labels, not with_gallery, ks, knn)
    found = retrieval_metrics(queries, labels, *((gallery, gallery_labels) if with_gallery else ()), ks=ks, knn=knn)
    assert [*found.recall.values(), found.knn_accuracy, found.r_precision, found.map_at_r] == \
        pytest.approx(expected.tolist())
    assert (found.queries, found.without_match) == (count, num - count)


def test_a_class_of_many_rows_beside_small_ones():
    queries, labels, _ = clustered(80, 10, 1.0)
    labels[20:] = 3
    expected, _ = retrieval_reference(queries, labels, queries, labels, True, [1], 3)
    found = retrieval_metrics(queries, labels, ks=[1], knn=3)
    assert [found.recall[1], found.knn_accuracy, found.r_precision, found.map_at_r] == pytest.approx(expected.tolist())


def test_a_sample_of_the_queries_searches_the_whole_gallery():
    queries, labels, _ = clustered(50, 5, 1.0)
    few = retrieval_metrics(queries, labels, ks=[1], knn=3, sample=20, seed=4)
    assert few.queries + few.without_match == 20
    assert few == retrieval_metrics(queries, labels, ks=[1], knn=3, sample=20, seed=4)
    chosen = torch.randperm(50, generator=generator(4))[:20]
    by_hand = [(labels[nearest_neighbours(queries[[row]], queries, 1, torch.tensor([row]))[1]] == labels[row]).item()
               for row in chosen.tolist()]
    assert few.recall[1] == pytest.approx(np.mean(by_hand))


def test_without_a_match_there_is_nothing_to_measure():
    assert retrieval_metrics(unit(4, D), torch.arange(4)) is None
    assert retrieval_metrics(unit(1, D), torch.zeros(1, dtype=torch.int64)) is None
    assert sorted(retrieval_metrics(unit(3, D), torch.zeros(3, dtype=torch.int64), ks=[1, 2, 9]).recall) == [1, 2]


def test_neighbours_are_those_of_all_cosines():
    queries, gallery = unit(33, D), unit(29, D, seed=5)
    expected = (queries @ gallery.T).topk(4)
    cosines, rows = nearest_neighbours(queries, gallery, 4)
    assert torch.allclose(cosines, expected.values, atol=1e-6) and torch.equal(rows, expected.indices)
    own = torch.arange(29)
    rows = nearest_neighbours(gallery, gallery, 28, own)[1]
    assert not (rows == own.unsqueeze(1)).any() and torch.equal(rows.sort(dim=1).values[0], torch.arange(1, 29))


def test_softmax_in_blocks_is_that_of_all_logits():
    embeddings, _, vectors = clustered(40, 23, 1.0)
    for scale in (0.1, 10.0, 500.0):
        logits = scale * embeddings.double() @ vectors.double().T
        found = softmax_statistics(embeddings, vectors, scale)
        assert torch.allclose(found.log_sum.double(), logits.logsumexp(1), rtol=1e-5)
        assert torch.allclose(found.expected.double(), (logits.softmax(1) * logits).sum(1), rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.confidence.double(), logits.softmax(1).amax(1), atol=1e-4)


def test_the_temperature_is_the_likeliest():
    embeddings, labels, vectors = clustered(300, 8, 1.2)
    logits = 40 * embeddings.double() @ vectors.double().T

    def loss(temperature):
        return nn.functional.cross_entropy(logits / temperature, labels).item()

    fitted = fit_temperature(embeddings, labels, vectors, 40.0)
    grid = np.exp(np.linspace(math.log(0.05), math.log(50), 4001))
    assert fitted == pytest.approx(min(grid, key=loss), rel=0.01)
    # Without an error, nothing is too confident; labels that have nothing to do with the logits ask for none at all.
    assert fit_temperature(vectors, torch.arange(8), vectors, 40.0) == 0.01
    assert fit_temperature(vectors, torch.arange(8).roll(1), vectors, 40.0) == 100.0


def test_calibration_error():
    confidence = torch.rand(500, generator=generator())
    right = torch.rand(500, generator=generator(1)) < confidence ** 2
    table = reliability(confidence, right, 10)
    total = 0.0
    for index in range(10):
        inside = (confidence > index / 10) & (confidence <= (index + 1) / 10)
        assert table.count[index] == inside.sum()
        if inside.any():
            assert table.accuracy[index] == pytest.approx(right[inside].double().mean().item())
            gap = confidence[inside].double().mean() - right[inside].double().mean()
            total += gap.abs().item() * inside.sum().item()
    assert calibration_error(confidence, right, 10) == pytest.approx(total / 500)
    assert calibration_error(torch.tensor([0.5]), torch.tensor([True]), 15) == pytest.approx(0.5)


# --- other libraries

def test_calibration_error_and_retrieval_are_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.functional', reason='torchmetrics is not installed')
    embeddings, labels, vectors = clustered(200, 7, 1.0)
    probabilities = (9 * embeddings @ vectors.T).softmax(1)
    confidence, predicted = probabilities.max(1)
    expected = metrics.classification.multiclass_calibration_error(probabilities, labels, 7, n_bins=15)
    assert calibration_error(confidence, predicted == labels) == pytest.approx(expected.item(), abs=1e-6)
    # Its R-precision is that of one query.
    cosines, found = embeddings @ embeddings.T, retrieval_metrics(embeddings, labels, ks=[5], knn=1)
    others = ~torch.eye(200, dtype=torch.bool)
    rows = [(cosines[i][others[i]], (labels == labels[i])[others[i]]) for i in range(200)]
    assert found.r_precision == pytest.approx(
        torch.stack([metrics.retrieval.retrieval_r_precision(*row) for row in rows]).mean().item(), abs=1e-6)
    assert found.recall[5] == pytest.approx(
        torch.stack([metrics.retrieval.retrieval_hit_rate(*row, top_k=5) for row in rows]).mean().item(), abs=1e-6)


def test_accuracy_and_detection_are_scikit_learns():
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is not installed')
    embeddings, labels, vectors = clustered(200, 7, 1.3)
    cosines = embeddings @ vectors.T
    order = cosines.argsort(1, descending=True)
    for k in (1, 3):
        assert top_k_accuracy(order, labels, k) == \
            pytest.approx(metrics.top_k_accuracy_score(labels, cosines, k=k, labels=range(7)))
    matrix = metrics.confusion_matrix(labels, order[:, 0])
    right, images = class_counts(order[:, 0], labels, 7)
    assert right.tolist() == matrix.diagonal().tolist() and images.tolist() == matrix.sum(1).tolist()
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    pairs = confusions(labels, order[:, 0])
    assert {(a, b): n for a, b, n in pairs} == {(a, b): wrong[a, b] for a, b in zip(*wrong.nonzero())}
    assert [n for *_, n in pairs] == sorted(wrong[wrong > 0], reverse=True)
    for digits in (9, 1):  # the second with many ties
        known, unknown = (torch.randn(n, generator=generator(n)).add(m).mul(10 ** digits).round().div(10 ** digits)
                          for n, m in ((140, 1.0), (90, 0.0)))
        scores, truth = torch.cat([known, unknown]).double(), [1] * 140 + [0] * 90
        assert auroc(known, unknown) == pytest.approx(metrics.roc_auc_score(truth, scores))
        false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
        assert false_positive_rate(known, unknown) == pytest.approx(false[true >= 0.95][0])


def test_votes_are_scikit_learns():
    sklearn = pytest.importorskip('sklearn.neighbors', reason='scikit-learn is not installed')
    gallery, gallery_labels, _ = clustered(90, 2, 1.5)
    queries, labels, _ = clustered(40, 2, 1.5, seed=0)
    voters = sklearn.KNeighborsClassifier(7, metric='cosine').fit(gallery, gallery_labels)  # odd: no ties of two
    found = retrieval_metrics(queries, labels, gallery, gallery_labels, knn=7)
    assert found.knn_accuracy == pytest.approx(voters.score(queries, labels))


# --- errors to near classes, unknown classes

def test_errors_to_near_classes():
    _, _, vectors = clustered(1, 9, 0.0)
    neighbours = nearest_neighbours(vectors, vectors, 2, torch.arange(9))[1]
    labels = torch.tensor([0, 1, 2, 3])
    far = nearest_neighbours(vectors, vectors, 8, torch.arange(9))[1][:, -1]
    predictions = torch.stack([neighbours[0, 0], neighbours[1, 1], far[2], torch.tensor(3)])
    found = neighbour_errors(labels, predictions, neighbours)
    assert (found.errors, found.near, found.by_chance) == (3, 2, 2 / 8)
    assert found.share == pytest.approx(2 / 3) and neighbour_errors(labels, labels, neighbours).share is None


def test_unknown_scores_are_those_of_all_cosines():
    embeddings, _, vectors = clustered(50, 19, 1.0)
    cosines = embeddings.double() @ vectors.double().T
    two = cosines.topk(2).values
    found = unknown_scores(embeddings, vectors, 12.0)
    expected = {'cosine': two[:, 0], 'energy': (12 * cosines).logsumexp(1), 'gap': two[:, 0] - two[:, 1],
                'probability': (12 * cosines).softmax(1).amax(1)}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].double(), expected[name], atol=1e-5) for name in expected)


# --- memory, inputs, docstrings

def test_no_matrix_of_all(monkeypatch):
    monkeypatch.setattr(neighbours_module, '_ENTRIES', 8000)
    monkeypatch.setattr(neighbours_module, '_COLUMNS', 64)
    embeddings, labels, vectors = clustered(600, 500, 1.0)
    with LargestOutput() as seen:
        retrieval_metrics(embeddings, labels)
        unknown_scores(embeddings, vectors, 5.0)
        fit_temperature(embeddings, labels, vectors, 5.0)
    assert seen.largest <= 600 * 14  # (N, C) would be 300,000 entries, (N, N) 360,000


LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize('call, message', [
    (lambda: retrieval_metrics(unit(3), LABELS), r'queries must be floats \(N, d\), not torch.float32 of the shape'),
    (lambda: retrieval_metrics(unit(3, D), LABELS[:2]), r'labels must be whole numbers \(3,\)'),
    (lambda: retrieval_metrics(unit(3, D), LABELS - 1), 'labels must be from 0, not from -1 to -1'),
    (lambda: retrieval_metrics(unit(3, D), LABELS, unit(3, D)), 'go together'),
    (lambda: retrieval_metrics(unit(3, D), LABELS, unit(3, 4), LABELS), r'gallery must be floats \(N, 6\)'),
    (lambda: retrieval_metrics(unit(3, D), LABELS, ks=[0]), 'ks must be at least 1'),
    (lambda: retrieval_metrics(unit(3, D), LABELS, sample=0), 'sample must be at least 1'),
    (lambda: nearest_neighbours(unit(3, D), unit(3, D), 3, torch.arange(3)), 'k must be from 1 to 2, not 3'),
    (lambda: softmax_statistics(unit(3, D), unit(3, D), -1), 'scale must be positive'),
    (lambda: fit_temperature(unit(3, D), LABELS + 3, unit(3, D), 1.0), 'labels must be from 0 to 2'),
    (lambda: reliability(torch.tensor([1.2]), torch.tensor([True])), 'confidence must be from 0 to 1'),
    (lambda: reliability(torch.tensor([]), torch.tensor([])), 'confidence must be at least one float'),
    (lambda: auroc(torch.tensor([float('nan')]), torch.tensor([1.0])), 'known must be finite'),
    (lambda: auroc(torch.tensor([1.0]), torch.tensor([])), 'unknown must be at least one'),
    (lambda: false_positive_rate(unit(4), unit(4), 0.0), 'recall must be above 0'),
    (lambda: unknown_scores(unit(3, D), unit(1, D), 1.0), 'at least 2 rows'),
    (lambda: top_k_accuracy(LABELS, LABELS), 'predictions must be'),
    (lambda: neighbour_errors(LABELS, LABELS, LABELS), 'neighbours must be'),
])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize('name', [name for name in evaluation.__all__
                                  if inspect.isfunction(getattr(evaluation, name))])
def test_examples_run(name):
    with torch.random.fork_rng(devices=[]):
        head = DL2PAHead(6, 30, D, neck='linear', prototypes=unit(30, D)).eval()
    names = {**{each: getattr(evaluation, each) for each in evaluation.__all__}, 'torch': torch, 'head': head,
             'embeddings': unit(8, D, seed=3)}
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(getattr(evaluation, name), name, module=False, globs=names):
        runner.run(test, out=said.append)
    assert not said, said
