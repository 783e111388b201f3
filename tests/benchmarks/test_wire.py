"""`benchmarks/wire.py` at toy size."""
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'wire.py'


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/net/dev').exists(), reason='the bytes are counted by Linux')
def test_this_head_sends_less_than_a_classifier_of_as_many_classes(tmp_path):
    command = [sys.executable, str(SCRIPT), '--sizes', '20000', '--dim', '32', '--batch-size', '8', '--steps', '2',
               '--phases', 'linear', 'after it', '--output', str(tmp_path)]
    printed = run(command).stdout
    rows = {row['phase']: row for row in json.loads((tmp_path / 'wire.json').read_text())['results']}
    assert rows.keys() == {'linear', 'after it'} and printed.count('bytes_a_step') == 2
    # The loopback device may carry what others send, too: no upper bound is sure.
    assert rows['linear']['bytes_a_step'] > 20_000 * 32 * 4 > rows['after it']['peak_mb'] > 0
    assert rows['after it']['bytes_a_step'] > 0
