"""Type checkers, as users run them: the Python of README and docs, and every public name, pass mypy and pyright."""
import json
import os
import re
import sys
from pathlib import Path

import pytest

import timm_dl2pa
from tests.helpers.pages import ROOT, WITH_PYTHON, python_of
from tests.helpers.processes import run

PUBLIC_NAMES = Path(__file__).parent / 'typing' / 'public_names.py'
# The page on training loops is written against the types of other libraries.
CHECKED = [page for page in WITH_PYTHON if page != 'docs/frameworks.md']
# What each block of a page finds, as in test_docs.py.
GIVEN = '''
import torch as _torch
from torch.utils.data import DataLoader as _DataLoader, TensorDataset as _TensorDataset
images, labels = _torch.randn(8, 3, 32, 32), _torch.randint(0, 10, (8,))
loader = _DataLoader(_TensorDataset(images, labels), batch_size=8)
'''
# What torch leaves without types is not held against who calls it. The later blocks of a page are programs of their
# own, which may use a name again.
MYPY = f'''
[mypy]
cache_dir = {os.devnull}
strict = true
allow_redefinition = true
untyped_calls_exclude = torch
mypy_path = typings
[mypy-torchvision.*]
ignore_missing_imports = true
'''
# timm declares that `create_model` returns an nn.Module, any attribute of which torch declares to be a tensor or a
# module: checkers refuse calls of the methods of timm's models, with or without this package. Here timm says what it
# makes.
TIMM = '''
from typing import Any
import torch
class Model(torch.nn.Module):
    def get_classifier(self) -> Any: ...
    def forward_features(self, x: torch.Tensor) -> torch.Tensor: ...
    def forward_head(self, x: torch.Tensor, pre_logits: bool = ...) -> torch.Tensor: ...
def create_model(model_name: str, pretrained: bool = ..., **kwargs: Any) -> Model: ...
'''
ANYTHING = 'from typing import Any\ndef __getattr__(name: str) -> Any: ...\n'


@pytest.fixture(scope='module')
def programs(tmp_path_factory):
    """The pages as programs, and the file of the public names."""
    folder = tmp_path_factory.mktemp('programs')
    for page in CHECKED:
        (folder / f'{re.sub(r"[^a-z]", "_", page.lower())}.py').write_text(GIVEN + '\n'.join(python_of(page)))
    (folder / PUBLIC_NAMES.name).write_text(PUBLIC_NAMES.read_text())
    (folder / 'mypy.ini').write_text(MYPY)
    timm = folder / 'typings' / 'timm'
    timm.mkdir(parents=True)
    for name, stub in (('__init__', TIMM), ('data', ANYTHING), ('optim', ANYTHING)):
        (timm / f'{name}.pyi').write_text(stub)
    return folder


@pytest.mark.slow
def test_mypy_strict(programs):
    pytest.importorskip('mypy', reason='the test extra brings mypy')
    files = sorted(path.name for path in programs.glob('*.py'))
    out = run([sys.executable, '-m', 'mypy', '--config-file', 'mypy.ini', *files], cwd=programs, fails=None).stdout
    assert out == f'Success: no issues found in {len(CHECKED) + 1} source files\n'


@pytest.mark.slow
def test_pyright(programs):
    report = pyright(cwd=programs)
    assert report['summary']['filesAnalyzed'] > len(CHECKED)
    assert not [(error['file'], error['range']['start']['line'], error['message'])
                for error in report['generalDiagnostics']]


@pytest.mark.slow
def test_no_type_is_unknown():
    """By pyright's measure: of everything that can be imported from the package, private names aside."""
    found = pyright('--verifytypes', 'timm_dl2pa', '--ignoreexternal', cwd=ROOT)['typeCompleteness']
    assert found['exportedSymbolCounts']['withKnownType'] > 1000
    # What `integrations` takes from libraries without types, or that are not installed, is unknown.
    unknown = [symbol['name'] for symbol in found['symbols'] if symbol['isExported'] and not symbol['isTypeKnown']
               and not symbol['isTypeAmbiguous'] and '.integrations.' not in symbol['name']]
    assert not unknown and found['completenessScore'] > 0.95


def pyright(*arguments, cwd):
    """Run pyright, whose report is JSON. (It needs Node.js, which its PyPI package downloads where there is none.)"""
    pytest.importorskip('pyright', reason='the test extra brings pyright')
    out = run([sys.executable, '-m', 'pyright', '--outputjson', '--pythonpath', sys.executable, *arguments], cwd=cwd,
              fails=None)
    if not out.stdout.startswith('{'):
        pytest.skip(f'pyright does not start: {out.stderr[-200:]}')
    return json.loads(out.stdout)


def test_every_public_name_is_checked():
    text = PUBLIC_NAMES.read_text().partition('class Net')[2]
    assert [name for name in timm_dl2pa.__all__ if not re.search(rf'\b{name}\b', text)] == []
