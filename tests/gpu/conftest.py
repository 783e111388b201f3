"""The devices of these tests: most run on the CPU too, so that few of their own faults are left for a GPU to find."""
import pytest
import torch

ON_A_GPU = pytest.param('cuda', marks=pytest.mark.gpu)


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a GPU: PyTorch sees no CUDA device')
    return torch.device(name)


@pytest.fixture(params=['cpu', ON_A_GPU])
def device(request) -> torch.device:
    return _device(request.param)


@pytest.fixture(params=[ON_A_GPU])
def cuda(request) -> torch.device:
    return _device(request.param)
