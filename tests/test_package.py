"""What the repository promises beyond the code: imports, commands, the README."""
import re
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


@pytest.mark.slow
def test_readme_tables_are_those_of_the_results():
    script = ROOT / 'benchmarks' / 'readme_tables.py'
    run([sys.executable, str(script), '--check'], cwd=ROOT)


@pytest.mark.timm
def test_readme_has_every_option_of_the_plugin():
    from dataclasses import fields

    from timm_dl2pa.timm_scripts import PluginOptions
    readme = (ROOT / 'README.md').read_text()
    assert all(f'`dl2pa_{option.name}`' in readme for option in fields(PluginOptions))


@pytest.mark.timm
@pytest.mark.filterwarnings('ignore:.*HTTP upload')
def test_readmes_python_runs(monkeypatch, tmp_path, hub):
    """Each Python block, in order, in one namespace; weights and data are made at random, the Hub is the tests'.

    With 10 classes in 8 dimensions in place of 100 in 128, which `prime` would turn and match for half a minute.
    """
    import timm
    import torch
    monkeypatch.chdir(tmp_path)  # one block saves a model
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    create_model = timm.create_model

    def small(name, pretrained=False, **kwargs):
        if name.startswith(('hf-hub:', 'local-dir:')):
            return create_model(name, pretrained=pretrained, **kwargs)
        return create_model(name if name == 'dl2pa' else 'test_resnet', **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    names = {'loader': [(images, labels)] * 3, 'images': images, 'labels': labels,
             'names': [f'class {index}' for index in range(10)]}
    text = (ROOT / 'README.md').read_text()
    for written, smaller in (('num_classes=100', 'num_classes=10'), ('dim=128', 'dim=8')):
        assert written in text
        text = text.replace(written, smaller)
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), names)
    assert names['scheduler'].steps == 30 and not names['scheduler'].warming_up
    assert sorted(hub.repositories) == ['me/cifar100-dl2pa-128', 'me/resnet50-dl2pa', 'me/resnet50-plain']
