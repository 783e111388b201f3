"""What the package exports is documented: a sentence that says what it does, and an example that runs."""
import doctest
import inspect
import re

import pytest
import timm
import torch

import timm_dl2pa

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore:.*HTTP upload')]

# Still to be written. A name that has an example does not belong here.
WITHOUT_EXAMPLE: set[str] = set()


class OutputChecker(doctest.OutputChecker):
    """An example that shows an output must have it. One that shows none, as `model.eval()`, is only run."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def docstring(name: str) -> str:
    return inspect.cleandoc(getattr(timm_dl2pa, name).__doc__ or '')


def has_example(text: str) -> bool:
    return re.search(r'^Examples?:\n +>>> ', text, re.MULTILINE) is not None


def run_examples(thing, name: str, namespace: dict) -> str:
    """Run the examples of a function, or of a class and its methods; return what doctest says of those that fail."""
    said: list[str] = []
    runner = doctest.DocTestRunner(OutputChecker(), verbose=False,
                                   optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(thing, name, module=False, globs=namespace):
        runner.run(test, out=said.append)
    assert runner.tries, f'{name} has no example'
    return ''.join(said)


@pytest.fixture
def namespace(monkeypatch, tmp_path, hub):
    """What an example finds: small things at random, in a folder of its own; the Hub is the tests'.

    Any model of timm's that an example makes is a `test_resnet` at random.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    create_model = timm.create_model

    def small(name, pretrained=False, **kwargs):
        if name.startswith(('hf-hub:', 'local-dir:')):
            return create_model(name, pretrained=pretrained, **kwargs)
        return create_model(name if name == 'dl2pa' or name.startswith('test_') else 'test_resnet', **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # In few dimensions: a set in 128 keeps `prime` busy for half a minute.
        points = torch.nn.functional.normalize(torch.randn(100, 8))
        model = timm_dl2pa.wrap_dl2pa(small('test_resnet', num_classes=100), dim=8, prototypes=points)
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 100, (8,))
        head = model.get_classifier()
        yield {
            **{name: getattr(timm_dl2pa, name) for name in timm_dl2pa.__all__},
            'torch': torch,
            'timm': timm,
            'timm_dl2pa': timm_dl2pa,
            'model': model,
            'head': head,
            'images': images,
            'labels': labels,
            'loader': [(images, labels)] * 3,
            'features': torch.randn(8, head.in_features),
            'embeddings': torch.nn.functional.normalize(torch.randn(8, head.dim)),
            'label_names': [f'class {index}' for index in range(100)],
            'labels_of_training': torch.arange(100).repeat(3),
            'class_counts': torch.arange(1, 101),
            'criterion': torch.nn.CrossEntropyLoss(),
            'optimizer': torch.optim.SGD(model.parameters(), lr=0.01),
        }


@pytest.mark.parametrize('name', timm_dl2pa.__all__)
def test_it_begins_with_a_sentence(name):
    first = docstring(name).split('\n\n')[0]
    # A dataclass without a docstring gets its signature.
    assert re.fullmatch(r'(?!\w+\()[A-Z`].* .*\.', first, re.DOTALL), first


@pytest.mark.parametrize('name', [name for name in timm_dl2pa.__all__ if name not in WITHOUT_EXAMPLE])
def test_it_has_an_example_that_runs(name, namespace):
    assert has_example(docstring(name))
    failures = run_examples(getattr(timm_dl2pa, name), name, namespace)
    assert not failures, failures


def test_those_without_an_example_have_none():
    assert not {name for name in WITHOUT_EXAMPLE if name not in timm_dl2pa.__all__ or has_example(docstring(name))}


# --- the test of the test


def documented(example: str):
    class Thing:
        def method(self):
            pass

    Thing.method.__doc__ = f'Do a thing.\n\n    Example:\n        {example}\n    '
    return Thing


@pytest.mark.parametrize('example, failure', [
    ('>>> images + 1', ''),
    ('>>> images + 1\n        3', ''),
    ('>>> images + 1\n        4', 'Expected:\n    4\nGot:\n    3'),
    ('>>> pictures', "NameError: name 'pictures' is not defined"),
])
def test_an_example_that_fails_is_seen(example, failure):
    failures = run_examples(documented(example), 'Thing', {'images': 2})
    assert failure in failures and bool(failure) == bool(failures)


@pytest.mark.parametrize('text, has', [
    ('Do.\n\nExample:\n    >>> do()', True), ('Do.\n\nExamples:\n    >>> do()', True),
    ('Do.\n\nExample:\n    do()', False), ('Do, for example:\n    >>> do()', False),
])
def test_examples_are_found(text, has):
    assert has_example(text) == has
