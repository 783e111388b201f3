"""What `prime` takes as a batch, and `as_labels` as targets."""
import numpy as np
import pytest
import timm
import torch

from timm_dl2pa import DL2PAHead, prime, wrap_dl2pa
from timm_dl2pa.losses.targets import as_labels

LABELS = torch.arange(12) % 4


class Named(torch.Tensor):
    """As fastai's and torchvision's: two such subclasses refuse to meet in one operation."""


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize('given', [
    LABELS.tolist(), tuple(LABELS.tolist()), list(LABELS), LABELS.numpy(), LABELS.numpy().astype(np.uint8),
    LABELS.to(torch.int32), LABELS.as_subclass(Named)])
def test_labels_of_every_kind(given):
    found = as_labels(given)
    assert type(found) is torch.Tensor and found.dtype == torch.int64 and torch.equal(found, LABELS)


def test_plain_labels_and_soft_targets_are_taken_as_they_are():
    soft = torch.rand(3, 4, dtype=torch.float64)
    assert as_labels(LABELS) is LABELS and as_labels(soft) is soft
    assert torch.equal(as_labels(soft.tolist()), soft) and torch.equal(as_labels(soft.numpy()), soft)


@pytest.mark.parametrize('given, message', [
    (LABELS.float(), r'class indices \(int64\), not torch.float32'),
    (LABELS.numpy() / 1.0, r'class indices \(int64\), not torch.float64'),
    ([0.0, 1.0], 'not torch.float64'), (LABELS.bool(), 'not torch.bool'), (torch.zeros(3, 4) * 1j, 'not torch.complex'),
    (['cat', 'dog'], 'list of numbers, not a list'), ('cat', 'not a str'), (None, 'not a NoneType'),
    ([[1, 2], [3]], 'not a list')])
def test_what_is_no_label(given, message):
    with pytest.raises(ValueError, match=message):
        as_labels(given)


def new_head():
    torch.manual_seed(0)
    return DL2PAHead(6, 4, 3, neck='linear')


def primed(batch):
    head = new_head()
    prime(head, [batch], progress=False)
    return head.state_dict()


def test_batches_of_every_kind(generator):
    x = torch.randn(12, 6, generator=generator)
    expected = primed((x, LABELS))
    for batch in ([x, LABELS, 'path'], (x.numpy(), LABELS.tolist()), {'pixel_values': x, 'labels': LABELS},
                  {'image': x, 'label': LABELS.numpy()}, (x.as_subclass(Named), LABELS.as_subclass(Other))):
        assert all(torch.equal(value, expected[name]) for name, value in primed(batch).items())


@pytest.mark.parametrize('batch, message', [
    ({'pixels': 0, 'labels': LABELS}, 'a mapping of pixels, labels: it must have one of pixel_values'),
    (torch.zeros(12, 6), r'pair \(images, targets\) or a mapping, not a Tensor'),
    ((torch.zeros(12, 6),), 'not a tuple of 1'), ((torch.zeros(12, 6), LABELS.float()), 'must be class indices')])
def test_what_is_no_batch(batch, message):
    head = new_head()
    with pytest.raises(ValueError, match=message):
        prime(head, [batch], progress=False)
    assert head.training_view.on_features is None and head.training


@pytest.mark.timm
def test_naflex_batches(generator):
    model = timm.create_model('naflexvit_base_patch16_gap', num_classes=4, depth=1, embed_dim=32, num_heads=2)
    model = wrap_dl2pa(model, 3)
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing='ij'), dim=-1).reshape(1, 6, 2)
    patches = {'patches': torch.randn(12, 6, 768, generator=generator), 'patch_coord': places.expand(12, -1, -1),
               'patch_valid': torch.ones(12, 6, dtype=torch.bool)}
    assert 0 < prime(model, [(patches, LABELS)], progress=False) <= 1
