"""README and docs/: their Python runs, their links lead somewhere, and what they name exists.

The site itself is built by CI, strictly.
"""
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import timm_dl2pa
from tests.helpers.pages import PAGES, ROOT, TEXTS, WITH_PYTHON, blocks_of, python_of

# What a page says, and what is small enough to run: 100 classes in 128 dimensions `prime` would turn and match for half
# a minute.
SMALLER = {'num_classes=100': 'num_classes=10', 'range(100)': 'range(10)', 'dim=128': 'dim=8', 'dim=64': 'dim=8'}


# The page on fine-tuning has images and weights of its own, in test_finetune.py; that on training loops, a library for
# each of its sections.
RUN_ALONE = [page for page in WITH_PYTHON if page not in ('docs/fine-tune.md', 'docs/frameworks.md')]
LIBRARIES = {'Lightning': ['lightning'], 'transformers': ['transformers', 'accelerate'], 'Accelerate': ['accelerate'],
             'TensorBoard': ['tensorboard'], 'Weights & Biases': ['wandb']}
# What a block may need that is in an extra.
OPTIONAL = ('faiss', 'usearch')


@pytest.fixture
def run_blocks(monkeypatch, tmp_path):
    """Runs blocks in order, in one namespace, which it returns; weights and data are made at random.

    `loader` is a list of batches, unless `make_loader` makes another kind of loader of it.
    """
    import timm
    monkeypatch.chdir(tmp_path)  # some blocks save a model
    create_model = timm.create_model

    def small(name, pretrained=False, **kwargs):
        if name.startswith(('hf-hub:', 'local-dir:')):
            return create_model(name, pretrained=pretrained, **kwargs)
        return create_model(name if name == 'dl2pa' else 'test_resnet', **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))

    def run(blocks, page, make_loader=list):
        names = {'loader': make_loader([(images, labels)] * 3), 'images': images, 'labels': labels, '__name__': page}
        for block in blocks:
            if any(re.search(rf'^(import|from) {name}\b', block, re.MULTILINE) and find_spec(name) is None
                   for name in OPTIONAL):
                continue
            for written, smaller in SMALLER.items():
                block = block.replace(written, smaller)
            exec(compile(block, page, 'exec'), names)
        return names

    return run


@pytest.mark.timm
@pytest.mark.filterwarnings('ignore:.*HTTP upload', 'ignore:.*during the warm-up')
@pytest.mark.parametrize('page', RUN_ALONE)
def test_python_runs(page, monkeypatch, run_blocks, hub):
    """The Hub is the tests'."""
    from timm_dl2pa.embed.table import Embeddings, write_embeddings
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    write_embeddings(Path('embeddings.safetensors'), Embeddings(
        torch.nn.functional.normalize(torch.randn(30, 8)), torch.arange(3).repeat(10), [f'{n}.png' for n in range(30)],
        ['a', 'b', 'c'], {}))  # as `timm-dl2pa embed` would have done
    names = run_blocks(python_of(page), page)
    if page in ('README.md', 'docs/quickstart.md'):
        assert names['scheduler'].steps == 30 and not names['scheduler'].warming_up
        assert names['model'].get_classifier().config.num_classes == 10
    pushed = {'README.md': ['me/resnet50-dl2pa'],
              'docs/hub.md': ['me/cifar100-dl2pa-128', 'me/resnet50-dl2pa', 'me/resnet50-plain']}
    assert sorted(hub.repositories) == pushed.get(page, [])


@pytest.mark.filterwarnings('ignore')  # the libraries' own
@pytest.mark.parametrize('section', LIBRARIES)
def test_training_loops_run(section, monkeypatch, run_blocks):
    for library in LIBRARIES[section]:
        pytest.importorskip(library, reason=f'the section {section} needs {library}')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    from torch.utils.data import DataLoader
    text = TEXTS['docs/frameworks.md'].partition(f'\n## {section}\n')[2].partition('\n## ')[0]
    names = run_blocks(blocks_of(text), f'docs/frameworks.md, {section}', lambda batches: DataLoader(batches, None))
    scheduler = names.get('scheduler') or names['callback'].scheduler
    assert scheduler.steps >= 4 and scheduler.history


def test_every_training_loop_is_run():
    assert len(python_of('docs/frameworks.md')) == sum(
        len(blocks_of(section)) for section in re.split(r'\n## ', TEXTS['docs/frameworks.md'])
        if section.splitlines()[0] in LIBRARIES)


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
