"""The command `timm-dl2pa embed`: all images, in one file, the same after an interruption."""
import json

import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors import safe_open

import timm_dl2pa
from tests.helpers.image_folders import colour_model, make_colours
from timm_dl2pa import cli
from timm_dl2pa.embed import command, read_embeddings, table
from timm_dl2pa.embed.images import list_images
from timm_dl2pa.embed.model import embed_batches
from timm_dl2pa.head import heads_of

pytestmark = pytest.mark.timm

SMALL = ['--batch-size', '4', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return colour_model(tmp_path_factory.mktemp('model') / 'colours')


@pytest.fixture
def images(tmp_path):
    """Six images in folders, one in the root; a hidden one and a text, which are none."""
    root = make_colours(tmp_path / 'images', parts=('set',), count=2)
    (root / 'set' / 'red' / '0.png').rename(root / 'lone.png')
    (root / '.hidden').mkdir()
    for name in ('.hidden/a.png', 'set/.b.png'):
        (root / name).write_bytes((root / 'lone.png').read_bytes())
    (root / 'notes.txt').write_text('no image')
    return root


def embed(model, images, out, *arguments):
    assert cli.main(['embed', str(model), str(images), '--out', str(out), *SMALL, *arguments]) == 0
    return read_embeddings(out)


def test_all_images_with_names_and_labels(model, images, tmp_path, capsys):
    found = embed(model, images, tmp_path / 'new' / 'e.safetensors')
    assert found.names == ['lone.png', 'set/blue/0.png', 'set/blue/1.png', 'set/green/0.png', 'set/green/1.png',
                           'set/red/1.png']
    assert found.label_names == ['set/blue', 'set/green', 'set/red'] and found.labels.tolist() == [-1, 0, 0, 1, 1, 2]
    loaded = timm_dl2pa.load_model(model)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=loaded))
    for name, row in zip(found.names, found.embeddings):
        with Image.open(images / name) as image, torch.no_grad():
            features = loaded.forward_head(loaded.forward_features(transform(image)[None]), pre_logits=True)
            assert torch.allclose(loaded.get_classifier().embed(features)[0], row, atol=1e-5)
    assert found.about['dim'] == 4 and found.about['preparation']['input_size'] == [3, 32, 32]
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['e.safetensors']
    assert 'read_embeddings' in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(found.about)


@pytest.mark.parametrize('batches', [0, 1])
def test_an_interrupted_run_goes_on_and_gives_the_same_file(model, images, tmp_path, monkeypatch, capsys, batches):
    embed(model, images, tmp_path / 'whole.safetensors')
    out, real = tmp_path / 'e.safetensors', command.embed_batches

    def interrupted(*given):
        for number, batch in enumerate(real(*given)):
            if number == batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(command, 'embed_batches', interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(['embed', str(model), str(images), '--out', str(out), *SMALL])
    assert stopped.value.code == 130 and not out.exists() and (tmp_path / 'e.safetensors.part').is_dir()
    # A batch that was being written when the machine went down is made again.
    with (tmp_path / 'e.safetensors.part' / 'embeddings.f32').open('ab') as file:
        file.write(b'12345')
    seen = []

    def counted(*given):
        for batch in real(*given):
            seen.append(len(batch[0]))
            yield batch

    monkeypatch.setattr(command, 'embed_batches', counted)
    capsys.readouterr()
    embed(model, images, out)
    assert seen == ([2] if batches else [4, 2])
    assert ('4 of 6 images are done' in capsys.readouterr().out) == bool(batches)
    assert out.read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()
    assert not (tmp_path / 'e.safetensors.part').exists()


def test_an_image_that_cannot_be_read_costs_only_its_batch(model, images, tmp_path, capsys):
    (images / 'set' / 'red' / '1.png').write_bytes(b'no image')
    with pytest.raises(SystemExit):
        embed(model, images, tmp_path / 'e.safetensors')
    said = capsys.readouterr().err
    assert 'set/red/1.png cannot be read as an image' in said and 'goes on after the 4 images' in said
    (images / 'set' / 'red' / '1.png').unlink()
    assert len(embed(model, images, tmp_path / 'e.safetensors').names) == 5
    assert '4 of 5 images are done' in capsys.readouterr().out


@pytest.mark.parametrize('change, message', [
    (lambda images: ['--batch-size', '3'], 'batch_size differs'),
    (lambda images: ['--image-size', '48'], 'preparation differs'),
    (lambda images: (images / 'lone.png').unlink() or [], r'image 1 was \["lone.png", '),
])
def test_the_part_of_another_run_is_refused(model, images, tmp_path, capsys, change, message):
    out = tmp_path / 'e.safetensors'
    damaged = images / 'set' / 'red' / '1.png'
    whole = damaged.read_bytes()
    damaged.write_bytes(b'no image')
    with pytest.raises(SystemExit):
        embed(model, images, out)
    damaged.write_bytes(whole)
    arguments = change(images)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        embed(model, images, out, *arguments)
    said = capsys.readouterr().err
    assert message.replace('\\', '') in said and '--restart' in said
    embed(model, images, out, *arguments, '--restart')
    assert '0 of' not in capsys.readouterr().out


def test_a_failed_write_leaves_the_older_file_and_what_is_done(model, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'e.safetensors'
    out.write_bytes(b'old')

    def fails(*given):
        raise OSError('No space left on device')

    monkeypatch.setattr(table, 'write_tensors', fails)
    with pytest.raises(SystemExit):
        embed(model, images, out)
    assert 'No space left' in capsys.readouterr().err and out.read_bytes() == b'old'
    monkeypatch.undo()
    embed(model, images, out)
    assert '6 of 6 images are done' in capsys.readouterr().out


def test_parquet_needs_pyarrow(model, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
    with pytest.raises(SystemExit):
        cli.main(['embed', str(model), str(images), '--out', str(tmp_path / 'e.parquet')])
    assert 'needs pyarrow: pip install pyarrow' in capsys.readouterr().err
    assert not list(tmp_path.glob('e.*'))


def test_parquet(model, images, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed')
    assert cli.main(['embed', str(model), str(images), '--out', str(tmp_path / 'e.parquet'), *SMALL]) == 0
    found = embed(model, images, tmp_path / 'e.safetensors')
    columns = parquet.read_table(tmp_path / 'e.parquet').to_pydict()
    assert columns['name'] == found.names and columns['label'][:2] == [None, 'set/blue']
    assert torch.equal(torch.tensor(columns['embedding']), found.embeddings)


@pytest.mark.parametrize('arguments, message', [
    (['--out', 'e.csv'], '--out must end in .safetensors or .parquet'),
    (['--out', 'folder.safetensors'], 'is a folder'),
    (['--out', 'e.safetensors', '--batch-size', '0'], '--batch-size must be at least 1'),
    (['--out', 'e.safetensors'], 'has no images in it'),
])
def test_what_is_refused(model, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'folder.safetensors').mkdir()
    with pytest.raises(SystemExit):
        cli.main(['embed', str(model), 'empty', *arguments])
    assert message in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_none(tmp_path, model, images):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        read_embeddings(tmp_path / 'e.safetensors')
    embed(model, images, tmp_path / 'e.safetensors')
    with safe_open(tmp_path / 'e.safetensors', 'pt') as file:
        tensors = {name: file.get_tensor(name) for name in ('embeddings', 'labels', 'names', 'label_names')}
    for change in ({'labels': tensors['labels'][:3]}, {'labels': tensors['labels'] + 9},
                   {'names': tensors['names'][1:]}, {'names': tensors['label_names'].clone()},
                   {'embeddings': tensors['embeddings'].double()}):
        table.write_tensors(tmp_path / 'bad.safetensors', {**tensors, **change}, {})
        with pytest.raises(ValueError, match='is not an intact file'):
            read_embeddings(tmp_path / 'bad.safetensors')


def test_names_of_other_encodings(tmp_path, images):
    name = b'set/\xff\xe9.png'
    with open(bytes(images) + b'/' + name, 'wb') as file:
        file.write((images / 'lone.png').read_bytes())
    found = list_images(images)
    assert len(found.names) == 7 and all(entry.isascii() for entry in found.entries())
    content = table.Embeddings(torch.zeros(7, 2), torch.tensor(found.labels), found.names, found.label_names, {})
    table.write_embeddings(tmp_path / 'e.safetensors', content)
    assert read_embeddings(tmp_path / 'e.safetensors').names == found.names


def test_links_are_followed_but_not_in_a_circle(images, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'a.png').write_bytes((images / 'lone.png').read_bytes())
    (images / 'linked').symlink_to(tmp_path / 'elsewhere')
    (images / 'set' / 'back').symlink_to(images)
    assert list_images(images).names[:2] == ['linked/a.png', 'lone.png'] and len(list_images(images).names) == 7


class OnMaps(torch.nn.Module):
    """A classifier on maps, whose logits are averaged over the places."""

    def __init__(self):
        super().__init__()
        self.head = timm_dl2pa.DL2PAHead(4, 5, 3)
        self.head.channels_first = True

    def forward(self, x):
        return self.head(x).mean(dim=(2, 3))


class OnTokens(OnMaps):
    """A classifier of tokens, in the same way."""

    def __init__(self):
        super().__init__()
        self.head.channels_first = False

    def forward(self, x):
        return self.head(x.flatten(2).transpose(1, 2)).mean(dim=1)


@pytest.mark.parametrize('make', [OnMaps, OnTokens])
def test_one_embedding_an_image_that_ranks_as_the_averaged_logits(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model, images = make().eval(), torch.randn(20, 4, 6, 6)
    (rows, _), = embed_batches(model, [(images, torch.zeros(20))], torch.device('cpu'))
    assert rows.shape == (20, 3) and torch.allclose(rows.norm(dim=1), torch.ones(20), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.head.nearest(rows)[1].squeeze(1), model(images).argmax(1))


def test_embeddings_that_are_not_finite_are_an_error():
    with torch.random.fork_rng(devices=[]):
        model = OnMaps().eval()
    images = torch.randn(3, 4, 2, 2)
    images[1] = torch.nan
    with pytest.raises(ValueError, match='1 of 3 embeddings of a batch are not finite'):
        list(embed_batches(model, [(images, torch.zeros(3))], torch.device('cpu')))


def test_of_several_heads_the_main_one_embeds():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5, img_size=32)
        timm_dl2pa.wrap_dl2pa(model, dim=3).eval()
        images = torch.randn(2, 3, 32, 32)
    (rows, _), = embed_batches(model, [(images, torch.zeros(2))], torch.device('cpu'))
    with torch.no_grad():
        features = model.forward_features(images)[:, 0]
        assert torch.allclose(rows, heads_of(model)[0].embed(features), atol=1e-5)
