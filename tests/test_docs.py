"""README and docs/: their Python runs, their links lead somewhere, and what they name exists.

The site itself is built by CI, strictly.
"""
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import timm_dl2pa

ROOT = Path(__file__).parent.parent
PAGES = ['README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').glob('**/*.md'))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
# What a page says, and what is small enough to run: 100 classes in 128 dimensions `prime` would turn and match for half
# a minute.
SMALLER = {'num_classes=100': 'num_classes=10', 'range(100)': 'range(10)', 'dim=128': 'dim=8', 'dim=64': 'dim=8'}


# What a block may need that is in an extra.
OPTIONAL = ('faiss', 'usearch')


def python_of(page: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', TEXTS[page], re.DOTALL)


# The page on fine-tuning has images and weights of its own, in test_finetune.py.
WITH_PYTHON = [page for page in PAGES if python_of(page) and page != 'docs/fine-tune.md']


@pytest.mark.timm
@pytest.mark.filterwarnings('ignore:.*HTTP upload', 'ignore:.*during the warm-up')
@pytest.mark.parametrize('page', WITH_PYTHON)
def test_python_runs(page, monkeypatch, tmp_path, hub):
    """Each block of a page, in order, in one namespace; weights and data are made at random, the Hub is the tests'."""
    import timm
    import torch

    from timm_dl2pa.embed.table import Embeddings, write_embeddings
    monkeypatch.chdir(tmp_path)  # some blocks save a model
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    create_model = timm.create_model

    def small(name, pretrained=False, **kwargs):
        if name.startswith(('hf-hub:', 'local-dir:')):
            return create_model(name, pretrained=pretrained, **kwargs)
        return create_model(name if name == 'dl2pa' else 'test_resnet', **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    names = {'loader': [(images, labels)] * 3, 'images': images, 'labels': labels}
    write_embeddings(Path('embeddings.safetensors'), Embeddings(
        torch.nn.functional.normalize(torch.randn(30, 8)), torch.arange(3).repeat(10), [f'{n}.png' for n in range(30)],
        ['a', 'b', 'c'], {}))  # as `timm-dl2pa embed` would have done
    for block in python_of(page):
        if any(re.search(rf'^(import|from) {name}\b', block, re.MULTILINE) and find_spec(name) is None
               for name in OPTIONAL):
            continue
        for written, smaller in SMALLER.items():
            block = block.replace(written, smaller)
        exec(compile(block, page, 'exec'), names)
    if page in ('README.md', 'docs/quickstart.md'):
        assert names['scheduler'].steps == 30 and not names['scheduler'].warming_up
        assert names['model'].get_classifier().config.num_classes == 10
    pushed = {'README.md': ['me/resnet50-dl2pa'],
              'docs/hub.md': ['me/cifar100-dl2pa-128', 'me/resnet50-dl2pa', 'me/resnet50-plain']}
    assert sorted(hub.repositories) == pushed.get(page, [])


def test_each_page_begins_with_what_the_reader_may_copy():
    """A first snippet has the recommended arguments: the length of the training is known to the scheduler."""
    for page in ('README.md', 'docs/quickstart.md'):
        assert 'total=epochs * len(loader)' in python_of(page)[0]


def test_readme_is_short():
    assert len(TEXTS['README.md'].splitlines()) <= 150


def heading_ids(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    return {re.sub(r'[\s]+', '-', re.sub(r'[^\w\s-]', '', heading.lower()).strip())
            for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}


@pytest.mark.parametrize('page', PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXTS[page]):
        if target.startswith('https://'):
            continue
        path, _, anchor = target.partition('#')
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f'{page} links to {target}'
        assert not anchor or anchor in heading_ids(file.read_text()), f'{page} links to {target}'


@pytest.mark.parametrize('page', PAGES)
def test_options_and_commands_exist(page):
    from timm_dl2pa.options import PREFIX, PluginOptions
    known = {PREFIX + spec.name for spec in fields(PluginOptions)} | {'dl2pa_backbone'}
    text = TEXTS[page]
    named = re.findall(r'\b(dl2pa_\w+)=', text) + re.findall(r'`(dl2pa_\w+)`', text)
    named += [flag.replace('-', '_') for flag in re.findall(r'--(dl2pa-[a-z-]+)', text)]
    assert set(named) <= known
    commands = set(re.findall(r'timm-dl2pa ([a-z]+)', text))
    assert commands <= {'demo', 'embed', 'evaluate', 'finetune', 'run', 'inspect', 'prototypes', 'fold', 'push'}


def test_options_page_has_every_option():
    from timm_dl2pa.options import PREFIX, PluginOptions
    assert all(f'`{PREFIX}{spec.name}`' in TEXTS['docs/options.md'] for spec in fields(PluginOptions))


def test_reference_has_every_public_name():
    reference = '\n'.join(text for page, text in TEXTS.items() if page.startswith('docs/api/'))
    named = set(re.findall(r'^::: timm_dl2pa\.(\w+)$', reference, re.MULTILINE))
    assert named == set(timm_dl2pa.__all__)


def test_site_has_every_page():
    nav = (ROOT / 'mkdocs.yml').read_text()
    assert all(f': {page.removeprefix("docs/")}\n' in nav for page in PAGES if page.startswith('docs/'))
