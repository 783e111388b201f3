"""docs/notebooks: each is executed in a new kernel, and what is committed of its outputs is clean."""
import json
import os
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))
NAMES = [path.name for path in NOTEBOOKS]


@pytest.fixture(scope='module')
def execute():
    pytest.importorskip('nbclient', reason='nbclient is not installed')
    pytest.importorskip('ipykernel', reason='ipykernel is not installed')
    return runpy.run_path(str(ROOT / 'docs' / 'execute_notebooks.py'))['execute']


@pytest.fixture
def kernels_see_the_package(monkeypatch):
    """The kernel does not run in the repository's folder, from where pytest imports the package."""
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))


def code_of(notebook: dict) -> list[dict]:
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def check_outputs(notebook: dict) -> None:
    """No cell raised, each was executed in its turn, and something is printed and drawn."""
    cells = code_of(notebook)
    outputs = [output for cell in cells for output in cell['outputs']]
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output['output_type'] for output in outputs} <= {'stream', 'display_data'}
    assert any(output.get('name') == 'stdout' for output in outputs)
    assert any('image/png' in output.get('data', {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.timm
@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_notebook_runs(path, execute, kernels_see_the_package, tmp_path):
    before = path.read_bytes()
    check_outputs(execute(path, tmp_path))
    assert path.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cell_that_raises_is_an_error(execute, tmp_path):
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook
    notebook = new_notebook(cells=[new_code_cell("raise RuntimeError('of a cell')", id='cell')])
    (tmp_path / 'raises.ipynb').write_text(json.dumps(notebook))
    with pytest.raises(CellExecutionError, match='of a cell'):
        execute(tmp_path / 'raises.ipynb', tmp_path)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_committed_notebook_is_clean(path):
    text = path.read_text(encoding='utf-8')
    notebook = json.loads(text)
    check_outputs(notebook)
    assert path.stat().st_size < 500_000
    # No traces of the machine: its paths, its warnings, times of execution.
    prose = ''.join(line for cell in notebook['cells'] for output in cell.get('outputs', ()) for line in
                    output.get('text', ()))
    assert not any(trace in prose for trace in ('/tmp', '/home', '/root', 'site-packages', 'Warning'))
    assert all(output.get('name') != 'stderr' for cell in code_of(notebook) for output in cell['outputs'])
    assert all(cell['metadata'] == {} for cell in notebook['cells'])
    assert set(notebook['metadata']) == {'kernelspec', 'language_info'}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    for target in re.findall(r'\]\(([^)\s#]+)', text):
        assert target.startswith('https://') or (path.parent / target).is_file(), target


def test_there_are_notebooks():
    assert NAMES == ['fine_tuning.ipynb', 'retrieval.ipynb', 'sphere.ipynb']
