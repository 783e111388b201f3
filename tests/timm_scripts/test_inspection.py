"""`timm-dl2pa inspect`."""
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.stand_in import make_model, train
from timm_dl2pa import save_model
from timm_dl2pa.cli import main
from timm_dl2pa.prototypes import make_prototypes
from timm_dl2pa.prototypes.nearest import margins
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = pytest.mark.timm


@pytest.fixture
def said(capsys):
    def inspect(path, *flags, code=0):
        if code:
            with pytest.raises(SystemExit) as stopped:
                main(['inspect', str(path), *flags])
            assert stopped.value.code == code
            return capsys.readouterr().err
        main(['inspect', str(path), *flags])
        return capsys.readouterr().out
    return inspect


def test_a_checkpoint_of_a_training(tmp_path, said):
    with plugged_in():
        task = train(tmp_path, dl2pa_dim=3, dl2pa_interval=3, dl2pa_num_prototypes=6, dl2pa_scale=8)
    report = said(tmp_path / 'last.pth.tar')
    history = task.assignment_scheduler.history
    for part in ('model          test\n', 'epoch          2\n', 'dim=3', 'interval=3', 'loss=criterion',
                 'fc: 5 classes, 6 prototypes in 3 dimensions, scale 8, 294 parameters',
                 f'{len(history) - 1} re-solves in 12 batches, 3 epochs, one is due'):
        assert part in report
    for update in history:
        line = f'{update.step:>8} {update.moved:>6} {update.objective_before / 5:>9.4f} -> {update.objective / 5:>8.4f}'
        assert line in report
    # The end of the warm-up is no re-solve.
    assert history[0].event == 'placed' and [row.endswith('   placed') for row in report.splitlines()].count(True) == 1


def test_other_files(tmp_path, said):
    with plugged_in():
        model = make_model(dl2pa_dim=3, dl2pa_learn_scale=True)
    save_model(model, tmp_path / 'folder')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    torch.save(model.state_dict(), tmp_path / 'state.pth')
    average = {name: value.float() for name, value in model.state_dict().items()}
    torch.save(average, tmp_path / 'average.pth')
    for name in ('folder', 'model.safetensors', 'state.pth', 'average.pth'):
        report = said(tmp_path / name)
        assert 'scale 4 (learned)' in report and 'no history in this file' in report


def test_files_that_are_no_good(tmp_path, said):
    assert 'no such file' in said(tmp_path / 'none.pth', code=2)
    (tmp_path / 'garbage.pth').write_bytes(b'garbage')
    assert 'cannot be read as a checkpoint' in said(tmp_path / 'garbage.pth', code=2)
    torch.save(make_model().state_dict(), tmp_path / 'plain.pth')
    assert 'has no DL2PA head' in said(tmp_path / 'plain.pth', code=2)
    with plugged_in():
        state = make_model(dl2pa_dim=3).state_dict()
    state['fc.assignment'] = torch.zeros(5, dtype=torch.int64)
    torch.save(state, tmp_path / 'shared.pth')
    assert 'is not an injection' in said(tmp_path / 'shared.pth', code=2)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / 'was here'), 'w'))

    torch.save({'state_dict': Hostile()}, tmp_path / 'hostile.pth')
    assert 'cannot be read as a checkpoint' in said(tmp_path / 'hostile.pth', code=2)
    assert not (tmp_path / 'was here').exists()


def test_margins_are_those_of_all_pairs(monkeypatch, tmp_path, said):
    monkeypatch.setattr('timm_dl2pa.prototypes.energy._BLOCK_ENTRIES', 100)  # several blocks
    rows = torch.nn.functional.normalize(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    angles, nearest = margins(rows)
    cosines = (rows.double() @ rows.double().t()).fill_diagonal_(-2)
    assert torch.allclose(angles.double(), torch.rad2deg(cosines.max(dim=1).values.acos()), atol=0.02)
    assert torch.equal(nearest, cosines.argmax(dim=1))
    torch.save({'fc.prototypes': make_prototypes(40, 4), 'fc.assignment': torch.arange(40)}, tmp_path / 'x.pth')
    assert 'the ten smallest of 40' in said(tmp_path / 'x.pth')
    assert len(said(tmp_path / 'x.pth', '--all').splitlines()) == len(said(tmp_path / 'x.pth').splitlines()) + 30
