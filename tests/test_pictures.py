"""The pictures of docs/how-it-works.md: what is committed, and the script that draws them."""
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / 'docs'
PICTURES = ['assignment.png', 'labels.gif', 'placement.gif', 'prototypes.png']
ANIMATED = {'labels.gif', 'placement.gif'}


@pytest.fixture(scope='module')
def script():
    pytest.importorskip('sklearn', reason='scikit-learn is not installed')
    return runpy.run_path(str(DOCS / 'draw_pictures.py'))


def frames_of(path: Path) -> int:
    from PIL import Image
    with Image.open(path) as picture:
        assert len(picture.convert('RGB').getcolors(10 ** 6)) > 20
        return getattr(picture, 'n_frames', 1)


def test_committed_pictures_are_small_and_shown():
    assert sorted(path.name for path in (DOCS / 'pictures').iterdir()) == PICTURES
    page = (DOCS / 'how-it-works.md').read_text()
    for name in PICTURES:
        assert (DOCS / 'pictures' / name).stat().st_size < (600_000 if name in ANIMATED else 150_000)
        assert (frames_of(DOCS / 'pictures' / name) > 20) == (name in ANIMATED)
        assert f'(pictures/{name})' in page


@pytest.mark.slow
def test_the_script_draws_them(script, tmp_path):
    script['draw_all'](tmp_path, epochs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    assert all((frames_of(tmp_path / name) > 5) == (name in ANIMATED) for name in PICTURES)


@pytest.mark.slow
def test_what_the_animations_show(script):
    """With 'placed' prototypes move and stop; with 'paper' they stay, and labels move."""
    import torch
    placed = script['train']('placed', 2, [0, 25, 50, 95, 100])
    assert [moment.warming_up for moment in placed] == [True, True, True, False, False]
    assert not torch.allclose(placed[0].places, placed[1].places, atol=0.1)
    assert torch.equal(placed[3].places, placed[4].places) and placed[4].top1 > placed[0].top1
    paper = script['train']('paper', 2, [0, 25, 26, 100])
    assert paper[1].moved == 0 < paper[2].moved and torch.equal(paper[0].places, paper[1].places)
    assert torch.equal(paper[0].places.unique(dim=0), paper[2].places.unique(dim=0))
    assert not torch.equal(paper[0].places, paper[2].places)
