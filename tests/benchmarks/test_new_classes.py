"""The benchmarks of new classes and of compatible embeddings: every method runs on a few features, and is tabulated."""
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
new_classes = pytest.importorskip('new_classes', reason='scikit-learn or matplotlib is not installed')
compatible = pytest.importorskip('compatible')
tables = runpy.run_path(str(BENCHMARKS / 'readme_tables.py'))

pytestmark = pytest.mark.filterwarnings('ignore:the embeddings of new class')


def features(num_classes, width, seed=0):
    """Of easily told classes; one image is the same for every seed but for the noise."""
    centres = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(1)) \
        @ torch.randn(16, width, generator=torch.Generator().manual_seed(width))
    y = torch.arange(num_classes).repeat_interleave(8)

    def sample(offset):
        noise = torch.randn(len(y), width, generator=torch.Generator().manual_seed(10 * seed + offset))
        return centres[y] + noise

    return new_classes.Features((sample(0),), y, sample(1), y)


@pytest.mark.slow
def test_each_method_meets_all_sessions(monkeypatch):
    monkeypatch.setattr(new_classes, 'BASE', 10)
    monkeypatch.setattr(new_classes, '_BATCH', 8)
    sessions, rows = new_classes.Sessions(features(20, 32), 0), []
    assert sessions.number() == 2
    for method in new_classes.METHODS:
        setting = new_classes.Setting(method, None if method in new_classes.WITHOUT_HEAD else 19, 0)
        found = new_classes.run(setting, sessions)
        assert len(found['top1']) == 3 and found['top1'][0] > 80
        rows.append({**vars(setting), **found, 'top1': found['top1'] * 3})
    by_method = {row['method']: row for row in rows}
    assert by_method['even_mean']['top1_of_new'] > 50 > by_method['even_free']['top1_of_new']
    assert by_method['even_free_tuned']['top1_of_new'] > by_method['even_free']['top1_of_new'] + 20
    text = tables['new_classes']({'results': rows})
    assert '| `placed`, `free`, tuned | 19 |' in text and '| nearest class mean, all features | - |' in text


@pytest.mark.slow
def test_an_inherited_head_makes_models_compatible(monkeypatch):
    monkeypatch.setattr(compatible, 'TRAINED', 12)
    monkeypatch.setattr(compatible, 'DIM', 12)
    monkeypatch.setattr(compatible, 'OLD_IMAGES', 4)
    monkeypatch.setattr(new_classes, '_BATCH', 8)
    small = compatible.timm.create_model
    monkeypatch.setattr(compatible.timm, 'create_model', lambda name, **kwargs: small('test_efficientnet', **kwargs))
    width = small('test_efficientnet').num_features
    rows, found = [], {}
    for method in compatible.METHODS:
        setting = compatible.Setting('lite0:64 lite1:96', method, 0)
        found[method] = compatible.run(setting, features(16, width), features(16, width, seed=1))
        rows.append({**vars(setting), **found[method]})
    for method in ('inherited', 'simplex'):
        assert found[method]['trained_new_old'] > found[method]['trained_old_old'] - 5 > 60
    for method in ('independent', 'linear'):
        assert found[method]['trained_new_old'] < found[method]['trained_old_old'] - 30
    assert '| Lite0 at 64 px, Lite1 at 96 px | `head=old` |' in tables['compatible']({'results': rows})
