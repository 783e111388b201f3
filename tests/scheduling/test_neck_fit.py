"""A neck with something of another tool around it is primed as it should be, or not at all."""
import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_dl2pa import DL2PAHead, prime

CLASSES, FEATURES = 6, 8


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % CLASSES
    centres = 3 + torch.randn(CLASSES, FEATURES, generator=generator)
    return centres[labels] + 0.1 * torch.randn(300, FEATURES, generator=generator), labels


def new_head(neck):
    torch.manual_seed(0)
    return DL2PAHead(FEATURES, CLASSES, 4, neck=neck)


def linear_of(head):
    return head.neck[0] if isinstance(head.neck, nn.Sequential) else head.neck


@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
def test_what_is_exact_is_primed(neck):
    plain, other = new_head(neck), new_head(neck)
    parametrizations.weight_norm(linear_of(other))
    x, labels = data()
    for head in (plain, other):
        prime(head, [(x, labels)], progress=False)
    assert (other.eval()(x).argmax(1) == labels).float().mean() > 0.95
    assert torch.allclose(other(x), plain.eval()(x), atol=1e-3)
    linear_of(other).weight.sum().backward()  # still parametrised, and trainable


class NoInverse(nn.Module):
    def forward(self, x):
        return x.abs()


@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
@pytest.mark.parametrize('around, cause', [
    (parametrizations.spectral_norm, 'SpectralNorm'),
    (parametrizations.orthogonal, 'Orthogonal'),
    (lambda layer: nn.utils.parametrize.register_parametrization(layer, 'weight', NoInverse()), 'NoInverse'),
    (lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), 'L1Unstructured'),
    (lambda layer: prune.identity(layer, 'weight'), 'Identity'),
    pytest.param(weight_norm, 'WeightNorm', marks=pytest.mark.filterwarnings('ignore::FutureWarning')),
    (spectral_norm, 'SpectralNorm'),
])
def test_what_is_not_is_refused_before_the_images(neck, around, cause):
    head = new_head(neck)
    around(linear_of(head))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=f'prime cannot set the neck: .*{cause}.* Prime the model first'):
        prime(head, iter([None]), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert head.training_view.on_features is None
