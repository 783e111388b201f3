import os
import sys

# Before torch and the package are imported, and for subprocesses too. Tests neither read nor fill the user's cache of
# prototypes. They run beside one another (pytest-xdist), and what they compute is small: threads of torch's and scipy's
# would wait for one another most of the time.
os.environ['TIMM_DL2PA_CACHE'] = 'off'
os.environ['OMP_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'

import pytest

# torch and the package, whose import takes seconds, are imported by fixtures: pytest-xdist's first process, which waits
# for the others to begin, runs no test.


@pytest.fixture
def generator():
    import torch
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_head():
    """Makes heads whose weights depend on nothing but the arguments: a linear neck and a fixed scale, if not given."""
    import torch

    from timm_dl2pa import DL2PAHead

    def make(in_features=12, num_classes=7, dim=4, **kwargs) -> DL2PAHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DL2PAHead(in_features, num_classes, dim, **{'neck': 'linear', 'learn_scale': False, **kwargs})

    return make


@pytest.fixture
def refuse_prototypes(monkeypatch):
    """A function from whose call on an error is raised where prototypes are made, whoever does it."""
    from timm_dl2pa import make_prototypes

    def refused(*_, **__):
        raise AssertionError('prototypes were made')

    def refuse():
        for name, module in list(sys.modules.items()):
            if name.partition('.')[0] == 'timm_dl2pa' and getattr(module, 'make_prototypes', None) is make_prototypes:
                monkeypatch.setattr(module, 'make_prototypes', refused)

    return refuse


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A small Hub on loopback, which huggingface_hub's client takes for the real one."""
    from huggingface_hub import constants, file_download

    from tests.helpers.hub_server import Hub

    with Hub() as hub:
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        for module in (constants, file_download):  # before 1.0 the latter had a copy
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE',
                                hub.url + '/{repo_id}/resolve/{revision}/{filename}', raising=False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)  # older ones have no Xet
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no token'))
        monkeypatch.delenv('HF_TOKEN', raising=False)
        # The client waits between attempts.
        monkeypatch.setattr('time.sleep', lambda _: None)
        yield hub
