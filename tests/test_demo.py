import json
import re

import numpy as np
import pytest
import torch

import timm_dl2pa
from timm_dl2pa import cli
from timm_dl2pa.demo.heads import HEADS, make_models
from timm_dl2pa.demo.letters import HELD_OUT, TRAINING, draw_letters, warp
from timm_dl2pa.demo.pictures import draw_accuracy, draw_neighbours
from timm_dl2pa.demo.sphere import _apart, _map, fit_sphere, groups_of
from timm_dl2pa.demo.table import claims, table_rows
from timm_dl2pa.demo.training import Run, right_answers

pytestmark = pytest.mark.timm


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    before = torch.get_rng_state()
    assert cli.main(['demo', '--epochs', '3', '--dim', '8', '--classes', '20', '--seed', '1', '--device', 'cpu',
                     '--model', 'test_resnet', '--output', str(folder)]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    return folder


@pytest.fixture(scope='module')
def results(output):
    return json.loads((output / 'results.json').read_text())


@pytest.mark.slow
def test_table_as_json(results):
    assert (results['epochs'], results['dim'], results['seed'], results['model']) == (3, 8, 1, 'test_resnet')
    runs = {run['head']: run for run in results['runs']}
    assert list(runs) == ['linear', 'linear_neck', 'static', 'paper', 'dl2pa'] and len(results['classes']) == 20
    neck = 96 * 8 + 2 * 8
    assert {kind: run['head_parameters'] for kind, run in runs.items()} == {
        'linear': 96 * 20 + 20, 'linear_neck': neck + 8 * 20 + 20, 'static': neck + 1, 'paper': 96 * 8 + 8,
        'dl2pa': neck + 1}
    # The paper's labels start at random, so that they move; nothing moves that has no re-solve.
    assert sum(runs['paper']['moved']) > 0 and len(runs['paper']['moved']) == 2
    assert runs['linear']['moved'] == runs['linear_neck']['moved'] == runs['static']['moved'] == []
    for run in runs.values():
        assert len(run['losses']) == 3 and run['losses'][-1] < run['losses'][0] and run['step_milliseconds'] > 0
        assert len(run['top1_by_epoch']) == 3 and run['top1_by_epoch'][-1] == run['top1']


@pytest.mark.slow
def test_the_trained_model_loads_with_one_call(output, results):
    model = timm_dl2pa.load_model(output / 'model')
    assert model.label_names == results['classes']
    from timm_dl2pa.demo.data import letter_data
    top1 = 100 * right_answers(model, letter_data(20, seed=1).test, torch.device('cpu')).mean().item()
    assert top1 == pytest.approx(results['runs'][-1]['top1'], abs=0.01)
    assert not torch.allclose(model.get_classifier().prototypes, timm_dl2pa.make_prototypes(20, 8, seed=1), atol=0.1)


@pytest.mark.slow
def test_the_report_needs_no_other_file(output, results):
    page = (output / 'report.html').read_text(encoding='utf-8')
    sources = re.findall(r'(?:src|href)="([^"]{20})', page)
    assert sources == ['data:image/png;base64'[:20]] * 3 and not re.search(r'https?://', page)
    for claim in results['claims']:
        assert claim.replace("'", '&#x27;') in page
    for run in results['runs']:
        assert f'<td>{run["head_parameters"]:,}</td>' in page


@pytest.mark.slow
@pytest.mark.parametrize('name', ['neighbours', 'sphere', 'accuracy'])
def test_the_pictures_show_something(output, name):
    from PIL import Image
    with Image.open(output / f'{name}.png') as picture:
        assert picture.width > 700 and len(picture.convert('RGB').getcolors(10 ** 6)) > 100


@pytest.mark.slow
@pytest.mark.parametrize('split', [True, False])
def test_own_images(tmp_path, split, capsys):
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    for part in ('train', 'val') if split else ('',):
        for name, shade in (('cat', 40), ('dog', 200)):
            folder = tmp_path / 'data' / part / name
            folder.mkdir(parents=True)
            for number in range(10):
                noise = torch.randint(0, 40, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray((noise + shade).numpy()).save(folder / f'{number}.png')
    assert cli.main(['demo', '--data-dir', str(tmp_path / 'data'), '--model', 'test_convnext', '--dim', '2',
                     '--epochs', '1', '--output', str(tmp_path / 'out')]) == 0
    said = capsys.readouterr()
    assert 'epoch  1 of 1, top-1' in said.out and 'batch' not in said.err  # no progress bar where there is no terminal
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['classes'] == ['cat', 'dog'] and results['model'] == 'test_convnext'
    assert results['test_images'] == (20 if split else 4)
    assert all((tmp_path / 'out' / f'{name}.png').exists() for name in ('neighbours', 'sphere', 'accuracy'))
    assert timm_dl2pa.load_model(tmp_path / 'out' / 'model').get_classifier().dim == 2


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'resnet_of_nobody'], 'cannot be made'), (['--epochs', '0'], '--epochs must be at least 1'),
    (['--dim', '0'], 'dim must be at least 1'),
    (['--dim', '1'], 'dim=1 has room for 2'),
    (['--device', 'teapot'], "--device 'teapot' cannot be used"),
    (['--classes', '1'], '--classes must be from 2'), (['--classes', '99999'], '--classes must be from 2'),
    (['--data-dir', 'nowhere'], 'nowhere')])
def test_bad_options_end_in_a_line_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_dl2pa.demo.command.train', None)
    with pytest.raises(SystemExit) as ended:
        cli.main(['demo', '--classes', '20', *arguments, '--output', str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# ---- letters


def test_no_two_letters_are_drawn_alike_by_a_face():
    letters = draw_letters(500)
    drawn = torch.cat([letters.train, letters.test], dim=1)
    assert drawn.shape == (500, 12, 32, 32) and len(set(letters.names)) == 500
    assert len(TRAINING) == 10 and len(HELD_OUT) == 2 and not set(TRAINING) & set(HELD_OUT)
    for face in drawn.unbind(1):
        assert (face.flatten(1) > 0).any(dim=1).all() and len({image.numpy().tobytes() for image in face}) == 500


def test_letters_are_the_same_in_each_call_and_in_the_middle():
    letters = draw_letters(30)
    assert letters.names == draw_letters(30).names
    for image in letters.train.flatten(0, 1).numpy():
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert all(abs(part[0] + part[-1] - 31) <= 1 for part in (rows, columns))


def test_a_warp_moves_slants_and_scales_each_image_in_its_own_way():
    images = draw_letters(2).train[:1, :1].expand(64, 1, 32, 32)
    warped = warp(images, torch.Generator().manual_seed(0))
    assert warped.shape == (64, 1, 32, 32) and warped.min() >= -1 and warped.max() <= 1
    assert torch.equal(warped, warp(images, torch.Generator().manual_seed(0)))
    ink = (warped[:, 0] + 0.4).clamp(min=0)  # without the noise
    ink = ink / ink.sum(dim=(1, 2), keepdim=True)
    steps = torch.arange(32.0)
    row, column = (ink.sum(2) @ steps)[:, None, None], (ink.sum(1) @ steps)[:, None, None]
    down, right = steps[:, None] - row, steps - column
    height = (ink * down ** 2).sum(dim=(1, 2))
    slant = (ink * down * right).sum(dim=(1, 2)) / height
    assert row.std() > 0.5 and column.std() > 0.5 and slant.std() > 0.1 and height.sqrt().std() > 0.2


# ---- heads


def test_all_models_start_from_the_same_backbone():
    models = make_models('test_resnet', 6, 4, seed=3, letters=True)
    assert list(models) == list(HEADS)
    weights = [model.state_dict()['layer4.0.conv1.weight'] for model in models.values()]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert all(model(torch.randn(2, 3, 32, 32)).shape == (2, 6) for model in models.values())
    static, paper, ours = (models[kind].get_classifier() for kind in ('static', 'paper', 'dl2pa'))
    assert (static.config.recipe, paper.config.recipe) == ('even', 'paper')
    assert ours.config.recipe == timm_dl2pa.wrap_dl2pa(make_models('test_resnet', 6, 4, 0, True)['linear'],
                                                       4).get_classifier().config.recipe  # the default


# ---- what is said


def _runs(**top1):
    return {kind: Run(kind, top1=top1.get(kind, 50.0), head_parameters=1000 if kind == 'linear' else 100,
                      step_milliseconds=10.0) for kind in HEADS}


def _right(**counts):
    return {kind: (torch.arange(100) < counts.get(kind, 50)).float() for kind in HEADS}


def test_what_lost_is_not_praised():
    said, _ = claims(_runs(dl2pa=30.0, linear=70.0), _right(dl2pa=30, linear=70))
    assert '40.0 points less accurate than the linear classifier' in said and 'more' not in said
    said, _ = claims(_runs(dl2pa=70.0, linear=30.0), _right(dl2pa=70, linear=30))
    assert '40.0 points more accurate than the linear classifier' in said and 'less' not in said


def test_a_small_difference_is_called_none():
    said, size = claims(_runs(dl2pa=52.0), _right(dl2pa=52))
    assert 'more' not in said and 'less' not in said and said.count('as accurate') == 4
    assert '10 % of the parameters' in size and '100 % of the time' in size


def test_moves_in_the_table():
    runs = _runs()
    runs['paper'].moved, runs['dl2pa'].moved = [1000, 500], [4]
    moved = {row[0]: row[-1] for row in table_rows(runs)}
    assert moved[HEADS['paper']] == '1,500 at 2 re-solves' and moved[HEADS['dl2pa']] == '4 at 1 re-solve'
    assert moved[HEADS['static']] == '-'


# ---- pictures


def test_groups_are_of_neighbours():
    centres = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    offsets = 0.1 * torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(1))
    points = torch.nn.functional.normalize(centres[:, None] + offsets, dim=2).flatten(0, 1)
    groups = groups_of(points)
    assert len(groups) == 6 and all(len({label // 3 for label in group}) == 1 for group in groups)
    assert groups_of(points[:5]) == [[0], [1], [2], [3], [4]]


def test_boxes_of_the_sphere_do_not_cover_each_other():
    places = 0.2 * torch.rand(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    gaps = np.abs(_apart(places)[:, None] - _apart(places)).max(axis=2) + np.eye(9)
    assert gaps.min() > 0.18


def test_the_map_keeps_hemispheres_in_the_disc():
    points = torch.nn.functional.normalize(torch.randn(500, 3), dim=1).numpy()
    for side in (1, -1):
        radius = np.linalg.norm(_map(points[side * points[:, 2] >= 0], side), axis=1)
        assert radius.max() <= 1 + 1e-6
        assert 0.35 < (radius ** 2).mean() < 0.65  # a half, where areas are equal


def test_the_head_of_the_sphere_learns_its_classes():
    torch.manual_seed(0)
    labels = torch.arange(6).repeat(40)
    embeddings = torch.nn.functional.normalize(torch.eye(16)[labels] + 0.1 * torch.randn(240, 16), dim=1)
    head = fit_sphere(embeddings, labels, 6, seed=0)
    assert head.dim == 3 and not head.warming_up
    assert (head(embeddings).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize('number', [2, 40])
def test_pictures_of_few_and_many_classes(tmp_path, number):
    pictures = list(draw_letters(number).train[:, 0].numpy())
    points = torch.nn.functional.normalize(torch.randn(number, 4), dim=1)
    draw_neighbours(tmp_path / 'neighbours.png', {'dl2pa': points, 'static': points}, pictures)
    runs = _runs()
    for run in runs.values():
        run.top1_by_epoch = [20.0, 50.0]
    draw_accuracy(tmp_path / 'accuracy.png', runs)
    assert all((tmp_path / f'{name}.png').stat().st_size > 5000 for name in ('neighbours', 'accuracy'))
