"""Works through the steps of `gpu.py`: processes with time limits, trainings side by side, the rest alone."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_steps import Step

__all__ = ['Work']

HERE = Path(__file__).parent
# Exit status of accuracy.py for a training that ended in time, with a checkpoint.
_OUT_OF_TIME = 3
# Seconds that trainings have to save their checkpoint before the end, and that a process has to die.
_MARGIN = 12.0
_GRACE = 3.0
# Seconds between looks at the processes, and between two of what is to be done now and then.
_LOOK = 0.1
_NOW_AND_THEN = 30.0


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    log: Path
    began: float
    ends: float
    ended: bool = False


class Work:
    """Runs steps until the time is over, and says what became of each, one line a step.

    Args:
        output: Folder of results and logs.
        seconds: How long it may take in all.
        parallel: How many trainings run side by side.
        places: Where the data are: arguments of accuracy.py for each `needs` of a step.
        now_and_then: Is called after each step, and every half minute.
        sharing: Environment variables of trainings that run side by side (`shared_gpu`).
    """

    def __init__(self, output: Path, seconds: float, parallel: int, places: dict[str, list[str]],
                 now_and_then: Callable[[], None] = lambda: None, sharing: dict[str, str] | None = None):
        self.output, self.parallel, self.places, self.now_and_then = output, parallel, places, now_and_then
        self.sharing = sharing or {}
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.failed: list[str] = []
        self._running: list[_Running] = []
        self._done_last = time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def say(self, step: Step, what: str) -> None:
        """Print the line of a step."""
        print(f'[{time.monotonic() - self.began:5.0f} s] {step.name}: {what}', flush=True)

    def run(self, steps: list[Step], *folders: Path) -> None:
        """Run those steps that have no complete record in the folders."""
        late = 0
        try:
            for step in steps:
                if step.done(*folders):
                    self.say(step, 'there already')
                    continue
                if step.needs and step.needs not in self.places:
                    self.say(step, f'skipped: its data are not there (--{step.needs.replace("_", "-")})')
                    continue
                # Figures of time are taken alone.
                while len(self._running) >= (1 if step.alone else self.parallel):
                    self._look()
                margin = _MARGIN if step.training else 0.0
                if self.left() < step.least + margin:
                    late += 1
                    if late == 1:
                        self.say(step, f'not begun: {max(0.0, self.left()):.0f} s are left of the time, and it needs '
                                       f'{step.least + margin:.0f}')
                    continue
                self._start(step)
                while step.alone and self._running:
                    self._look()
            while self._running:
                self._look()
        finally:
            self.stop()
        if late > 1:
            print(f'{late - 1} more steps were not begun for want of time', flush=True)

    def stop(self) -> None:
        """End what is running, and what it has started."""
        for running in self._running:
            _end(running.process)
        self._running.clear()
        self.now_and_then()

    def _start(self, step: Step) -> None:
        folder = self.output / step.folder
        folder.mkdir(parents=True, exist_ok=True)
        log = self.output / 'logs' / f'{step.name.replace("/", "_").replace("=", "-")}.log'
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / step.script), *step.arguments, '--output', str(folder)]
        now = time.monotonic()
        if step.training:
            command += [*self.places.get(step.needs, []), '--until', f'{time.time() + self.left() - _MARGIN:.0f}']
        # A session of its own, so that the workers of a compiler end with it.
        process = subprocess.Popen(
            command, stdout=log.open('w'), stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True,
            env={**os.environ, **(self.sharing if step.training else {}), 'PYTHONUNBUFFERED': '1',
                 'PYTHONPATH': os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))})
        self._running.append(_Running(step, process, log, now, min(now + step.limit, self.end)))

    def _look(self) -> None:
        """Wait a moment, and take note of what has ended."""
        time.sleep(_LOOK)
        for running in list(self._running):
            code = running.process.poll()
            if code is None and time.monotonic() > running.ends:
                _end(running.process)
                running.ended, code = True, running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            self._report(running, code)
            self._done_last = 0.0
        if time.monotonic() - self._done_last > _NOW_AND_THEN:
            self._done_last = time.monotonic()
            self.now_and_then()

    def _report(self, running: _Running, code: int) -> None:
        step, took = running.step, time.monotonic() - running.began
        if code == 0 and not running.ended:
            self.say(step, f'done in {took:.0f} s')
        elif code == _OUT_OF_TIME and step.training:
            self.say(step, f'out of time after {took:.0f} s, goes on from its checkpoint')
        else:
            self.failed.append(step.name)
            why = f'ended after {took:.0f} s' if running.ended else f'failed with status {code} after {took:.0f} s'
            lines = running.log.read_text(errors='replace').replace('\r', '\n').strip().splitlines()
            self.say(step, f'{why}: {lines[-1] if lines else "it printed nothing"}')


def _end(process: subprocess.Popen) -> None:
    """End a process and its children: kindly, then by force."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        try:
            process.wait(_GRACE)
            if kind == signal.SIGKILL:
                return
        except subprocess.TimeoutExpired:
            pass
