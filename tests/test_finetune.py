"""The command `timm-dl2pa finetune`, on coloured patterns and a tiny model."""
import inspect
import json
import random
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_dl2pa
from tests.helpers.image_folders import COLOURS, make_colours
from timm_dl2pa import cli
from timm_dl2pa.finetune import command, run_finetune, training
from timm_dl2pa.finetune.backbone import keep_statistics, make_backbone
from timm_dl2pa.finetune.images import Images, UnreadableImageError, find_images, split_indices
from timm_dl2pa.finetune.report import confusions, per_class, report_lines, text_table
from timm_dl2pa.finetune.training import Best, Epoch, Evaluation, make_loader
from timm_dl2pa.prototypes.nearest import nearest_pairs

pytestmark = pytest.mark.timm

SMALL = ['--model', 'test_resnet', '--image-size', '32', '--batch-size', '8', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """What stands for pretrained weights: a state dict with a classifier of 1,000 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model('test_resnet')
        for _ in range(30):  # running statistics
            model.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def keep_random_state():
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


def finetune(data, output, *arguments):
    assert cli.main(['finetune', str(data), *SMALL, '--output', str(output), *map(str, arguments)]) == 0
    return json.loads((output / 'metrics.json').read_text())


def test_from_pretrained_weights(data, weights, tmp_path, capsys):
    metrics = finetune(data, tmp_path, '--weights', weights, '--epochs', 2)
    said = capsys.readouterr().out
    assert metrics['settings']['dim'] == 16 and metrics['settings']['lr'] == 1e-4
    assert [epoch['epoch'] for epoch in metrics['epochs']] == [0, 1, 2]
    assert metrics['primed_top1_left_out'] > 60 and metrics['epochs'][0]['val_top1'] > 60  # three colours
    assert metrics['val_top1'] == max(epoch['val_top1'] for epoch in metrics['epochs'])
    assert {name: row['images'] for name, row in metrics['classes'].items()} == dict.fromkeys(COLOURS, 10)
    assert 'held out' not in said and f'timm-dl2pa push {tmp_path / "model"} USER/NAME' in said
    assert 'The prototypes of all classes are 120.0 degrees apart.' in (tmp_path / 'report.txt').read_text()
    assert (tmp_path / 'report.txt').read_text() in said
    # The saved model is the one that was measured, with its classes and its preparation of images.
    model = timm_dl2pa.load_model(tmp_path / 'model')
    assert model.label_names == list(COLOURS) and model.pretrained_cfg['input_size'] == (3, 32, 32)
    images = Images(find_images(data).validation, timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        right = [model(image[None]).argmax().item() == label for image, label in images]
    assert 100 * sum(right) / len(right) == pytest.approx(metrics['val_top1'], abs=0.01)


def test_from_random_weights_on_one_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, 'prime', None)  # random features say nothing of the classes
    data = make_colours(tmp_path / 'data', parts=[''])
    metrics = finetune(data, tmp_path / 'out', '--no-pretrained', '--epochs', 1)
    assert metrics['images'] == {'train': 24, 'validation': 6, 'held_out': True}
    assert metrics['primed_top1_left_out'] is None and metrics['settings']['lr'] == 1e-3
    assert metrics['settings']['train_batch_norm'] and metrics['settings']['data'] == 'data'
    assert 'held out, a fifth of each class' in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_trained(data, weights, tmp_path):
    """Batch norms keep their statistics, a frozen backbone keeps all, and its head is trained."""
    before = torch.load(weights)
    for arguments, kept, trained in (
            ([], 'bn1.running_mean', 'conv1.0.weight'), (['--freeze'], 'conv1.0.weight', None),
            (['--train-batch-norm'], None, 'bn1.running_mean')):
        output = tmp_path / '_'.join(arguments or ['default'])
        primed = run_small(data, weights, output / 'primed', arguments, epochs=0)
        after = run_small(data, weights, output / 'trained', arguments, epochs=1)
        assert kept is None or torch.equal(after[kept], before[kept])
        assert trained is None or not torch.equal(after[trained], before[trained])
        assert torch.equal(primed['conv1.0.weight'], before['conv1.0.weight'])
        assert not torch.equal(primed['fc.neck.0.weight'], after['fc.neck.0.weight'])


def run_small(data, weights, output, arguments, epochs):
    """Return the state after the last epoch, which counts as the best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Best, 'offer', offer_last)
        finetune(data, output, '--weights', weights, '--epochs', epochs, *arguments)
    return timm_dl2pa.load_model(output / 'model').state_dict()


def offer_last(self, epoch, model):
    self.epoch, self._state = epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return True


def test_it_repeats_exactly(data, tmp_path):
    def numbers(output):
        random.seed(output), torch.manual_seed(len(output))
        metrics = finetune(data, tmp_path / output, '--no-pretrained', '--epochs', 2, '--lr', 0.01)
        return [{**epoch, 'seconds': 0} for epoch in metrics['epochs']]
    assert numbers('first') == numbers('second')


@pytest.mark.parametrize('recipe', ['even', 'paper'])
def test_recipes(data, weights, tmp_path, recipe):
    metrics = finetune(data, tmp_path, '--weights', weights, '--epochs', 1, '--recipe', recipe, '--dim', 2)
    assert timm_dl2pa.load_model(tmp_path / 'model').get_classifier().config.recipe == recipe
    assert metrics['epochs'][1]['train_loss'] < 10


def test_a_model_that_is_made_for_one_size(data, tmp_path):
    finetune(data, tmp_path, '--no-pretrained', '--model', 'test_vit', '--image-size', 64, '--epochs', 1)
    model = timm_dl2pa.load_model(tmp_path / 'model')
    assert model.patch_embed.img_size == (64, 64) and model.pretrained_cfg['input_size'] == (3, 64, 64)


# --- the best epoch, early stopping, interruptions


def evaluation(top1=50.0, loss=1.0):
    return Evaluation(top1, loss, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]), torch.eye(3))


def test_early_stopping_keeps_the_best(data, weights, tmp_path, monkeypatch, capsys):
    accuracies, necks = iter([40.0, 50.0, 60.0, 55.0, 60.0, 80.0]), []

    def evaluate(model, _):
        necks.append(model.fc.neck[0].weight.detach().clone())
        return evaluation(next(accuracies))

    monkeypatch.setattr(training, 'evaluate', evaluate)
    metrics = finetune(data, tmp_path, '--weights', weights, '--epochs', 6, '--patience', 2)
    assert [epoch['val_top1'] for epoch in metrics['epochs']] == [40, 50, 60, 55, 60] and metrics['best_epoch'] == 2
    assert 'has not risen for 2 epochs' in capsys.readouterr().out
    saved = timm_dl2pa.load_model(tmp_path / 'model').fc.neck[0].weight
    assert torch.equal(saved, necks[2]) and not torch.equal(saved, necks[4])


def test_the_best_is_by_accuracy_then_by_loss():
    model, best = torch.nn.Linear(1, 1), Best()
    seen = []
    for number, (top1, loss) in enumerate([(50, 1.0), (50, 0.9), (40, 0.1), (50, 0.9), (60, 2.0)]):
        torch.nn.init.constant_(model.weight, number)
        best.offer(Epoch(number, None, evaluation(top1, loss), 0.0), model)
        seen.append((best.epoch.number, best.stale))
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 3), (4, 0)]
    torch.nn.init.constant_(model.weight, 9)
    best.restore(model)
    assert model.weight.item() == 4


def test_ctrl_c_keeps_the_best_so_far(data, weights, tmp_path, monkeypatch, capsys):
    evaluate, calls = training.evaluate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            assert timm_dl2pa.load_model(tmp_path / 'model').num_classes == 3  # a crash would not lose it either
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(training, 'evaluate', interrupted)
    metrics = finetune(data, tmp_path, '--weights', weights, '--epochs', 9)
    assert [epoch['epoch'] for epoch in metrics['epochs']] == [0, 1] and metrics['settings']['epochs'] == 9
    assert f'the best epoch so far, {metrics["best_epoch"]}, is kept' in capsys.readouterr().out
    assert timm_dl2pa.load_model(tmp_path / 'model').label_names == list(COLOURS)


def test_ctrl_c_before_there_is_anything(data, weights, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(command, 'prime', interrupted)
    assert error_of(data, '--weights', weights, '--output', tmp_path, capsys=capsys, status=130) == \
        'timm-dl2pa finetune: interrupted before there was a model to save\n'


# --- errors


def error_of(data, *arguments, capsys, status=2):
    with pytest.raises(SystemExit) as ended:
        cli.main(['finetune', str(data), *SMALL, *map(str, arguments)])
    assert ended.value.code == status
    return capsys.readouterr().err


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'resnet_of_nobody'], "--model 'resnet_of_nobody' cannot be made"),
    (['--epochs', '-1'], '--epochs must be at least 0'), (['--batch-size', '1'], '--batch-size must be at least 2'),
    (['--dim', '0'], '--dim must be at least 1'), (['--lr', '0'], '--lr must be above 0'),
    (['--patience', '0'], '--patience must be at least 1'), (['--device', 'teapot'], "--device 'teapot' cannot be"),
    (['--freeze', '--no-pretrained'], '--freeze with --no-pretrained'), (['--recipe', 'none'], 'invalid choice'),
    (['--weights', 'a', '--no-pretrained'], 'not allowed with'), (['--weights', 'nowhere.pth'], 'nowhere.pth: no such'),
])
def test_bad_options(data, arguments, message, tmp_path, capsys):
    assert message in error_of(data, *arguments, '--output', tmp_path / 'out', capsys=capsys)
    assert not (tmp_path / 'out').exists()


def test_weights_without_a_network(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    said = error_of(data, '--model', 'test_resnet.r160_in1k', capsys=capsys)
    assert 'the pretrained weights of' in said and '--weights FILE' in said and '--no-pretrained' in said


def test_a_model_without_pretrained_weights(data, capsys):
    assert 'has no pretrained weights in timm' in error_of(data, '--model', 'mobilenetv4_conv_small_035', capsys=capsys)


def test_weights_of_another_model(data, tmp_path, capsys):
    path = tmp_path / 'other.pth'
    torch.save(timm.create_model('test_vit').state_dict(), path)
    assert 'must hold the weights of test_resnet, under timm' in error_of(data, '--weights', path, capsys=capsys)
    said = error_of(data, '--weights', path, '--model', 'test_vit', capsys=capsys)
    assert 'pos_embed has the shape' in said and '--image-size' in said


def test_all_weights_but_the_classifier_are_loaded(weights):
    given, found = torch.load(weights), make_backbone('test_resnet', 5, weights=weights).state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.items() if not name.startswith('fc.'))
    assert len(found['fc.weight']) == 5
    # A file with as many classes lends its classifier neither.
    assert not torch.equal(make_backbone('test_resnet', 1000, weights=weights).fc.weight, given['fc.weight'])


def test_a_loss_that_is_not_finite(data, weights, tmp_path, capsys):
    said = error_of(data, '--weights', weights, '--lr', 1e30, '--output', tmp_path, capsys=capsys)
    assert 'the loss of epoch' in said and 'give a lower --lr than 1e+30' in said
    assert timm_dl2pa.load_model(tmp_path / 'model').num_classes == 3  # the primed one


@pytest.mark.parametrize('change, message', [
    (lambda root: (root / 'train' / 'empty').mkdir(), 'empty'),
    (lambda root: [path.unlink() for path in (root / 'val' / 'red').iterdir()], 'Found no valid file'),
    (lambda root: [(root / 'train' / name).rename(root / name) for name in COLOURS], 'no folders in it'),
    (lambda root: (root / 'val' / 'red').rename(root / 'val' / 'pink'), "has 'pink'"),
    (lambda root: [(root / part / name).rename(root / f'{part} {name}') for part in ('train', 'val')
                   for name in ('red', 'blue')], "one class, 'green'"),
    (lambda root: (root / 'train').rename(root / 'training'), 'has a folder val/'),
])
def test_folders_that_will_not_do(tmp_path, change, message):
    change(make_colours(tmp_path, count=1))
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        find_images(tmp_path)
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    make_colours(tmp_path, parts=['train'], count=1)
    with pytest.raises(ValueError, match='blue has one image, of which none can be held out'):
        find_images(tmp_path)


def test_hidden_files_are_no_images(tmp_path):
    make_colours(tmp_path, count=2)
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    (tmp_path / 'train' / 'red' / '._0.png').write_bytes(b'resource fork')
    found = find_images(tmp_path)
    assert found.names == list(COLOURS) and len(found.train) == len(found.validation) == 6


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_named(tmp_path, weights, capsys, workers):
    make_colours(tmp_path, count=2)
    bad = tmp_path / 'val' / 'red' / '1.png'
    bad.write_bytes(bad.read_bytes()[:200])
    said = error_of(tmp_path, '--weights', weights, '--output', tmp_path / 'out', '--workers', workers, capsys=capsys)
    last = said.splitlines()[-1]  # after the bars
    assert last.startswith(f'timm-dl2pa finetune: {bad} cannot be read as an image (') and 'Traceback' not in said
    with pytest.raises(UnreadableImageError):
        Images([(str(bad), 0)], {'input_size': (3, 32, 32)})[0]


# --- parts


def test_split_is_stratified_and_by_seed():
    labels = [0] * 10 + [1] * 2 + [2] * 25
    kept, held_out = split_indices(labels, 0.2, seed=0)
    assert sorted(kept + held_out) == list(range(37))
    assert [sum(labels[index] == label for index in held_out) for label in range(3)] == [2, 1, 5]
    assert split_indices(labels, 0.2, seed=0) == (kept, held_out) != split_indices(labels, 0.2, seed=1)


@pytest.mark.parametrize('images, batches', [(16, 2), (19, 2), (20, 3), (5, 1), (9, 1)])
def test_a_small_last_batch_is_left_out_in_training(images, batches):
    samples = [(torch.zeros(1), 0)] * images
    assert len(make_loader(samples, 8, 0, torch.device('cpu'), seed=0)) == batches
    assert len(make_loader(samples, 8, 0, torch.device('cpu')).dataset) == images
    assert sum(len(labels) for _, labels in make_loader(samples, 8, 0, torch.device('cpu'))) == images


def test_batch_norms_of_the_head_are_trained():
    model = timm_dl2pa.wrap_dl2pa(timm.create_model('test_resnet', num_classes=3), 4).train()
    keep_statistics(model)
    norms = {name: part.training for name, part in model.named_modules() if isinstance(
        part, torch.nn.modules.batchnorm._BatchNorm)}
    assert len(norms) > 3 and [name for name, training in norms.items() if training] == [
        name for name in norms if name.startswith('fc.')] != []


def test_nearest_pairs():
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [0.1, 1], [-1, 0.5]]))
    found = nearest_pairs(rows, 5)
    assert [set(pair) for *pair, _ in found] == [{1, 2}, {1, 3}, {0, 2}]
    assert found == sorted(found, key=lambda row: row[2]) and nearest_pairs(rows, 1) == found[:1]
    assert found[0][2] == pytest.approx(5.71, abs=0.01)


def test_report():
    found = evaluation()
    assert confusions(found) == [(0, 1, 1), (2, 0, 1)] and per_class(found, 3) == [(1, 2), (1, 1), (0, 1)]
    prototypes = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [-1, 0]]))
    text = '\n'.join(report_lines(found, prototypes, ['cat', 'dog', 'owl']))
    assert 'Nearest classes, by their prototypes:' in text and 'Least accurate classes:' in text
    nearest, confused, worst = (text.splitlines()[line] for line in (3, 9, 15))
    assert nearest.split() == ['cat', 'dog', '0.994', '0.000', '1']
    assert confused.split() == ['cat', 'dog', '1', '2'] and worst.split() == ['owl', '0.0', '1']


def test_report_without_errors():
    labels = torch.tensor([0, 1])
    found = Evaluation(100.0, 0.0, labels, labels, torch.eye(2))
    assert list(report_lines(found, torch.tensor([[1.0], [-1.0]]), ['a', 'b']))[-1].startswith('All validation images')


def test_columns_of_numbers_are_aligned_on_the_right():
    assert list(text_table(['name', 'count'], [['a', 10], ['bcdef', 5]])) == [
        'name   count', '-----  -----', 'a         10', 'bcdef      5']


def test_the_picture(tmp_path, monkeypatch, data, weights, capsys):
    pytest.importorskip('matplotlib')
    command.draw_confusions(tmp_path / 'picture.png', evaluation(), ['cat', 'dog$', 'o' * 50])
    with Image.open(tmp_path / 'picture.png') as picture:
        assert picture.width > 200 and len(picture.convert('RGB').getcolors(10 ** 6)) > 20

    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'", name='matplotlib')
    monkeypatch.setattr(command, 'draw_confusions', missing)
    finetune(data, tmp_path, '--weights', weights, '--epochs', 0)
    assert 'There is no picture, which needs matplotlib' in capsys.readouterr().out


def test_the_commands_defaults_are_the_functions(monkeypatch):
    given = {}
    monkeypatch.setattr('timm_dl2pa.finetune.run_finetune', lambda data, **options: given.update(options))
    assert cli.main(['finetune', 'somewhere']) == 0
    parameters = list(inspect.signature(run_finetune).parameters.values())[1:]
    assert given == {parameter.name: parameter.default for parameter in parameters}


def test_bad_arguments_in_python(data):
    with pytest.raises(ValueError, match='--epochs must be a whole number'):
        run_finetune(str(data), epochs=1.5)


def test_the_page_on_fine_tuning(tmp_path, monkeypatch, weights):
    """Its Python runs, on coloured patterns and a tiny model, and its options are those of the command."""
    text = (Path(__file__).parent.parent / 'docs' / 'fine-tune.md').read_text()
    block, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    for written, smaller in (('epochs = 20', 'epochs = 2'), ('batch_size=64', 'batch_size=8')):
        assert written in block
        block = block.replace(written, smaller)
    make_colours(tmp_path / 'pets', parts=['train'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, 'create_model', small_model(timm.create_model, weights))
    names = {}
    exec(compile(block, 'fine-tune.md', 'exec'), names)
    assert names['scheduler'].steps == 6 and not names['scheduler'].warming_up
    assert timm_dl2pa.load_model('my-model').label_names == list(COLOURS)
    before, after = torch.load(weights), names['model'].state_dict()
    assert torch.equal(before['bn1.running_mean'], after['bn1.running_mean'])
    # By weight decay, if by nothing else: primed on classes that are so far apart, the loss may be exactly 0.
    assert not torch.equal(before['conv1.0.weight'], after['conv1.0.weight'])
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr('argparse.ArgumentParser._print_message', lambda self, message, file: said.append(message))
        cli.main(['finetune', '--help'])
    assert set(re.findall(r'`(--[a-z-]+)', text)) <= set(re.findall(r'--[a-z-]+', said[0]))


def small_model(create_model, weights):
    def create(name, pretrained=False, **kwargs):
        if not pretrained or name.startswith('local-dir:'):
            return create_model(name, pretrained=pretrained, **kwargs)
        return make_backbone('test_resnet', weights=weights, **kwargs)
    return create
