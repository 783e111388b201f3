"""The tests that need a GPU, each one's outcome in a file that grows as they end: `<output>/gpu_tests.json`.

    python benchmarks/gpu_tests.py                     # pytest -m gpu
    python benchmarks/gpu_tests.py --device cpu        # what of them runs on a CPU
"""
import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from results_file import add_output_argument, result_name, write_results

TESTS = Path(__file__).parents[1] / 'tests' / 'gpu'


class Recorder:
    """A pytest plugin that writes what has ended so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.running: dict[str, float] = {}  # when each that has not ended yet began
        self.began = time.perf_counter()
        self.complete = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = {'outcome': 'failed', 'seconds': 0.0,
                                            'message': str(report.longrepr).strip().splitlines()[-1:]}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = round(time.perf_counter() - self.began, 1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.outcomes.setdefault(report.nodeid, {
            'outcome': 'passed', 'began': self.running.get(report.nodeid), 'seconds': 0.0})
        entry['seconds'] = round(entry['seconds'] + report.duration, 2)
        if report.outcome != 'passed':
            entry['outcome'] = 'expected to fail' if hasattr(report, 'wasxfail') else report.outcome
            entry['message'] = str(report.longrepr or '').strip().splitlines()[-1:]
        if report.when == 'teardown':
            self.running.pop(report.nodeid, None)
            self.write()

    def write(self) -> None:
        """Write the file, with the numbers of each outcome."""
        outcomes = [entry['outcome'] for entry in self.outcomes.values()]
        write_results(result_name('gpu_tests', self.args.device), vars(self.args), {
            'complete': self.complete,
            **{outcome: outcomes.count(outcome) for outcome in ('passed', 'failed', 'skipped', 'expected to fail')},
            'running': self.running,
            'tests': self.outcomes,
        }, self.args.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--select', help='only tests whose names have this')
    add_output_argument(parser)
    args = parser.parse_args()
    args.output = args.output.resolve()
    os.chdir(TESTS.parents[1])
    recorder = Recorder(args)
    chosen = ['-m', 'gpu'] if args.device == 'cuda' else ['-k', f'cpu and {args.select}' if args.select else 'cpu']
    if args.select and args.device == 'cuda':
        chosen += ['-k', args.select]
    # A file that cannot be imported there keeps the others from nothing.
    options = ['-q', '--no-header', '-p', 'no:cacheprovider', '--continue-on-collection-errors',
               '--override-ini=faulthandler_timeout=60']
    if importlib.util.find_spec('xdist') is None:
        options.append('--override-ini=addopts=')
    elif args.device == 'cpu':
        options.append('--numprocesses=0')  # few tests: other processes would take longer to start than they take
    status = pytest.main([str(TESTS), *chosen, *options], plugins=[recorder])
    recorder.complete = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    recorder.write()
    print(f'{len(recorder.outcomes)} tests in {time.perf_counter() - recorder.began:.0f} s')
    return int(status)


if __name__ == '__main__':
    sys.exit(main())
