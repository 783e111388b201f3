"""The fine-tuning benchmark: every method runs, no run twice, and data and weights are what they are said to be."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import finetune
import finetune_data
from finetune_methods import CLOSED_FORMS, METHODS
from finetune_run import Setting
from image_arrays import Images

CLASSES = ('blue', 'green', 'red')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An ImageFolder of noisy images of one colour a class, of several shapes."""
    root, generator = tmp_path_factory.mktemp('colours'), np.random.default_rng(0)
    for split, number in (('train', 9), ('val', 4)):
        for channel, name in zip((2, 1, 0), CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 120, (40 + i, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """Run the command at toy size, and return the lines that it prints and its rows."""
    def run(*words):
        monkeypatch.setattr(sys, 'argv', [
            'benchmarks/finetune.py', '--data', str(folder), '--model', 'cifar_resnet8', '--size', '16', '--dims', '4',
            '--batch-size', '6', '--seeds', '0', '--output', str(tmp_path), '--cache', str(tmp_path), *words])
        finetune.main()
        return (capsys.readouterr().out.splitlines(),
                json.loads((tmp_path / 'finetune.json').read_text())['results'])
    return run


def test_every_method_runs_once_on_a_frozen_backbone(command, folder, tmp_path):
    printed, rows = command('--epochs', '2')
    assert {row['method'] for row in rows} == set(METHODS) and len(rows) == len(METHODS)
    assert printed[0] == f'{len(rows)} runs' and len(printed) == len(rows) + 1
    by_name = {row['method']: row for row in rows}
    for row in rows:
        assert row['data'] == folder.name and row['weights'] == 'random' and row['cpu_seconds'] >= 0
        assert 0 <= row['top1'] <= 100 and 0 <= row['recall_at_1'] <= 100
        if row['method'] not in CLOSED_FORMS:
            assert len(row['curve']) == row['epochs'] == 2 and row['curve'][-1] == row['top1']
            assert row['calibration_error'] >= 0 and row['first_loss'] > 0 and 'top1' in row['before']
        assert ('prime_cpu_seconds' in row) == row['method'].endswith('_primed')
    assert by_name['nearest_mean']['top1'] > 80 and by_name['logistic']['top1'] > 80
    assert by_name['placed_primed']['before']['top1'] > 60
    assert by_name['linear']['dim'] is None and by_name['cosine']['dim'] == 4
    # What is there is not run again, and no path of this machine is in the record.
    printed, again = command('--epochs', '2')
    assert printed == ['0 runs'] and again == rows
    text = (tmp_path / 'finetune.json').read_text()
    assert str(folder.parent) not in text and f'--data {folder.name}' in text


def test_the_whole_model_is_trained(command):
    _, rows = command('--methods', 'linear', 'placed_primed', '--backbone', 'trained', 'trained_but_batch_norm',
                      '--epochs', '1', '--rates', 'sgd:0.01', '--augmented', '--prime-images', 'plain', 'augmented')
    assert [(row['method'], row['backbone'], row['prime_images']) for row in rows] == [
        ('linear', 'trained', None), ('placed_primed', 'trained', 'plain'), ('placed_primed', 'trained', 'augmented'),
        ('linear', 'trained_but_batch_norm', None), ('placed_primed', 'trained_but_batch_norm', 'plain'),
        ('placed_primed', 'trained_but_batch_norm', 'augmented')]
    assert all(row['optimizer'] == 'sgd' and row['lr'] == 0.01 and 'curve' not in row for row in rows)
    # With a backbone that is the same in both modes a linear classifier's first loss is too.
    kept = next(row for row in rows if row['method'] == 'linear' and row['backbone'] == 'trained_but_batch_norm')
    assert kept['first_loss'] == pytest.approx(kept['first_loss_evaluated'], rel=1e-3)


def test_a_head_is_primed_on_plain_images_where_training_sees_augmented_ones(command):
    words = ('--methods', 'placed_primed', '--epochs', '1')
    _, (plain,) = command(*words)
    _, rows = command(*words, '--augmented', '--prime-images', 'plain', 'augmented')
    by_images = {row['prime_images']: row['before'] for row in rows if row['augmented']}
    assert by_images['plain'] == plain['before'] != by_images['augmented']


def test_rows_of_another_machine_are_not_mixed_in(command, tmp_path):
    command('--methods', 'nearest_mean')
    path = tmp_path / 'finetune.json'
    record = json.loads(path.read_text())
    record['environment']['cpu'] = 'another'
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r'of another machine .*\(cpu\)'):
        command('--methods', 'linear')


def test_draws_of_cifar(monkeypatch):
    def images(**_):
        labels = torch.arange(3).repeat(10)
        numbers = torch.arange(30).view(30, 1, 1, 1).expand(30, 3, 4, 4).to(torch.uint8)
        return Images(numbers, labels, numbers, labels, CLASSES)

    monkeypatch.setattr(finetune_data, 'load_images', images)

    def draw(number, seed):
        found = finetune_data.load_data(f'cifar100:{number}', arrays='.', size=8, seed=seed, test_images=2)
        assert torch.bincount(found.y_train).tolist() == [number] * 3
        assert found.x_test[:, 0, 0, 0].tolist() == [0, 3, 1, 4, 2, 5]
        return set(found.x_train[:, 0, 0, 0].tolist())

    assert draw(2, 0) == draw(2, 0) != draw(2, 1) and draw(2, 0) < draw(5, 0)
    for data, arrays, message in (('cifar100', '.', 'cifar100:N'), ('cifar100:5', None, '--arrays')):
        with pytest.raises(ValueError, match=message):
            finetune_data.load_data(data, arrays=arrays, size=8, seed=0, test_images=2)
    with pytest.raises(FileNotFoundError, match='no folder train/'):
        finetune_data.load_data('nowhere', arrays=None, size=8, seed=0, test_images=2)


@pytest.mark.timm
def test_weights_of_the_package_are_timms_under_other_names(tmp_path):
    own = timm.create_model('tf_efficientnet_lite0').state_dict()
    for number, value in enumerate(own.values()):  # the batch norms of a new model are all the same
        value.fill_(number)
    norm = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')

    def with_norm(layer, batch_norm):
        return [f'{layer}.weight', *(f'{batch_norm}.{name}' for name in norm)]

    names = with_norm('_conv_stem', '_bn0')
    for block in range(16):
        place = f'_blocks.{block}.'
        names += with_norm(f'{place}_expand_conv', f'{place}_bn0') if block else []
        names += with_norm(f'{place}_depthwise_conv', f'{place}_bn1')
        names += with_norm(f'{place}_project_conv', f'{place}_bn2')
    names += [*with_norm('_conv_head', '_bn1'), '_fc.weight', '_fc.bias']
    assert len(names) == len(own) == 296
    # Both have their layers in the order of the forward pass.
    torch.save(dict(zip(names, own.values())), tmp_path / 'weights.pth')
    model = finetune_data.load_backbone('tf_efficientnet_lite0', tmp_path / 'weights.pth', 7)
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in own.items() if 'classifier' not in name)
    assert model.num_classes == 7 and loaded['classifier.weight'].shape == (7, 1280)
    torch.save(own, tmp_path / 'timm.pth')
    finetune_data.load_backbone('tf_efficientnet_lite0', tmp_path / 'timm.pth', 7)
    torch.save({name: value for name, value in own.items() if name != 'bn1.weight'}, tmp_path / 'part.pth')
    with pytest.raises(RuntimeError, match=r'bn1\.weight'):
        finetune_data.load_backbone('tf_efficientnet_lite0', tmp_path / 'part.pth', 7)


def test_unknown_words_are_refused():
    for name, value in (('method', 'svm'), ('backbone', 'melted'), ('optimizer', 'lion')):
        with pytest.raises(ValueError, match=f'{name} must be one of'):
            Setting(**{'data': 'd', 'model': 'm', 'weights': 'w', 'size': 8, 'method': 'linear', name: value})
