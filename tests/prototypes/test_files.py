import os
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from timm_dl2pa import DL2PAHead, load_prototypes, make_prototypes, save_prototypes
from timm_dl2pa.cli import main
from timm_dl2pa.prototypes import files


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
    for about in ('[1]', '{', '[' * 100000, '"text"'):
        save_file({'prototypes': torch.eye(3)}, tmp_path / 'about.safetensors', metadata={'about': about})
        with pytest.raises(ValueError, match=r'about\.safetensors'):
            load_prototypes(tmp_path / 'about.safetensors')
    for bad in (torch.tensor(1.0), torch.eye(3).to(torch.float8_e4m3fn), torch.eye(3, dtype=torch.int64),
                torch.eye(3, dtype=torch.complex64)):
        save_file({'prototypes': bad}, tmp_path / 'bad.safetensors')
        with pytest.raises(ValueError, match=r'bad\.safetensors: prototypes must'):
            load_prototypes(tmp_path / 'bad.safetensors')


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'good.safetensors'
    save_prototypes(path, torch.eye(3))
    for bad, error in ((None, AttributeError), (2 * torch.eye(3), ValueError), (torch.eye(3).long(), ValueError)):
        with pytest.raises(error):
            save_prototypes(path, bad)

    def disk_full(tensors, path, metadata=None):
        path.write_bytes(b'half')
        raise SafetensorError('I/O error: no space left')  # no OSError

    monkeypatch.setattr(files, 'save_file', disk_full)
    with pytest.raises(OSError, match='no space left'):
        save_prototypes(path, -torch.eye(3))
    assert torch.equal(load_prototypes(path), torch.eye(3)) and list(tmp_path.iterdir()) == [path]


def test_what_is_written_has_the_mode_of_any_file(tmp_path):
    (tmp_path / 'any').write_text('')
    save_prototypes(tmp_path / 'good.safetensors', torch.eye(3))
    assert (tmp_path / 'good.safetensors').stat().st_mode == (tmp_path / 'any').stat().st_mode


def test_what_killed_writers_left_is_removed(tmp_path):
    for name, age in (('.timm-dl2pa-part-old', 2 * 24 * 3600), ('.timm-dl2pa-part-new', 60), ('mine', 10 ** 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'half.safetensors').write_bytes(b'half')
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    save_prototypes(tmp_path / 'good.safetensors', torch.eye(3))
    assert sorted(os.listdir(tmp_path)) == ['.timm-dl2pa-part-new', 'good.safetensors', 'mine']


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
