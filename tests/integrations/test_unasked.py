"""`import timm_dl2pa` imports no training loop of another project."""
from tests.helpers.processes import python

CODE = """
import sys
import timm_dl2pa, timm_dl2pa.plugin
assert 'timm_dl2pa.integrations' not in sys.modules
names = {'lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'tensorboard', 'fastai'}
import timm_dl2pa.integrations.logs, timm_dl2pa.integrations.lightning_hooks
print(*sorted(names & set(sys.modules)))
"""


def test_nothing_is_imported_unasked():
    assert python(CODE).split() == []
