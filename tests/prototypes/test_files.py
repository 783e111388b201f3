import os

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.processes import run_ranks
from timm_dl2pa import DL2PAHead, load_prototypes, make_prototypes, save_prototypes
from timm_dl2pa.cli import main
from timm_dl2pa.prototypes import files, make


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
    for other in (dict(seed=1), dict(objective='separated', effort=0.01), dict(method='optimise'), dict(effort=0.5)):
        make_prototypes(30, 6, **other)
    assert len(count_work) == 5 and len(list(cache.iterdir())) == 5
    make_prototypes(30, 6, cache=False)
    assert len(count_work) == 6


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
    assert files.cache_folder() == tmp_path / 'timm_dl2pa'


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize('damage', [
    flip_a_bit,
    lambda path: path.write_bytes(path.read_bytes()[:-40]),
    lambda path: path.write_bytes(b''),
    lambda path: save_file({'prototypes': torch.eye(6)}, path),
])
def test_damaged_files_are_made_anew(cache, count_work, damage):
    first = make_prototypes(30, 6)
    path, = cache.iterdir()
    damage(path)
    assert torch.equal(make_prototypes(30, 6), first) and len(count_work) == 2
    assert torch.equal(make_prototypes(30, 6), first) and len(count_work) == 2


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('TIMM_DL2PA_CACHE', str(tmp_path / 'file'))
    assert make_prototypes(30, 6).shape == (30, 6)
    assert 'TIMM_DL2PA_CACHE=off' in caplog.text


def in_process(rank, folder):
    os.environ['TIMM_DL2PA_CACHE'] = str(folder / 'cache')
    torch.save(make_prototypes(60, 7), folder / f'{rank}.pt')


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    run_ranks(in_process, tmp_path, folder=tmp_path)
    path, = (tmp_path / 'cache').iterdir()
    assert all(torch.equal(load_prototypes(path), torch.load(tmp_path / f'{rank}.pt')) for rank in range(2))


def test_files_go_into_heads(tmp_path):
    points = make_prototypes(9, 4, seed=5)
    save_prototypes(tmp_path / 'p.safetensors', points, {'seed': 5})
    head = DL2PAHead(12, 9, 4, prototypes=tmp_path / 'p.safetensors')
    assert torch.equal(head.prototypes, points) and head.config.own_prototypes
    save_file({'anything': points}, tmp_path / 'other.safetensors')
    assert torch.equal(load_prototypes(str(tmp_path / 'other.safetensors')), points)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.safetensors'):
        load_prototypes(tmp_path / 'none.safetensors')
    torch.save(torch.eye(3), tmp_path / 'pickle.pt')
    with pytest.raises(ValueError, match='not an intact safetensors'):
        load_prototypes(tmp_path / 'pickle.pt')
    save_file({'prototypes': 2 * torch.eye(3)}, tmp_path / 'long.safetensors')
    with pytest.raises(ValueError, match='unit rows'):
        load_prototypes(tmp_path / 'long.safetensors')
    save_file({'a': torch.eye(3), 'b': torch.eye(3)}, tmp_path / 'two.safetensors')
    with pytest.raises(ValueError, match='one tensor named'):
        load_prototypes(tmp_path / 'two.safetensors')
    save_prototypes(tmp_path / 'good.safetensors', torch.eye(3))
    with pytest.raises(AttributeError):
        save_prototypes(tmp_path / 'good.safetensors', None)
    assert torch.equal(load_prototypes(tmp_path / 'good.safetensors'), torch.eye(3))
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.slow
def test_command(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    out, plot = tmp_path / 'p.safetensors', tmp_path / 'p.png'
    for dim in (2, 3, 5):
        assert main(['prototypes', '-k', '20', '-d', str(dim), '--objective', 'separated', '--effort', '0.02', '--out',
                     str(out), '--plot', str(plot)]) == 0
        printed = capsys.readouterr().out
        assert 'proven bound, at least' in printed and "the authors' recipe" in printed
        assert load_prototypes(out).shape == (20, dim) and plot.stat().st_size > 5000
    line = next(line for line in printed.splitlines() if line.startswith('these'))
    from timm_dl2pa import prototype_quality
    assert float(line.split()[1]) == pytest.approx(prototype_quality(load_prototypes(out)).max_cosine, abs=1e-6)


def test_command_names_what_is_wrong(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['prototypes', '-k', '20', '-d', '5', '--method', 'simplex'])
    assert stopped.value.code == 2 and "method='simplex' needs" in capsys.readouterr().err
