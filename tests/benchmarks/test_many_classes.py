"""The benchmark of many classes: glyphs are what they are said to be, and every method runs, at toy size."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import glyphs as glyphs_module
import many_classes
from glyph_fonts import faces_of, families_of
from glyphs import few_images, load_glyphs, warp
from many_classes_methods import METHODS, SampledCosineClassifier

matplotlib = pytest.importorskip('matplotlib', reason='the glyphs of the tests are drawn by the fonts of matplotlib')
FONTS = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """A folder for what is drawn; the letters are some Latin, Greek and Cyrillic ones, which takes a second."""
    letters = [*range(0xC0, 0x180), *range(0x41, 0x5B), *range(0x391, 0x3AA), *range(0x410, 0x450)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(glyphs_module, '_code_points', lambda characters: letters)
        yield tmp_path_factory.mktemp('glyphs')


@pytest.fixture(scope='module')
def glyphs(cache):
    return load_glyphs('dejavu', 12, cache=cache)


def test_glyphs(glyphs, cache):
    assert glyphs.num_classes == 12 and list(glyphs.classes) == sorted(set(glyphs.classes))
    for x, y, most in ((glyphs.x_train, glyphs.y_train, 10), (glyphs.x_test, glyphs.y_test, 2)):
        assert x.dtype == torch.uint8 and x.shape == (len(y), 1, 32, 32) and (x.flatten(1) > 127).any(dim=1).all()
        assert len({image.numpy().tobytes() for image in x}) == len(x)
        assert set(y.tolist()) == set(range(12)) and torch.bincount(y).max() <= most
    # Of letters that look the same, the first alone can be a class.
    assert {'\u0391', '\u0410'} < set(glyphs.report['drawn_alike']) and 'A' not in glyphs.report['drawn_alike']
    assert not set(glyphs.classes) & set(glyphs.report['drawn_alike'])
    assert glyphs.report['test_families'] == [['DejaVuSansMono-Oblique'], ['DejaVuSerif-BoldItalic']]
    assert len(glyphs.report['training_families']) == 10
    assert (torch.bincount(glyphs.y_unseen) == 2).all()
    again = load_glyphs('dejavu', 12, cache=cache)
    assert torch.equal(again.x_train, glyphs.x_train) and again.classes == glyphs.classes
    for characters, arguments, message in (
            ('hangul', {}, 'characters must be one of'), ('dejavu', {'number': 10 ** 6}, 'are left'),
            ('dejavu', {'held_out': ['nothing']}, '0 for the test images')):
        with pytest.raises(ValueError, match=message):
            load_glyphs(characters, **arguments, cache=cache)


def test_few_images_a_class(glyphs):
    few, again = (few_images(glyphs, train=15, test=3, seed=1) for _ in range(2))
    assert torch.bincount(few.y_train).tolist() == [15] * 12 and torch.bincount(few.y_test).tolist() == [3] * 12
    assert few.x_train.dtype == torch.uint8 and torch.equal(few.x_train, again.x_train)
    # The same face twice is another image.
    assert len({image.numpy().tobytes() for image in few.x_train}) == len(few.x_train)


def test_a_warp_keeps_the_glyph(glyphs):
    warped = warp(glyphs.x_train, torch.Generator().manual_seed(0))
    assert warped.shape == glyphs.x_train.shape and warped.min() >= 0 and warped.max() <= 255
    flat = [images.float().flatten(1) - images.float().flatten(1).mean(dim=1, keepdim=True)
            for images in (glyphs.x_train, warped)]
    assert F.cosine_similarity(*flat).mean() > 0.4


def test_weights_and_copies_are_one_family(tmp_path):
    for name in ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSerif'):
        shutil.copy(FONTS / f'{name}.ttf', tmp_path)
    shutil.copy(FONTS / 'DejaVuSerif.ttf', tmp_path / 'Other.ttf')
    (tmp_path / 'Link.ttf').symlink_to(tmp_path / 'DejaVuSans.ttf')
    faces = faces_of(tmp_path.iterdir(), range(0x20, 0x530))
    assert len(faces) == 4
    families = [[str(face) for face in family] for family in families_of(faces, 22)]
    assert any({'DejaVuSans', 'DejaVuSans-Bold'} <= set(family) for family in families)
    assert sum('DejaVuSerif' in family for family in families) == 1
    assert all('Other' not in family for family in families)


def test_sampled_softmax_is_the_full_one_on_average():
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 3, 9, 20, 31])
    classifier = SampledCosineClassifier(4, 40, num_sampled=10 ** 5)
    full, everything = F.cross_entropy(classifier(x), labels), classifier.loss(x, labels)
    assert everything.item() == pytest.approx(full.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, (x, classifier.vectors.weight)) for loss in (full, everything)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other.to_dense(), rtol=1e-4, atol=1e-6)
    classifier.num_sampled = 20
    # The sum that softmax divides by is right on average; its logarithm then is a little too small.
    target = classifier(x)[torch.arange(6), labels].mean()
    sums = torch.stack([(classifier.loss(x[:1], labels[:1]) + classifier(x[:1])[0, labels[0]]).exp()
                        for _ in range(500)])
    assert sums.mean().item() == pytest.approx(classifier(x[:1]).exp().sum().item(), rel=0.05)
    assert (full + target - classifier(x).logsumexp(dim=1).mean()).abs() < 1e-5


@pytest.fixture
def command(cache, tmp_path, monkeypatch, capsys):
    """Run the command at toy size, in this process, and return the lines that it prints and its rows."""
    def run(*words):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
        monkeypatch.setattr(many_classes, 'run_alone', lambda *arguments, threads: many_classes.run(*arguments))
        monkeypatch.setattr(sys, 'argv', [
            'benchmarks/many_classes.py', '--dims', '8', '--epochs', '2', '--batch-size', '16', '--seeds', '0',
            '--output', str(tmp_path), '--cache', str(cache), *words])
        many_classes.main()
        return (capsys.readouterr().out.splitlines(),
                json.loads((tmp_path / 'many_classes.json').read_text())['results'])
    return run


def test_every_method_runs_once(command):
    printed, rows = command('--data', 'dejavu', '--number', '12')
    assert [row['method'] for row in rows] == list(METHODS)
    assert printed[0] == f'{len(METHODS)} runs' and len(printed) == len(METHODS) + 1
    for row in rows:
        assert row['classes'] == 12 and row['steps'] == 2 * (row['training_images'] // 16)
        assert 0 <= row['top1'] <= row['top5'] <= 100 and 0 <= row['recall_at_1'] <= 100
        assert 0 < row['head_cpu_seconds'] < row['cpu_seconds']
        assert 0 < row['memory_before_mb'] <= row['peak_memory_mb']
        assert ('moved' in row) == (row['method'] in ('placed', 'even', 'paper', 'placed_sampled'))
    printed, again = command('--data', 'dejavu', '--number', '12')
    assert printed == ['0 runs'] and again == rows


def test_a_folder_of_images(command, tmp_path):
    generator = np.random.default_rng(0)
    for split, number in (('train', 6), ('validation', 3)):
        for name in range(20):
            (tmp_path / 'tiles' / split / f'{name:02}').mkdir(parents=True)
            for i in range(number):
                image = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(tmp_path / 'tiles' / split / f'{name:02}' / f'{i}.png')
    _, (row,) = command('--data', str(tmp_path / 'tiles'), '--methods', 'placed')
    assert row['data'] == 'tiles' and row['classes'] == 18 and row['unseen_images'] == 6
    assert str(tmp_path) not in (tmp_path / 'many_classes.json').read_text()
