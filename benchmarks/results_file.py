"""One benchmark, one JSON file: the figures with the command, the versions and the machine that made them."""
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import scipy
import timm
import torch

import timm_dl2pa

RESULTS = Path(__file__).parent / 'results'


def environment() -> dict[str, Any]:
    """Return versions and machine, without anything that names the machine."""
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), cpu)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=RESULTS, capture_output=True, text=True)
    return {
        'cpu': cpu,
        'cores': os.cpu_count(),
        'torch_threads': torch.get_num_threads(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'timm': timm.__version__,
        'numpy': numpy.__version__,
        'scipy': scipy.__version__,
        'timm_dl2pa': timm_dl2pa.__version__,
        'commit': commit.stdout.strip() or None,
    }


def write_results(name: str, settings: dict[str, Any], results: Any) -> Path:
    """Write `results/<name>.json`. Values of options that are folders are left out of the command."""
    command = [Path(sys.argv[0]).name]
    for argument, previous in zip(sys.argv[1:], sys.argv):
        command.append('DATA' if previous == '--data-dir' else argument)
    record = {
        'command': 'python benchmarks/' + shlex.join(command),
        'settings': settings,
        'environment': environment(),
        'results': results,
    }
    path = RESULTS / f'{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + '\n')
    return path
