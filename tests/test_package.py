"""What the repository promises beyond the code: imports, commands, the README."""
import sys
from pathlib import Path

import pytest

import timm_dl2pa
from tests.helpers.processes import python, run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_import_brings_nothing_unasked_and_disturbs_nothing():
    out = python("""
import sys, torch, numpy
torch.manual_seed(5); numpy.random.seed(5)
before = torch.get_rng_state(), numpy.random.get_state()[1].copy()
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import timm_dl2pa
assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == numpy.random.get_state()[1]).all()
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
print([name for name in ('matplotlib', 'sklearn', 'tqdm.auto', 'timm_dl2pa.demo', 'hypothesis') if name in sys.modules])
""")
    assert out.strip() in ('[]', "['tqdm.auto']")  # timm's huggingface_hub may bring tqdm


@pytest.mark.slow
def test_needs_no_network():
    python("""
import socket
def refuse(*args, **kwargs): raise AssertionError('network')
socket.socket.connect = socket.getaddrinfo = refuse
import timm, timm_dl2pa
timm_dl2pa.wrap_dl2pa(timm.create_model('test_resnet', num_classes=4), 3)
""")


def test_public_names():
    assert all(hasattr(timm_dl2pa, name) for name in timm_dl2pa.__all__)
    assert (Path(timm_dl2pa.__file__).parent / 'py.typed').exists()


@pytest.mark.slow
def test_command():
    version = run([str(Path(sys.executable).parent / 'timm-dl2pa'), '--version']).stdout
    assert version.strip() == f'timm-dl2pa {timm_dl2pa.__version__}'
    commands = run([sys.executable, '-m', 'timm_dl2pa', '--help']).stdout
    assert all(name in commands for name in ('demo', 'finetune', 'run', 'inspect', 'fold'))


def test_ci_runs_the_readmes_commands():
    readme, ci = (ROOT / 'README.md').read_text(), (ROOT / '.ci' / 'run').read_text()
    assert 'pip install -e ".[demo]" && timm-dl2pa demo' in readme
    assert 'pip install -e ".[test]" && pytest' in readme and 'pip install -e ".[test]" && pytest' in ci
    assert 'pip install -e ".[docs]" && mkdocs serve' in readme and 'mkdocs build --strict' in ci


@pytest.mark.slow
def test_tables_of_the_pages_are_those_of_the_results():
    script = ROOT / 'benchmarks' / 'readme_tables.py'
    run([sys.executable, str(script), '--check'], cwd=ROOT)
