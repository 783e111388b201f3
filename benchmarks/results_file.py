"""One benchmark, one JSON file: the figures with the command, the versions and the machine that made them."""
import argparse
import dataclasses
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

__all__ = ['RESULTS', 'Runs', 'add_output_argument', 'command_line', 'environment', 'read_results', 'result_name',
           'write_json', 'write_results']

RESULTS = Path(__file__).parent / 'results'
# Options whose values are paths, with what stands for these in a record; None leaves the option out.
_PATHS = {'--data-dir': 'DATA', '--arrays': 'DATA', '--features': 'FEATURES', '--weights': 'WEIGHTS',
          '--new-weights': 'WEIGHTS', '--output': None, '--cache': None}


def environment() -> dict[str, Any]:
    """Return versions and machine, without anything that names the machine."""
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), cpu)
    gpu = torch.cuda.is_available()
    return {
        'cpu': cpu,
        'cores': os.cpu_count(),
        'torch_threads': torch.get_num_threads(),
        'gpu': torch.cuda.get_device_name() if gpu else None,
        'driver': _said_by('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader') if gpu else None,
        'cuda': torch.version.cuda if gpu else None,
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'timm': timm.__version__,
        'numpy': numpy.__version__,
        'scipy': scipy.__version__,
        'timm_dl2pa': timm_dl2pa.__version__,
        'commit': _said_by('git', 'rev-parse', '--short', 'HEAD'),
    }


def _said_by(*command: str) -> str | None:
    """Return the first line that a program prints; None where it is not installed, or fails."""
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(said.stdout.split('\n')), '').strip() or None if said.returncode == 0 else None


def result_name(name: str, device: str | torch.device) -> str:
    """Return the stem of a benchmark's file: on a GPU another than on the CPU."""
    kind = torch.device(device).type
    return name if kind == 'cpu' else f'{name}_{kind}'


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option `--output`, the folder of the results."""
    parser.add_argument('--output', type=Path, default=RESULTS, help='folder of the results (default: these)')


def read_results(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the rows of `<folder>/<name>.json`; none if there is no such file."""
    path = folder / f'{name}.json'
    return json.loads(path.read_text())['results'] if path.exists() else []


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record at once: whoever reads the file sees it whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.json.part')
    part.write_text(json.dumps(record, indent=1) + '\n')
    os.replace(part, path)


def command_line() -> str:
    """Return the command that runs. Values of options that are paths are left out."""
    command, words = [Path(sys.argv[0]).name], iter(sys.argv[1:])
    for word in words:
        option, given, _ = word.partition('=')
        if option not in _PATHS:
            # Where a data set may be a word or a folder, the folder's name tells which it was.
            command.append(Path(word).name if Path(word).is_dir() else word)
            continue
        if not given:
            next(words, None)
        if _PATHS[option]:
            command += [option, _PATHS[option]]
    return 'python benchmarks/' + shlex.join(command)


def write_results(name: str, settings: dict[str, Any], results: Any, folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json`."""
    path = folder / f'{name}.json'
    write_json(path, {
        'command': command_line(),
        'settings': {key: value for key, value in settings.items() if not isinstance(value, Path)},
        'environment': environment(),
        'results': results,
    })
    return path


class Runs:
    """The rows of a benchmark by their settings. Each is added at once, so that it can be stopped and called again.

    Args:
        name: Of the file, `<folder>/<name>.json`.
        setting: The dataclass of settings; a row has its fields.
        folder: Where it is.

    Raises:
        ValueError: The rows are another machine's, or of other versions: seconds would be mixed.
    """

    def __init__(self, name: str, setting: type, folder: Path):
        self.name, self.setting, self.folder = name, setting, folder
        self.rows: dict[Any, dict[str, Any]] = {}
        self.commands: list[str] = []
        self._read()

    def __contains__(self, setting: Any) -> bool:
        return setting in self.rows

    def _read(self) -> None:
        path = self.folder / f'{self.name}.json'
        if not path.exists():
            return
        record = json.loads(path.read_text())
        here, there = environment(), record['environment']
        different = [name for name in here if name not in ('commit', 'timm_dl2pa') and here[name] != there.get(name)]
        if different:
            raise ValueError(f'{path} is of another machine or of other versions ({", ".join(different)}): give '
                             f'another folder with --output.')
        names = [field.name for field in dataclasses.fields(self.setting)]
        self.rows = {self.setting(**{name: row[name] for name in names}): row for row in record['results']}
        self.commands = record['settings']['commands']

    def add(self, setting: Any, found: dict[str, Any]) -> None:
        """Add a run, or replace it, and write the file, to which another process may have added meanwhile."""
        self._read()
        self.rows[setting] = {**dataclasses.asdict(setting), **found, 'commit': environment()['commit']}
        self.commands = list(dict.fromkeys([*self.commands, command_line()]))
        write_results(self.name, {'commands': self.commands}, list(self.rows.values()), self.folder)
