"""The accuracy benchmark can be trusted: its runs resume to the bit, and its measures are what they say."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import accuracy
import accuracy_metrics as metrics
import image_arrays

SMALL = dict(model='cifar_resnet8', dim=4, epochs=2, precision='float32')


@pytest.fixture(scope='module')
def digits():
    images = image_arrays.load_images()
    return image_arrays.replace(images, x_train=images.x_train[:512], y_train=images.y_train[:512])


@pytest.mark.parametrize('recipe', [
    dict(method='softmax'), dict(method='cosine_softmax'), dict(method='static', loss='squared_cosine'),
    dict(method='etf', dim=9), dict(method='paper', loss='squared_cosine'), dict(method='dl2pa'),
    dict(method='dl2pa', mixup=1.0), dict(method='dl2pa', loss='dot_regression')], ids=str)
def test_a_run_that_was_cut_goes_on_to_the_bit(digits, tmp_path, recipe):
    recipe = accuracy.Recipe(**{**SMALL, **recipe})
    device = torch.device('cpu')
    unbroken = accuracy.Run(recipe, digits, device)
    unbroken.train_epoch()
    unbroken.save(tmp_path / 'run.ckpt')
    unbroken.train_epoch()
    resumed = accuracy.Run(recipe, digits, device)
    resumed.load(tmp_path / 'run.ckpt')
    resumed.train_epoch()
    assert resumed.curve == unbroken.curve and resumed.moved() == unbroken.moved()
    after = resumed.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in unbroken.model.state_dict().items())


def test_one_file_a_run_and_fine_tuning_from_another(digits, tmp_path):
    device = torch.device('cpu')
    start = dict(model='cifar_resnet8', epochs=1)
    source = accuracy.Recipe(**start, method='softmax', dim=0, classes='first_half')
    tuned = accuracy.Recipe(**start, method='dl2pa', dim=4, classes='second_half', start_from='first_half')
    with pytest.raises(FileNotFoundError, match='holds the backbone to start from'):
        accuracy.execute(tuned, digits, device, tmp_path, 'command')
    # What fine-tuning starts from is trained as long as a recipe is by default.
    source = accuracy.replace(source, epochs=accuracy.Recipe().epochs)
    assert 'recall_at_1_new_classes' in accuracy.execute(source, digits, device, tmp_path, 'command')['results']
    record = accuracy.execute(tuned, digits, device, tmp_path, 'command')
    assert record == json.loads((tmp_path / f'{tuned.name()}.json').read_text())
    assert record['before_training']['top1'] > record['before_training']['nearest_class_mean'] - 5 > 40
    assert record['recipe']['seed'] == 3 and len(record['curve']) == 1 and record['environment']['torch']
    # A run whose file is there is not run again.
    assert accuracy.execute(tuned, None, device, tmp_path, 'command') == record


def test_held_out_images_are_training_images_of_each_class(digits):
    held = image_arrays.hold_out(digits)
    assert len(held.x_train) + len(held.x_test) == len(digits.x_train)
    own = {image.numpy().tobytes() for image in held.x_train} & {image.numpy().tobytes() for image in held.x_test}
    assert len(own) < 3 and len(set(held.y_test.tolist())) == 10
    tail = image_arrays.long_tail(digits, 0.1)
    counts = torch.bincount(tail.y_train).tolist()
    largest = int(torch.bincount(digits.y_train).max())
    assert counts[9] == int(largest * 0.1) and counts[4] <= int(largest * 0.1 ** (4 / 9))


def test_measures():
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.tensor([[2.0, 0, 0], [0, 1.0, 2.0], [0, 1.0, 2.0], [0, 2.0, 1.0]])
    assert metrics.top_k(logits, labels, 1) == 50 and metrics.top_k(logits, labels, 2) == 75
    # Confidence 0.5 in one bin, half of it right: calibrated. All wrong: off by the confidence.
    even = torch.log(torch.tensor([[0.5, 0.3, 0.2]] * 2))
    assert metrics.calibration_error(even, torch.tensor([0, 1])) == pytest.approx(0, abs=1e-5)
    assert metrics.calibration_error(even, torch.tensor([1, 2])) == pytest.approx(50, abs=1e-5)
    vectors = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0]])
    assert metrics.angular_separation(vectors) == pytest.approx({'mean': 90, 'smallest': 90})
    close = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    assert metrics.superclass_agreement(close, torch.tensor([0, 0, 1, 1])) == 100
    assert metrics.superclass_agreement(close, torch.tensor([0, 1, 1, 0])) == 0
    assert metrics.recall_at_1(close, torch.tensor([0, 0, 1, 2])) == 50
    groups = metrics.tail_groups(torch.tensor([500, 100, 20, 19]))
    assert [groups[name].tolist().index(True) for name in ('head', 'medium', 'tail')] == [0, 1, 3]
