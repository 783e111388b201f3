"""The suite's trainings: every method runs, is measured, and is not run again; its table."""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
suite = pytest.importorskip('suite', reason='scikit-learn or matplotlib is not installed')


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 16, generator=generator)
    labels = torch.arange(12).repeat(16)
    x = centres[labels] + 0.3 * torch.randn(192, 16, generator=generator)
    return suite.Samples(x[:128], labels[:128], x[128:], labels[128:])


@pytest.mark.parametrize('method', [*suite.METHODS, 'cosine_plain', 'static_plain', 'placed_plain'])
def test_each_method_learns_and_is_measured(samples, monkeypatch, method):
    monkeypatch.setattr(suite, '_STEPS', 150)
    setting = suite.Setting('features', method, None if method == 'linear' else 8, 'sgd', 0)
    found = suite.run(setting, samples)
    assert found['top1'] > 50 and 0 <= found['calibration_error'] <= 100 and found['recall_at_1'] > 50
    assert ('moved' in found) == (method.split('_')[0] not in suite.LEARNED)
    assert found == {**suite.run(setting, samples), 'cpu_seconds': found['cpu_seconds']}


def test_what_is_there_is_not_run_again(samples, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, '_STEPS', 4)
    monkeypatch.setattr(suite, 'load_samples', lambda name, **files: samples)
    arguments = ['suite.py', '--data', 'features', '--methods', 'linear', 'cosine', 'placed', '--dims', 'half',
                 '--output', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', arguments)
    suite.main()
    first = json.loads((tmp_path / 'suite.json').read_text())['results']
    assert [(row['method'], row['dim']) for row in first] == [('linear', None), ('cosine', 6), ('placed', 6)]
    monkeypatch.setattr(sys, 'argv', [*arguments, '--seeds', '0', '1'])
    capsys.readouterr()
    suite.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all('seed 1' in line for line in printed)
    monkeypatch.setattr(sys, 'argv', ['suite.py', '--table', '--output', str(tmp_path)])
    suite.main()
    assert '| features | 6 | sgd |' in capsys.readouterr().out


def test_data_that_need_files_say_so():
    with pytest.raises(ValueError, match='grocery needs'):
        suite.load_samples('grocery', arrays=None, grocery=None, weights=None)


def test_its_table_for_the_page():
    readme_tables = runpy.run_path(str(BENCHMARKS / 'readme_tables.py'))
    rows = [dict(data='digits', training='sgd', dim=None if method == 'linear' else 5, method=method, top1=top1)
            for method, top1 in (('linear', 90.0), ('linear_bn', 80.0), ('cosine', 82.0), ('placed', 81.0))]
    text = readme_tables['suite']({'results': rows})
    assert '| digits | 5 | SGD | 90.0 | 80.0 | 82.0 | 81.0 | - | - | - | - |' in text
    assert '-1.0 points in the mean over 1 rows' in text and 'behind in 1.' in text
