import json

import pytest
import torch

import timm_dl2pa
from timm_dl2pa import cli

pytestmark = pytest.mark.timm


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    assert cli.main(['demo', '--epochs', '2', '--dim', '4', '--seed', '1', '--device', 'cpu',
                     '--output', str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_table_as_json(output):
    results = json.loads((output / 'results.json').read_text())
    assert (results['epochs'], results['dim'], results['seed'], results['model']) == (2, 4, 1, 'test_resnet')
    linear, static, dl2pa = results['runs']
    assert [run['head'] for run in results['runs']] == ['linear', 'static', 'dl2pa']
    assert linear['head_parameters'] == 96 * 10 + 10 and static['head_parameters'] == 96 * 4 + 2 * 4 + 1
    assert linear['moved'] == static['moved'] == [] and len(dl2pa['moved']) > 3    # after the warm-up
    for run in results['runs']:
        assert run['losses'][1] < run['losses'][0] and run['step_milliseconds'] > 0
        assert run['top1'] > 20  # twice chance, after two epochs


@pytest.mark.slow
def test_the_trained_model_loads_with_one_call(output):
    model = timm_dl2pa.load_model(output / 'model')
    results = json.loads((output / 'results.json').read_text())
    assert model.label_names == [str(digit) for digit in range(10)]
    from timm_dl2pa.demo import _load_images, _top1
    _, test_set, _, _ = _load_images(None, 'test_resnet', seed=1)
    assert _top1(model, test_set, torch.device('cpu')) == results['runs'][2]['top1']
    assert not torch.allclose(model.get_classifier().prototypes, timm_dl2pa.make_prototypes(10, 4, seed=1), atol=0.1)


@pytest.mark.slow
def test_the_picture_shows_something(output):
    from PIL import Image
    with Image.open(output / 'embeddings.png') as picture:
        assert picture.width > 1000 and len(picture.convert('RGB').getcolors(10 ** 6)) > 100


@pytest.mark.slow
@pytest.mark.parametrize('split', [True, False])
def test_own_images(tmp_path, split):
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
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['classes'] == ['cat', 'dog'] and results['model'] == 'test_convnext'
    assert (tmp_path / 'out' / 'embeddings.png').exists()
    assert timm_dl2pa.load_model(tmp_path / 'out' / 'model').get_classifier().dim == 2


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'resnet_of_nobody'], 'cannot be made'), (['--epochs', '0'], '--epochs must be at least 1'),
    (['--dim', '0'], 'dim must be at least 1'),
    (['--dim', '1'], 'dim=1 has room for 2'),
    (['--device', 'teapot'], "--device 'teapot' cannot be used"),
    (['--data-dir', 'nowhere'], 'nowhere')])
def test_bad_options_end_in_a_line_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_dl2pa.demo._train', None)
    with pytest.raises(SystemExit) as ended:
        cli.main(['demo', *arguments, '--output', str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('moved, text', [
    ([], '-'), ([3, 0], '3 0'), ([5, 2, 0, 0, 0], '5 2, then 0 (3 times)'), ([0, 0], '0 (2 times)'), ([4], '4')])
def test_moves_in_the_table(moved, text):
    from timm_dl2pa.demo import _format_moves
    assert _format_moves(moved) == text
