"""The command `timm-dl2pa evaluate`, on coloured patterns and a tiny model."""
import html.parser
import json

import pytest
import timm.data
import torch

import timm_dl2pa
from tests.helpers.image_folders import COLOURS, colour_model, make_colours
from timm_dl2pa import cli
from timm_dl2pa.evaluate import command
from timm_dl2pa.evaluate.data import class_places, open_images
from timm_dl2pa.evaluate.measure import measure
from timm_dl2pa.evaluation import calibration_error, retrieval_metrics

pytestmark = pytest.mark.timm

NAMES = sorted(COLOURS)
SMALL = ['--batch-size', '7', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return colour_model(tmp_path_factory.mktemp('model') / 'colours', NAMES)


def evaluate(model, data, output, *arguments):
    assert cli.main(['evaluate', str(model), str(data), *SMALL, '--output', str(output), *map(str, arguments)]) == 0
    return json.loads((output / 'metrics.json').read_text())


def outputs(model, data, split='val'):
    """The model's logits and embeddings of the images, one at a time, by timm alone."""
    loaded = timm_dl2pa.load_model(model)
    dataset = timm.data.create_dataset('', root=str(data), split=split)
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=loaded))
    images, labels = zip(*dataset)
    with torch.no_grad():
        features = loaded.forward_head(loaded.forward_features(torch.stack(images)), pre_logits=True)
        return loaded(torch.stack(images)), loaded.get_classifier().embed(features), torch.tensor(labels)


def test_the_numbers_are_those_of_the_models_logits(model, data, tmp_path, capsys):
    metrics = evaluate(model, data, tmp_path)
    logits, embeddings, labels = outputs(model, data)
    predicted = logits.argmax(1)
    assert metrics['top1'] == pytest.approx(100 * (predicted == labels).double().mean().item(), abs=0.01)
    assert metrics['top1'] > 40 and metrics['top5'] is None and metrics['images'] == 30
    assert metrics['classes'] == {
        name: {'right': int(((predicted == index) & (labels == index)).sum()), 'images': 10}
        for index, name in enumerate(NAMES)}
    found = retrieval_metrics(embeddings, labels)
    assert metrics['retrieval']['recall_at_1'] == pytest.approx(100 * found.recall[1], abs=0.01)
    assert metrics['retrieval']['map_at_r'] == pytest.approx(100 * found.map_at_r, abs=0.01)
    assert metrics['retrieval']['queries'] == 30
    wrong = sum(row['images'] for row in metrics['confusions'])
    assert wrong == (predicted != labels).sum() and metrics['near_prototypes'] is None  # all of two others are near
    said = capsys.readouterr().out
    assert f'top-1 {metrics["top1"]:.2f} %' in ' '.join(said.split())
    assert 'The temperature was fitted on 15 of the images' in said and 'mAP@R' in said


def test_calibration_is_measured_on_the_other_half(model, data, tmp_path):
    metrics = evaluate(model, data, tmp_path)['calibration']
    logits, _, labels = outputs(model, data)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    fitted, other = order[:15], order[15:]
    assert (metrics['fitted_on'], metrics['measured_on']) == (15, 15)
    grid = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    losses = [torch.nn.functional.cross_entropy(logits[fitted].double() / t, labels[fitted]).item() for t in grid]
    assert metrics['temperature'] == pytest.approx(grid[losses.index(min(losses))].item(), rel=0.02)
    for name, temperature in (('before', 1.0), ('after', metrics['temperature'])):
        confidence, predicted = (logits[other] / temperature).softmax(1).max(1)
        assert metrics[f'error_{name}'] == \
            pytest.approx(100 * calibration_error(confidence, predicted == labels[other]), abs=0.1)


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.headings, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ('src', 'href')]

    def handle_data(self, data):
        self.text += data


def test_the_report_has_the_confused_images_in_it(data, tmp_path):
    names = ['<b>blue</b>', 'green', 'red']
    images = tmp_path / 'images'
    for own, name in zip(NAMES, names):
        (images / name.replace('/', '_')).mkdir(parents=True)
        for file in (data / 'val' / own).iterdir():
            (images / name.replace('/', '_') / file.name).write_bytes(file.read_bytes())
    names[0] = names[0].replace('/', '_')
    model = colour_model(tmp_path / 'model', names)
    # A class that is not recognised: green is called red.
    loaded = timm_dl2pa.load_model(model)
    head = loaded.get_classifier()
    head.assign(head.assignment[[0, 2, 1]])
    timm_dl2pa.save_model(loaded, model)
    metrics = evaluate(model, images, tmp_path / 'out', '--queries', 10)
    assert metrics['confusions'] and metrics['retrieval']['queries'] == 10
    text = (tmp_path / 'out' / 'report.html').read_text()
    page = Page(text)
    assert page.sources and all(source.startswith('data:image/jpeg;base64,') for source in page.sources)
    assert names[0] in page.text and '<b>blue' not in text and 'taken for' in page.text
    assert str(tmp_path) not in text and str(tmp_path) not in (tmp_path / 'out' / 'metrics.json').read_text()


def test_classes_go_by_their_names(data, tmp_path):
    model = colour_model(tmp_path / 'model', ['green', 'red', 'blue'])  # not in the order of the folders
    renamed = evaluate(model, data, tmp_path / 'out')
    plain = evaluate(colour_model(tmp_path / 'plain', NAMES), data, tmp_path / 'out')
    assert renamed['classes'].keys() == plain['classes'].keys() and renamed['top1'] != plain['top1'] == \
        pytest.approx(100 * sum(row['right'] for row in plain['classes'].values()) / 30, abs=0.01)
    logits, _, labels = outputs(tmp_path / 'model', data)
    index = torch.tensor([['green', 'red', 'blue'].index(name) for name in NAMES])[labels]
    assert renamed['top1'] == pytest.approx(100 * (logits.argmax(1) == index).double().mean().item(), abs=0.01)


def test_other_names_go_by_their_order_and_the_output_says_so(data, tmp_path, capsys):
    metrics = evaluate(colour_model(tmp_path / 'model', ['x', 'y', 'z']), data, tmp_path / 'out')
    note, = metrics['notes']
    assert 'other names for the classes than the model (blue, not x)' in note and note in capsys.readouterr().out
    assert note in (tmp_path / 'out' / 'report.html').read_text() and list(metrics['classes']) == ['x', 'y', 'z']


def test_a_part_of_the_classes(model, data, tmp_path):
    (tmp_path / 'some').mkdir()
    for name in ('green', 'red'):
        (tmp_path / 'some' / name).symlink_to(data / 'val' / name)
    metrics = evaluate(model, tmp_path / 'some', tmp_path / 'out')
    whole = evaluate(model, data, tmp_path / 'out')
    assert metrics['images'] == 20 and metrics['classes'] == {**whole['classes'], 'blue': {'right': 0, 'images': 0}}


def test_a_checkpoint_of_timms_script(data, tmp_path):
    folder = colour_model(tmp_path / 'model', NAMES)
    loaded = timm_dl2pa.load_model(folder)
    torch.save({'state_dict': loaded.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    metrics = evaluate(tmp_path / 'last.pth.tar', data, tmp_path / 'out', '--model', 'test_resnet', '--image-size', 32)
    assert metrics['classes'] == evaluate(folder, data, tmp_path / 'out')['classes']


def test_a_model_of_the_hub(model, data, tmp_path, hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    timm_dl2pa.push_model_to_hub(timm_dl2pa.load_model(model), 'me/colours')
    metrics = evaluate('hf-hub:me/colours', data, tmp_path)
    assert metrics['settings']['model'] == 'hf-hub:me/colours' and metrics['images'] == 30


@pytest.mark.parametrize('streamed', [False, True])
def test_any_data_set_of_timms(model, data, tmp_path, monkeypatch, streamed):
    """What create_dataset makes: pairs by number, or a stream whose length is not known."""
    folder = timm.data.create_dataset('', root=str(data), split='val')
    pairs = [folder[index] for index in range(30)]

    class Pairs(torch.utils.data.IterableDataset if streamed else torch.utils.data.Dataset):
        transform = None

        def __getitem__(self, index):
            return self.transform(pairs[index][0]), pairs[index][1]

        def __iter__(self):
            yield from (self[index] for index in range(30))

        if not streamed:
            def __len__(self):
                return 30

    monkeypatch.setattr(timm.data, 'create_dataset', lambda **given: Pairs())
    metrics = evaluate(model, 'hfds/me/colours', tmp_path)
    monkeypatch.undo()
    by_folder = evaluate(model, data, tmp_path / 'folder')
    for name in ('top1', 'classes', 'confusions', 'calibration', 'retrieval'):
        assert metrics[name] == by_folder[name]


def test_torchvisions_data_sets(model, data):
    config = timm.data.resolve_data_config({}, model=timm_dl2pa.load_model(model))
    found = open_images('torch/image_folder', config, split='val', data_dir=str(data))
    assert found.names == NAMES and found.count == 30 and found.dataset[0][0].shape == (3, 32, 32)


def test_hidden_folders_are_no_classes(model, data):
    hidden = data / 'val' / '.ipynb_checkpoints'
    hidden.mkdir()
    (hidden / 'a.png').write_bytes((data / 'val' / 'red' / '0.png').read_bytes())
    try:
        found = open_images(str(data), timm.data.resolve_data_config({}, model=timm_dl2pa.load_model(model)))
        assert found.names == NAMES and found.count == 30 and found.dataset.files[0][1] == 0
    finally:
        (hidden / 'a.png').unlink()
        hidden.rmdir()


# --- what is refused, and what stays

def test_a_failed_run_leaves_older_files(model, data, tmp_path, monkeypatch, capsys):
    evaluate(model, data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*given):
        raise OSError('full')

    monkeypatch.setattr(command, '_page', fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main(['evaluate', str(model), str(data), *SMALL, '--output', str(tmp_path)])
    assert stopped.value.code == 2 and 'timm-dl2pa evaluate: full' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_image_that_cannot_be_read_is_named(model, tmp_path, capsys):
    data = make_colours(tmp_path / 'images', parts=('val',), count=2)
    (data / 'val' / 'red' / '1.png').write_bytes(b'no image')
    with pytest.raises(SystemExit):
        cli.main(['evaluate', str(model), str(data), *SMALL, '--output', str(tmp_path / 'out')])
    assert 'red/1.png cannot be read as an image' in capsys.readouterr().err
    assert not list((tmp_path / 'out').iterdir())


@pytest.mark.parametrize('arguments, message', [
    (['nowhere'], "nowhere: no such folder, and no data set of timm's"),
    (['.', '--queries', '0'], '--queries must be at least 1'), (['.', '--neighbours', '0'], '--neighbours must be'),
    (['.', '--device', 'abacus'], "--device 'abacus' cannot be used here"),
    (['.'], 'Found 0 images'), (['torch/no_such_set', '--data-dir', '.'], 'Unknown torchvision dataset'),
])
def test_what_is_refused(model, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(['evaluate', str(model), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_for_checkpoints_are_refused_elsewhere(model, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(['evaluate', f'local-dir:{model}', str(data), '--use-ema', '--output', str(tmp_path)])
    assert 'are for checkpoints' in capsys.readouterr().err


@pytest.mark.parametrize('names, own, expected', [
    (None, ['a', 'b'], None), (['a', 'b'], None, None), (['b', 'a'], ['a', 'b'], [1, 0]), (['b'], ['a', 'b'], [1]),
    (['x', 'y'], ['a', 'b'], None)])
def test_which_class_a_label_is(names, own, expected):
    assert class_places(names, own, 2) == expected


@pytest.mark.parametrize('names, own, message', [
    (['a', 'c'], ['a', 'b'], "1 classes that the model does not know, such as 'c'"),
    (['a'], None, "whose names it does not hold"), (['x'], ['a', 'b'], 'with other names')])
def test_labels_that_fit_no_class(names, own, message):
    with pytest.raises(ValueError, match=message):
        class_places(names, own, 2)


def test_few_images_and_many_classes():
    """One image, no calibration, nothing to retrieve; of many classes, errors to near prototypes are counted."""
    with torch.random.fork_rng(devices=[]):
        head = timm_dl2pa.DL2PAHead(8, 12, 4, seed=1).eval()
    vectors = head.class_prototypes
    found = measure(head, vectors[:1], torch.tensor([0]), queries=5, voters=3, seed=0)
    assert (found.top1, found.top5, found.calibration, found.retrieval) == (1.0, 1.0, None, None)
    nearest = head.nearest(vectors, 2)[1][:, 1]
    wrong = measure(head, vectors[nearest], torch.arange(12), queries=5, voters=3, seed=0)
    assert wrong.top1 == 0 and (wrong.near.errors, wrong.near.near, wrong.neighbours) == (12, 12, 5)
