"""Options with random values: an error names the option, and what is accepted makes a model and a task."""
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from timm.task import ClassificationTask

from tests.fuzz.harness import search
from tests.helpers.stand_in import make_model
from timm_dl2pa.cli import main
from timm_dl2pa.options import PREFIX, PluginOptions
from timm_dl2pa.timm_scripts import plugged_in
from timm_dl2pa.timm_scripts.creation import check_times

pytestmark = [pytest.mark.timm, pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

OPTIONS = {PREFIX + spec.name: spec for spec in fields(PluginOptions)}

TEXTS = ['', 'none', 'None', 'auto', 'epoch', 'half', 'inf', 'nan', '1e3', '3', ' 3 ', '5 epochs', '0 epochs', '30 %',
         '130%', '100:1000,1000', '9' * 99, '9' * 5000, '9' * 60 + ' epochs', '1:2,' * 24 + '1', 'linear', 'placed',
         'rotated', 'paper', 'even', 'balanced_softmax', 'squared_cosine', 'dot_regression', 'criterion',
         'sampled_cross_entropy', 'a b', 'ä', '\udc80', '\0', '/', 'nowhere.safetensors',
         '[[[', '{[]: 1}', "'", '(' * 300, '-1', '0x10', '1_000', 'True']


def values():
    nested = [1]
    for _ in range(30):
        nested = [nested, nested]
    return [*TEXTS, None, True, False, 0, 1, 2, 3, 5, 16, -1, 2 ** 31, 2 ** 63, 10 ** 5000, 0.0, 0.5, 1.0, 3.0, -2.5,
            1e-9, 1e9, 1e308, math.nan, math.inf, -math.inf, 3j, b'3', [], [3], {}, nested, object(), np.int64(3),
            np.float32(0.5), np.float64('nan'), np.str_('half'), np.array([3, 4]), torch.tensor(3),
            torch.tensor([3, 4]), torch.tensor(math.nan), int, range]


def test_an_error_names_the_option():
    pool = values()

    def try_one(rng):
        name = rng.choice(list(OPTIONS))
        try:
            check_times(PluginOptions.take({name: rng.choice(pool)}))
        except ValueError as error:
            assert name in str(error) and len(str(error)) < 1000

    assert search(try_one) > 3


def test_what_is_accepted_makes_a_model_and_a_task():
    """Or it is refused by a ValueError; prototypes whose file cannot be opened, by an OSError."""
    pool = values()

    def try_one(rng):
        names = rng.sample(list(OPTIONS), rng.choice([1, 2, 3]))
        given = {name: rng.choice([value for value in pool if type(value) in OPTIONS[name].metadata['kinds']]
                                  if rng.random() < 0.9 else pool) for name in names}
        for name in given.keys() & {'dl2pa_dim', 'dl2pa_num_prototypes'}:
            if isinstance(given[name], int) and 100 < given[name] < 2 ** 63:
                given[name] = 20  # no memory holds so many
        try:
            model = make_model(**{'dl2pa_dim': 3, **given})
            if rng.random() < 0.5:
                ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss(), verbose=True)
        except OSError:
            assert 'dl2pa_prototypes' in given
        except ValueError as error:
            assert len(str(error)) < 1000

    with plugged_in():
        assert search(try_one) > 3


SCRIPT = '''
# It makes its model by create_model with its --model-kwargs.
import argparse
from timm.utils import ParseKwargs
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='*')
parser.add_argument('-c', '--config')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
for name, value in parser.parse_args().model_kwargs.items():
    print(name, repr(value)[:100])
'''
CONFIGS = ['', '[]', 'model_kwargs:', 'model_kwargs: [a]', 'model_kwargs: {a: 1}', '{', '\0', 'a: &a [*a]', '3', '- 1',
           'model_kwargs: {dl2pa_dim: .nan, ? [1] : 2}', 'model_kwargs: {a: 2020-01-01}', '!!python/name:os.system x']


def test_command_lines(tmp_path, capsys):
    """The script runs, or one line says why not."""
    script, config = tmp_path / 'script.py', tmp_path / 'config.yaml'
    script.write_text(SCRIPT)
    flags = ['--' + name.replace('_', '-') for name in OPTIONS]
    texts = [text for text in TEXTS if text.isprintable()]  # pytest's stderr, unlike Python's, refuses some others

    def try_one(rng):
        config.write_text(rng.choice(CONFIGS))
        words = []
        for _ in range(rng.randrange(6)):
            flag, text = rng.choice(flags), rng.choice(texts)
            words += rng.choice([[flag, text], [f'{flag}={text}'], [flag], [text], ['--model-kwargs', f'a={text}'],
                                 ['--model-kwargs', text], ['--config', str(config)], ['-c', str(config)], ['--'],
                                 [f'--model-kwargs=a={text}']])
        words.insert(rng.choice([0, 0, 0, rng.randrange(len(words) + 1)]), str(script))
        try:
            main(['run', *words])
        except SystemExit as stopped:
            assert stopped.code in (0, 2, None)
        except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError) as error:
            # timm's own reading of --model-kwargs, in the script (before 1.0.31 with a SyntaxError).
            frames, trace = [], error.__traceback__
            while trace is not None:
                frames.append(trace.tb_frame.f_code.co_filename)
                trace = trace.tb_next
            assert str(script) in frames, words
        assert 'Traceback' not in capsys.readouterr().err

    assert search(try_one) > 3
