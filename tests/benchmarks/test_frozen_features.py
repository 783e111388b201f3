"""The benchmarks on frozen features: every method runs, is measured, and is not run again; their tables."""
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
unknown_classes = pytest.importorskip('unknown_classes', reason='scikit-learn or matplotlib is not installed')
import feature_data  # noqa: E402
import retrieval  # noqa: E402

C, F = 12, 16


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Features around the centres of their classes, and others far from them all."""
    root, generator = tmp_path_factory.mktemp('features'), torch.Generator().manual_seed(0)
    centres = torch.randn(C, F, generator=generator)
    for part, count in (('train', 24), ('test', 10)):
        y = torch.arange(C).repeat(count)
        x = centres[y] + 0.4 * torch.randn(len(y), F, generator=generator)
        np.savez(root / f'toy_{part}.npz', x=x.numpy(), y=y.numpy())
    np.savez(root / 'other_test.npz', x=0.2 * np.random.default_rng(0).normal(size=(50, F)), y=np.zeros(50))
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(unknown_classes, '_STEPS', 120)
    monkeypatch.setattr(unknown_classes, '_RATE', 1e-2)
    monkeypatch.setattr(retrieval, '_STEPS', 60)
    monkeypatch.setattr(retrieval, '_BATCH', 24)
    with torch.random.fork_rng(devices=[]):
        yield


def test_halves_share_no_class(folder):
    whole = feature_data.load_features('toy', folder)
    one, other = whole.halves(3)
    assert one.num_classes == other.num_classes == 6 and len(one.x) == len(other.x) == 144
    assert len(torch.cat([one.x_test, other.x_test]).unique(dim=0)) == len(whole.x_test)
    assert not torch.equal(one.x, whole.halves(4)[0].x)


@pytest.mark.parametrize('method', unknown_classes.METHODS)
def test_each_classifier_is_scored(folder, method):
    setting = unknown_classes.Setting('toy', 'other', method, None if method == 'linear' else 8, 0)
    whole, (far, _) = feature_data.load_features('toy', folder), feature_data.load_feature_file(
        folder / 'other_test.npz')
    found = unknown_classes.run(setting, whole, far)
    assert found['top1'] > 80 and 'probability' in found['scores'] and len(found['scores']) == 3 + (method != 'linear')
    assert all(0 <= value <= 100 for scores in found['scores'].values() for value in scores.values())
    assert found['scores']['probability']['auroc_near'] > 60  # known classes are told apart
    assert found == unknown_classes.run(setting, whole, far)


@pytest.mark.parametrize('method', retrieval.METHODS)
def test_each_method_retrieves(folder, method):
    if method in ('arcface', 'proxy_anchor'):
        pytest.importorskip('pytorch_metric_learning', reason='pytorch-metric-learning is not installed')
    whole = feature_data.load_features('toy', folder)
    setting, = retrieval.settings_of(['toy'], [method], [8], [1e-2], [0])
    found = retrieval.run(setting, whole)
    assert found['images_new'] == 6 * 34 and found['images_trained'] == 60
    assert found['recall_at_1_trained'] > 80 and found['recall_at_1_new'] > 60
    assert found == retrieval.run(setting, whole)


def test_what_is_there_is_not_run_again(folder, monkeypatch, tmp_path):
    arguments = ['unknown_classes.py', '--features', str(folder), '--known', 'toy', '--far', 'other', '--methods',
                 'linear', 'placed', '--dims', '4', '8', '--seeds', '0', '--output', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', arguments)
    unknown_classes.main()
    record = json.loads((tmp_path / 'unknown_classes.json').read_text())
    assert [(row['method'], row['dim']) for row in record['results']] == [('linear', None), ('placed', 4),
                                                                          ('placed', 8)]
    assert str(folder) not in record['command']
    monkeypatch.setattr(unknown_classes, 'run', lambda *given: pytest.fail('run again'))
    unknown_classes.main()


def test_tables_for_the_page():
    tables = runpy.run_path(str(BENCHMARKS / 'readme_tables.py'))
    measured = {'auroc_near': 70.0, 'fpr95_near': 80.0, 'auroc_far': 90.0, 'fpr95_far': 40.0}
    rows = [dict(method=method, dim=dim, seed=0, top1=60.0, scores={'probability': measured})
            for method, dim in (('placed', 8), ('linear', None))]
    lines = tables['unknown_classes']({'results': rows}).splitlines()
    assert lines[2] == '| `nn.Linear`, maximum probability | - | 70.0 | 80.0 | 90.0 | 40.0 | 60.0 | 1 |'
    assert len(lines) == 4
    rows = [dict(data='toy', method='arcface', dim=8, seed=seed, rate=rate, recall_at_1_trained=trained,
                 recall_at_1_new=new, map_at_r_new=1.0)
            for seed in (0, 1) for rate, trained, new in ((0.1, 50.0, 30.0), (0.2, 60.0, 20.0 + seed))]
    lines = tables['retrieval']({'results': rows}).splitlines()
    # The rate that is best for the trained classes, not for the new ones.
    assert lines[2] == '| toy, ArcFace | 8 | 20.5 ± 0.7 | 1.0 ± 0.0 | 60.0 ± 0.0 | 0.2 | 2 |'
