"""The accuracy benchmark can be trusted: its runs resume to the bit, and its measures are what they say."""
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import accuracy_metrics as metrics
import image_arrays
from accuracy_execute import execute
from accuracy_methods import CosineClassifier
from accuracy_queue import peers, queue
from accuracy_recipe import SIZES, Recipe, learning_rate
from accuracy_run import Run
from training_step import GraphedStep, PlainStep

from timm_dl2pa import AssignmentScheduler, DL2PAHead

RESULTS = Path(__file__).parents[2] / 'benchmarks' / 'results' / 'accuracy'

SMALL = dict(model='cifar_resnet8', dim=4, epochs=2, precision='float32')


@pytest.fixture(scope='module')
def digits():
    images = image_arrays.load_images()
    return replace(images, x_train=images.x_train[:512], y_train=images.y_train[:512])


@pytest.mark.slow
@pytest.mark.parametrize('recipe', [
    dict(method='softmax'), dict(method='cosine_softmax', neck='linear_bn', learn_scale=True),
    dict(method='static', loss='squared_cosine'),
    dict(method='etf', dim=9), dict(method='paper', loss='squared_cosine'), dict(method='dl2pa'),
    dict(method='dl2pa', mixup=1.0), dict(method='dl2pa', dl2pa_recipe='even'),
    dict(method='dl2pa', loss='dot_regression')], ids=str)
def test_a_run_that_was_cut_goes_on_to_the_bit(digits, tmp_path, recipe):
    recipe = Recipe(**{**SMALL, **recipe})
    device = torch.device('cpu')
    unbroken = Run(recipe, digits, device)
    unbroken.train_epoch()
    unbroken.save(tmp_path / 'run.ckpt')
    unbroken.train_epoch()
    resumed = Run(recipe, digits, device)
    resumed.load(tmp_path / 'run.ckpt')
    resumed.train_epoch()
    assert resumed.curve == unbroken.curve and resumed.moved() == unbroken.moved()
    after = resumed.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in unbroken.model.state_dict().items())


def test_one_file_a_run_and_fine_tuning_from_another(digits, tmp_path):
    device = torch.device('cpu')
    start = dict(model='cifar_resnet8', epochs=1)
    source = Recipe(**start, method='softmax', dim=0, classes='first_half')
    tuned = Recipe(**start, method='dl2pa', dim=4, classes='second_half', start_from='first_half')
    with pytest.raises(FileNotFoundError, match='holds the backbone to start from'):
        execute(tuned, digits, device, tmp_path, 'command')
    # What fine-tuning starts from is trained as long as a recipe is by default.
    source = replace(source, epochs=Recipe().epochs)
    assert 'recall_at_1_new_classes' in execute(source, digits, device, tmp_path, 'command')['results']
    record = execute(tuned, digits, device, tmp_path, 'command')
    assert record == json.loads((tmp_path / f'{tuned.name()}.json').read_text())
    assert record['before_training']['top1'] > record['before_training']['nearest_class_mean'] - 5 > 40
    assert record['recipe']['seed'] == 3 and len(record['curve']) == 1 and record['environment']['torch']
    # A run whose file is there is not run again.
    assert execute(tuned, None, device, tmp_path, 'command') == record


def test_a_run_ends_in_time_and_goes_on_later(digits, tmp_path):
    recipe, device = Recipe(**{**SMALL, 'epochs': 3}, method='softmax'), torch.device('cpu')
    assert execute(recipe, digits, device, tmp_path, 'command', until=time.time()) is None
    assert [file.suffix for file in tmp_path.iterdir()] == ['.ckpt']
    record = execute(recipe, digits, device, tmp_path, 'command')
    assert [file.suffix for file in tmp_path.iterdir()] == ['.json'] and len(record['curve']) == 3
    (tmp_path / 'unbroken').mkdir()
    assert record['curve'] == execute(recipe, digits, device, tmp_path / 'unbroken', 'command')['curve']


def test_results_are_named_after_their_recipes():
    files = sorted(RESULTS.glob('*.json'))
    recipes = [Recipe(**json.loads(file.read_text())['recipe']) for file in files]
    # The oldest say what 'auto' stood for on their machine.
    assert files and [replace(recipe, precision='auto').name() for recipe in recipes] == [file.stem for file in files]


def test_the_distillers_schedule():
    recipe = Recipe(**SIZES['distiller'])
    rates = [learning_rate(recipe, epoch / recipe.epochs) for epoch in range(recipe.epochs)]
    assert [epoch for epoch in range(1, 240) if rates[epoch] != rates[epoch - 1]] == [150, 180, 210]
    assert rates[0] == 0.05 and rates[-1] == pytest.approx(0.05 * 0.001)
    assert SIZES['distiller_100'] == {**SIZES['distiller'], 'epochs': 100}


def test_the_queues_have_every_method_once():
    for size in ('distiller_100', 'paper'):
        runs = peers(size, 50)
        assert len({tuple(run) for run in runs}) == len(runs) == 8
        assert [run[run.index('--dl2pa-recipe') + 1] for run in runs if 'dl2pa' in run] == ['placed', 'even', 'paper']
    assert [run[-1] for run in queue('distiller')] == ['50'] * 8 + ['10'] * 8 + ['100'] * 8


def test_a_learned_scale_starts_at_four_and_learns():
    torch.manual_seed(0)
    classifier = CosineClassifier(4, 10, 4.0, learn_scale=True)
    x, labels = torch.randn(64, 4), torch.randint(0, 10, (64,))
    assert classifier(x).abs().max() <= 4 + 1e-5
    nn.functional.cross_entropy(classifier(x), labels).backward()
    assert classifier.log_scale.grad.abs() > 0 and classifier.log_scale.exp().item() == pytest.approx(4)
    fixed = CosineClassifier(4, 10, 13.7)
    assert len(list(fixed.parameters())) == 1


# --- the step as a graph


def rerun(head):
    """Stands for a CUDA graph: a replay runs the function on the tensors that the recording was made with.

    The head's observer is that of the recording then: a graph has the kernels, and nothing that Python did.
    """
    def record(function):
        view, observer = head.training_view, head.training_view.on_forward

        def replay():
            current, view.on_forward = view.on_forward, observer
            function()
            view.on_forward = current
        return replay
    return record


def small_training(graphed, options, steps=12, record=rerun):
    torch.manual_seed(0)
    head = DL2PAHead(6, 5, 3, neck='linear_bn', learn_scale=True)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), head)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2)
    scheduler = AssignmentScheduler(model, interval=3, **options)
    step = PlainStep(model, nn.CrossEntropyLoss(), optimizer, nullcontext)
    if graphed:
        step = GraphedStep(step, head, record(head))
    losses = []
    for number in range(steps):
        x, labels = torch.randn(16, 8), torch.randint(0, 5, (16,))
        losses.append(float(step(x, labels, 0.1 / (1 + number))))
        scheduler.step(labels)
    return step, model, scheduler, losses


@pytest.mark.parametrize('options, replays', [
    # Three plain steps in each phase. Seven batches see the warm-up of six: its end comes after the seventh's forward.
    (dict(warmup='none'), 9), (dict(warmup_length=6), 4 + 2), (dict(recipe='even', warmup_length=6), 2)])
def test_a_recorded_step_is_the_plain_one(options, replays):
    _, plain_model, plain_scheduler, plain_losses = small_training(False, options)
    step, model, scheduler, losses = small_training(True, options)
    assert step.replays == replays and step.failure is None
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, value in plain_model.state_dict().items():
        assert torch.allclose(model.state_dict()[name].float(), value.float(), atol=1e-5), name
    assert torch.allclose(scheduler.class_means.sums, plain_scheduler.class_means.sums, atol=1e-4)
    assert [update.moved for update in scheduler.history] == [update.moved for update in plain_scheduler.history]


def test_where_recording_fails_the_step_stays_plain():
    def broken(function):
        function()
        raise RuntimeError('operation not permitted when stream is capturing\nmore')

    def refused(function):
        raise RuntimeError('no graph here')

    _, plain_model, _, plain_losses = small_training(False, dict(warmup='none'))
    with pytest.warns(UserWarning, match='no graph here'):
        step, model, _, losses = small_training(True, dict(warmup='none'), record=lambda head: refused)
    assert step.failure == 'RuntimeError: no graph here' and not step.replays and losses == plain_losses
    assert all(torch.equal(value, plain_model.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match='not permitted'):
        step, *_ = small_training(True, dict(warmup='none'), record=lambda head: broken)
    assert step.failure.endswith('stream is capturing')


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
