"""Class weights by the classes' frequency, in the script's criterion and in our losses."""
import pytest
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask

from tests.helpers.stand_in import CLASSES, batches, make_model, train
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = pytest.mark.timm


@pytest.fixture(autouse=True)
def plugin():
    with plugged_in():
        yield


def expected_weights(counts):
    return sum(counts) / (len(counts) * torch.tensor(counts))


def weights_of(task):
    counts = task.criterion.class_weights.counts
    return counts.mean() / counts


def counts_after(epochs):
    labels = torch.cat([labels for epoch in range(epochs) for _, labels in batches(epoch)])
    return (torch.bincount(labels, minlength=CLASSES) + 1.0).tolist()


@pytest.mark.parametrize('criterion', [LabelSmoothingCrossEntropy(0.1), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_training_weighs_its_classes(tmp_path, criterion):
    task = train(tmp_path, epochs=1, criterion=criterion, dl2pa_dim=3, dl2pa_class_weights='auto')
    assert torch.allclose(weights_of(task), expected_weights(counts_after(1)))
    plain = train(tmp_path / 'plain', epochs=1, criterion=criterion, dl2pa_dim=3)
    assert isinstance(plain.criterion, type(criterion)) and plain.losses != task.losses
    # The first batch: the weighted mean by what was counted until then, that batch included.
    with torch.no_grad():
        images, labels = next(batches(0))
        logits = make_model(dl2pa_dim=3).train()(images)
        counts = (torch.bincount(labels, minlength=CLASSES) + 1.0).tolist()
        loss = nn.functional.cross_entropy(logits, labels, expected_weights(counts), label_smoothing=0.1)
    assert task.losses[0] == pytest.approx(loss.item(), rel=1e-4)


def test_soft_targets(tmp_path):
    task = train(tmp_path, epochs=1, criterion=SoftTargetCrossEntropy(), dl2pa_dim=3, dl2pa_class_weights='auto',
                 mixup=lambda images, labels: (images, nn.functional.one_hot(labels, CLASSES).float()))
    assert torch.allclose(weights_of(task), expected_weights(counts_after(1)))


@pytest.mark.parametrize('criterion, reason', [
    (BinaryCrossEntropy(), 'BinaryCrossEntropy is no cross-entropy'), (JsdCrossEntropy(), 'JsdCrossEntropy is no'),
    (nn.CrossEntropyLoss(weight=torch.ones(CLASSES)), 'CrossEntropyLoss has weights of its own')])
def test_criteria_that_take_none_are_refused(criterion, reason):
    model = make_model(dl2pa_dim=3, dl2pa_class_weights='auto')
    with pytest.raises(ValueError, match=reason):
        ClassificationTask(model, criterion=criterion)


@pytest.mark.parametrize('loss', ['squared_cosine', 'dot_regression', 'sampled_cross_entropy', 'balanced_softmax'])
def test_our_losses_get_them(tmp_path, loss):
    task = train(tmp_path, epochs=2, dl2pa_dim=3, dl2pa_loss=loss, dl2pa_class_weights='auto')
    assert weights_of(task).tolist() == pytest.approx(expected_weights(counts_after(2)).tolist())
    plain = train(tmp_path / 'plain', epochs=2, dl2pa_dim=3, dl2pa_loss=loss)
    assert plain.losses != task.losses


def test_the_counts_are_resumed(tmp_path):
    options = dict(dl2pa_dim=3, dl2pa_class_weights='auto')
    unbroken = train(tmp_path / 'unbroken', epochs=2, **options)
    train(tmp_path / 'broken', epochs=2, stop_after=1, **options)
    resumed = train(tmp_path / 'broken', epochs=2, resume=tmp_path / 'broken' / 'last.pth.tar', **options)
    assert torch.equal(weights_of(resumed), weights_of(unbroken))
    assert resumed.losses == unbroken.losses[4:]


def test_the_sampled_cross_entropy_is_the_scripts_of_all_classes(tmp_path):
    """Its label smoothing too; here all are sampled."""
    plain = train(tmp_path / 'plain', epochs=1, dl2pa_dim=3, criterion=LabelSmoothingCrossEntropy(0.2))
    task = train(tmp_path, epochs=1, dl2pa_dim=3, criterion=LabelSmoothingCrossEntropy(0.2),
                 dl2pa_loss='sampled_cross_entropy')
    assert task.dl2pa_heads[0].train_output == 'embeddings'
    assert task.losses == pytest.approx(plain.losses, rel=1e-3)


def test_the_samples_of_classes_are_resumed(tmp_path):
    options = dict(dl2pa_dim=3, dl2pa_loss='sampled_cross_entropy', dl2pa_num_sampled=1)
    unbroken = train(tmp_path / 'unbroken', epochs=2, **options)
    train(tmp_path / 'broken', epochs=2, stop_after=1, **options)
    resumed = train(tmp_path / 'broken', epochs=2, resume=tmp_path / 'broken' / 'last.pth.tar', **options)
    assert resumed.losses == unbroken.losses[4:]
