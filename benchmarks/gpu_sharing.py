"""Lets processes share a GPU at the same time, by NVIDIA's MPS, where its control program is installed."""
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ['shared_gpu']

_CONTROL = 'nvidia-cuda-mps-control'
# Seconds for a first process to find the device through it.
_PATIENCE = 45


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """Start MPS for the processes that get the environment variables that this yields, and end it afterwards.

    Without it a GPU runs the kernels of one process at a time, and small ones fill little of it. Yields an empty
    dictionary where MPS is not installed, or a process does not find the device through it. Settings of the device stay
    as they are.
    """
    if shutil.which(_CONTROL) is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        variables = {'CUDA_MPS_PIPE_DIRECTORY': folder, 'CUDA_MPS_LOG_DIRECTORY': folder}
        environment = {**os.environ, **variables}
        try:
            yield variables if _works(environment) else {}
        finally:
            with suppress(subprocess.SubprocessError):
                subprocess.run([_CONTROL], input='quit\n', text=True, env=environment, timeout=10,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _works(environment: dict[str, str]) -> bool:
    try:
        subprocess.run([_CONTROL, '-d'], env=environment, check=True, timeout=10, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        subprocess.run([sys.executable, '-c', 'import torch; torch.ones(1).cuda().item()'], env=environment, check=True,
                       timeout=_PATIENCE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
