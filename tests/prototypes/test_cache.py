"""The cache of prototype sets: it saves work, and no fault of it ends a program."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.processes import run, run_ranks
from timm_dl2pa import load_prototypes, make_prototypes
from timm_dl2pa.prototypes import cache as cache_module
from timm_dl2pa.prototypes import make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_DL2PA_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def count_work(monkeypatch):
    calls = []
    original = make.optimise
    monkeypatch.setattr(make, 'optimise', lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


def test_made_once(cache, count_work):
    first, info = make_prototypes(30, 6, return_info=True)
    again, kept = make_prototypes(30, 6, return_info=True)
    assert torch.equal(first, again) and len(count_work) == 1
    assert not info.cached and kept.cached and kept.description == info.description and kept.tried == info.tried
    for other in (dict(seed=1), dict(objective='separated', effort=0.01), dict(method='optimise'), dict(effort=0.5),
                  dict(method='quick'), dict(method='quick', effort=0.5)):
        make_prototypes(30, 6, **other)
    assert len(count_work) == 7 and len(list(cache.iterdir())) == 7
    make_prototypes(30, 6, cache=False)
    assert len(count_work) == 8


def test_closed_forms_and_codes_are_not_kept(cache):
    make_prototypes(5, 6), make_prototypes(200, 16, method='kerdock')
    assert not cache.exists()


@pytest.mark.parametrize('off', ['off', '0', ''])
def test_switched_off(cache, monkeypatch, count_work, off, tmp_path):
    monkeypatch.setenv('TIMM_DL2PA_CACHE', off)
    monkeypatch.chdir(tmp_path)
    make_prototypes(30, 6), make_prototypes(30, 6)
    assert len(count_work) == 2 and not list(tmp_path.iterdir())


def test_default_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv('TIMM_DL2PA_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_module.cache_folder() == tmp_path / 'timm_dl2pa'


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def rewrite(path, dtype=torch.float32, about=None, without=None, **values):
    """Write the file with another dtype or description, without a digest."""
    from safetensors import safe_open
    with safe_open(path, 'pt') as file:
        told = json.loads(file.metadata()['about']) | values
    told.pop(without, None)
    save_file({'prototypes': load_file(path)['prototypes'].to(dtype)}, path,
              metadata={'about': json.dumps(told if about is None else about)})


@pytest.mark.parametrize('damage', [
    flip_a_bit,
    lambda path: path.write_bytes(path.read_bytes()[:-40]),
    lambda path: path.write_bytes(b''),
    lambda path: save_file({'prototypes': torch.eye(6)}, path),
    lambda path: path.unlink() or path.mkdir(),
    lambda path: rewrite(path, dtype=torch.float64),
    lambda path: rewrite(path, dtype=torch.int32),
    lambda path: rewrite(path, about=[1]),
    lambda path: rewrite(path, about={'key': 1}),
    lambda path: rewrite(path, without='info'),
    lambda path: rewrite(path, info={'seed': 1}),
    lambda path: rewrite(path, info=None),
])
def test_damaged_files_are_made_anew(cache, count_work, damage, caplog):
    first = make_prototypes(30, 6)
    path, = cache.iterdir()
    damage(path)
    again, info = make_prototypes(30, 6, return_info=True)
    assert torch.equal(again, first) and not info.cached and len(count_work) == 2
    if path.is_file():
        assert 'cannot be read and are made again' in caplog.text
        assert torch.equal(make_prototypes(30, 6), first) and len(count_work) == 2
    else:
        assert 'could not be cached' in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('TIMM_DL2PA_CACHE', str(tmp_path / 'file'))
    assert make_prototypes(30, 6).shape == (30, 6)
    assert 'TIMM_DL2PA_CACHE=off' in caplog.text


def no_home(monkeypatch):
    monkeypatch.delenv('TIMM_DL2PA_CACHE')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)


def unknown_user(monkeypatch, tmp_path):
    """No HOME, and a user id without an entry in the list of users."""
    no_home(monkeypatch)
    monkeypatch.delenv('HOME')

    def no_entry(uid):
        raise KeyError(f'getpwuid(): uid not found: {uid}')

    monkeypatch.setattr('pwd.getpwuid', no_entry)


def unreadable_home(monkeypatch, tmp_path):
    no_home(monkeypatch)

    def refused(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(type(tmp_path), 'is_file', refused)
    monkeypatch.setattr(type(tmp_path), 'mkdir', lambda path, **_: refused(path))


FAULTS = {
    'no such user': lambda patch, path: patch.setenv('TIMM_DL2PA_CACHE', '~nosuchuser/cache'),
    'no name of a file': lambda patch, path: patch.setattr(cache_module, '_cached_path', lambda key: path / 'a\0b'),
    'unknown user': unknown_user,
    'unreadable home': unreadable_home,
    'full disk': lambda patch, path: patch.setattr('timm_dl2pa.prototypes.files.save_file', full_disk),
    'no room for a folder': lambda patch, path: patch.setattr('tempfile.mkdtemp', full_disk),
    'broken library': lambda patch, path: patch.setattr(cache_module, 'save_prototypes', broken),
}


def full_disk(*_, **__):
    raise OSError(28, 'No space left on device')


def broken(*_, **__):
    raise RuntimeError('broken')


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_a_warning(cache, monkeypatch, tmp_path, caplog, fault):
    with monkeypatch.context() as patch:
        FAULTS[fault](patch, tmp_path)
        assert make_prototypes(30, 6).shape == (30, 6)
    assert 'The prototypes could not be cached' in caplog.text and 'TIMM_DL2PA_CACHE=off' in caplog.text


def test_a_file_that_may_not_be_read(cache, monkeypatch, caplog):
    first = make_prototypes(30, 6)

    def refused(*_):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr('builtins.open', refused)
        assert torch.equal(make_prototypes(30, 6), first)
    assert 'cannot be read and are made again: PermissionError' in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='only root can become another user')
def test_as_a_user_without_rights(tmp_path):
    """File of mode 000, folder that cannot be written, no HOME and no entry in the list of users."""
    tmp_path.chmod(0o755)
    script = """
import os, sys, logging
from timm_dl2pa import make_prototypes
logging.basicConfig()
folder = sys.argv[1]
first = make_prototypes(30, 6)
file, = os.listdir(folder + '/cache')
os.chmod(f'{folder}/cache/{file}', 0)
os.chmod(folder + '/cache', 0o755)
os.setgroups([]), os.setgid(54321), os.setuid(54321)
assert make_prototypes(30, 6).equal(first)
os.environ.pop('HOME', None), os.environ.pop('TIMM_DL2PA_CACHE')
assert make_prototypes(30, 6).equal(first)
"""
    done = run([sys.executable, '-c', script, str(tmp_path)],
               environment={'TIMM_DL2PA_CACHE': str(tmp_path / 'cache')})
    assert done.returncode == 0, done.stderr
    assert 'PermissionError' in done.stderr and 'RuntimeError: Could not determine home directory' in done.stderr


def test_numbers_of_numpy_and_torch(cache, count_work):
    first = make_prototypes(30, 6, seed=1)
    assert torch.equal(make_prototypes(np.int64(30), torch.tensor(6), seed=np.uint8(1), effort=np.float32(1)), first)
    assert len(count_work) == 1
    for arguments, message in ((dict(num_prototypes=30.0), 'num_prototypes must be int, not 30.0'),
                               (dict(dim='6'), "dim must be int, not '6'"), (dict(seed=None), 'seed must be int'),
                               (dict(seed=True), 'seed must be int, not True'), (dict(seed=-1), 'seed must be in 0'),
                               (dict(effort='1'), "effort must be int or float, not '1'")):
        with pytest.raises(ValueError, match=message):
            make_prototypes(**{'num_prototypes': 30, 'dim': 6, **arguments})


def in_process(rank, folder):
    os.environ['TIMM_DL2PA_CACHE'] = str(folder / 'cache')
    torch.save(make_prototypes(60, 7), folder / f'{rank}.pt')


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    run_ranks(in_process, tmp_path, folder=tmp_path)
    path, = (tmp_path / 'cache').iterdir()
    assert all(torch.equal(load_prototypes(path), torch.load(tmp_path / f'{rank}.pt')) for rank in range(2))
