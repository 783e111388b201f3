"""Damaged head folders, model folders, prototype files and cache files: only documented errors come out."""
import hashlib
import logging
import shutil
import subprocess
import sys

import pytest
import timm
import torch

from tests.fuzz.harness import damaged_folder, damaged_safetensors, fuzz, nothing_executed
from timm_dl2pa import (
    DL2PAHead,
    load_head,
    load_model,
    load_prototypes,
    make_prototypes,
    save_model,
    save_prototypes,
    wrap_dl2pa,
)
from timm_dl2pa.assignment import check_assignment
from timm_dl2pa.embed import Embeddings, read_embeddings
from timm_dl2pa.embed.table import write_embeddings
from timm_dl2pa.prototypes import check_prototypes
from timm_dl2pa.prototypes import make as make_module

pytestmark = [pytest.mark.slow, pytest.mark.timm]
NAMES = list('abcdef')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def check_head(head):
    check_prototypes(head.prototypes, head.num_classes)
    check_assignment(head.assignment, head.num_classes, len(head.prototypes))
    assert head.prototypes.dtype == torch.float32 and bool(head.current_scale().isfinite())
    assert head.label_names is None or [type(name) for name in head.label_names] == [str] * head.num_classes


def write_digest(entry):
    def write(config, weights):
        (config[entry] if entry else config)['weights_sha256'] = hashlib.sha256(weights).hexdigest()
    return write


@pytest.mark.parametrize('options', [dict(neck='linear_bn'), dict(neck='none', learn_scale=False, num_prototypes=8)])
def test_head_folders(tmp_path, options):
    in_features = 5 if options['neck'] == 'none' else 7
    good = contents(DL2PAHead(in_features, 6, 5, **options).save_pretrained(tmp_path / 'good', label_names=NAMES))

    def load(files):
        head = load_head(written(tmp_path / 'bad', files))
        check_head(head)
        assert head(torch.randn(2, head.in_features)).shape == (2, head.num_classes)

    assert fuzz(lambda random: damaged_folder(good, random, write_digest(None)), load,
                (ValueError, FileNotFoundError)) > 5


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_model_folders(tmp_path, name):
    good = contents(save_model(wrap_dl2pa(timm.create_model(name, num_classes=6), 3), tmp_path / 'good',
                               label_names=NAMES))

    def load(files):
        model = load_model(written(tmp_path / 'bad', files))
        check_head(model.get_classifier())
        assert model.get_classifier().config.num_classes == model.num_classes == 6

    assert fuzz(lambda random: damaged_folder(good, random, write_digest('timm_dl2pa')), load,
                (ValueError, FileNotFoundError)) > 2


@pytest.mark.parametrize('pretrained', [True, False])
def test_model_folders_by_timms_own_loader(tmp_path, pretrained):
    """Its errors are its own, but it executes nothing and comes to an end."""
    good = contents(save_model(wrap_dl2pa(timm.create_model('test_vit', num_classes=6), 3), tmp_path / 'good',
                               label_names=NAMES))

    def load(files):
        try:
            timm.create_model(f'local-dir:{written(tmp_path / "bad", files)}', pretrained=pretrained)
        except (MemoryError, AssertionError):
            raise
        except Exception as error:
            raise ValueError from error

    assert fuzz(lambda random: damaged_folder(good, random, write_digest('timm_dl2pa')), load, (ValueError,)) > 2


def test_prototype_files(tmp_path):
    save_prototypes(tmp_path / 'good', make_prototypes(6, 5), {'seed': 0})
    good = (tmp_path / 'good').read_bytes()

    def load(content):
        (tmp_path / 'bad').write_bytes(content)
        check_prototypes(load_prototypes(tmp_path / 'bad'))

    assert fuzz(lambda random: damaged_safetensors(good, random), load, (ValueError,)) > 20


def test_embeddings_files(tmp_path):
    write_embeddings(tmp_path / 'good', Embeddings(torch.randn(4, 3), torch.tensor([0, 1, 1, -1]),
                                                   [f'{name}.png' for name in 'abcd'], ['x', 'y'], {'dim': 3}))
    good = (tmp_path / 'good').read_bytes()

    def load(content):
        (tmp_path / 'bad').write_bytes(content)
        found = read_embeddings(tmp_path / 'bad')
        assert found.embeddings.ndim == 2 and found.embeddings.isfinite().all()
        assert len(found.names) == len(found.labels) == len(found.embeddings)
        assert all(-1 <= label < len(found.label_names) for label in found.labels.tolist())

    assert fuzz(lambda random: damaged_safetensors(good, random), load, (ValueError,)) > 20


def test_cache_files(tmp_path, monkeypatch, caplog):
    """Whatever lies there, prototypes come out."""
    caplog.set_level(logging.ERROR)
    monkeypatch.setenv('TIMM_DL2PA_CACHE', str(tmp_path))
    points = make_prototypes(30, 6).double().numpy()
    path, = tmp_path.iterdir()
    good = path.read_bytes()
    monkeypatch.setattr(make_module, 'optimise', lambda *_, **__: points)  # at once

    def make(content):
        path.write_bytes(content)
        found, info = make_prototypes(30, 6, return_info=True)
        check_prototypes(found)
        assert found.shape == (30, 6) and found.dtype == torch.float32 and info.method == 'optimise'

    assert fuzz(lambda random: damaged_safetensors(good, random), make, ()) > 20


# --- the test of the tests


def test_an_error_that_is_not_documented_is_seen():
    with pytest.raises(AssertionError, match=r'seed 3 \(TIMM_DL2PA_FUZZ_SEED\): KeyError'):
        fuzz(lambda random: iter(range(10)), FailsAt(3), (ValueError,))


class FailsAt:
    def __init__(self, number):
        self.left = number

    def __call__(self, _):
        if self.left == 0:
            raise KeyError
        self.left -= 1
        raise ValueError


def test_what_is_executed_is_seen(tmp_path):
    torch.save({'a': torch.nn.Linear(1, 1)}, tmp_path / 'a.pt')
    for act in (lambda: subprocess.run([sys.executable, '-c', '']),
                lambda: torch.load(tmp_path / 'a.pt', weights_only=False)):
        with pytest.raises(AssertionError), nothing_executed():
            act()
    act()
