import os

# Tests neither read nor fill the user's cache of prototypes. Before the package is imported, and for subprocesses too.
os.environ['TIMM_DL2PA_CACHE'] = 'off'

import pytest
import torch

from timm_dl2pa import DL2PAHead


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_head():
    """Makes heads whose weights depend on nothing but the arguments."""

    def make(in_features=12, num_classes=7, dim=4, **kwargs) -> DL2PAHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DL2PAHead(in_features, num_classes, dim, **kwargs)

    return make
