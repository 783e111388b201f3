"""`benchmarks/million.py` at toy size."""
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'million.py'


@pytest.mark.slow
def test_each_job_has_a_row(tmp_path):
    jobs = ['wrap', 'step', 're-solve', 'nearest', 'save', 'load']
    run([sys.executable, str(SCRIPT), '--classes', '300', '--dims', '8', '--jobs', *jobs, '--output', str(tmp_path)])
    rows = json.loads((tmp_path / 'million.json').read_text())['results']
    assert [row['job'] for row in rows] == jobs and all(row['seconds'] > 0 and row['peak_mb'] >= 0 for row in rows)
