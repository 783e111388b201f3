"""What the tests lean on does what it says."""
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.processes import python, run, run_ranks

# A launcher as torchrun is one: what it starts has a session of its own, and would go on when the launcher is gone.
LAUNCHER = """
import pathlib, subprocess, sys
rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session={apart})
print('started', flush=True)
pathlib.Path({file!r}).write_text(str(rank.pid))
rank.wait()
"""


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='there is no /proc')
@pytest.mark.parametrize('apart', [False, True])
def test_nothing_is_left_of_a_command_that_takes_too_long(tmp_path, apart):
    with pytest.raises(AssertionError, match=r'took more than 2 s:\nstarted'):
        python(LAUNCHER.format(apart=apart, file=str(tmp_path / 'pid')), limit=2)
    pid = int((tmp_path / 'pid').read_text())
    for _ in range(100):
        if not is_alive(pid):
            break
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_commands_end_is_checked():
    assert python('import os; print(os.environ["WORD"])', environment={'WORD': 'yes'}) == 'yes\n'
    with pytest.raises(AssertionError, match='3\nwrong'):
        python('import sys; print("wrong", file=sys.stderr); sys.exit(3)')
    with pytest.raises(AssertionError):
        python('', fails=True)
    assert run([sys.executable, '-c', 'raise SystemExit(3)'], fails=None).returncode == 3


def hang(rank):
    time.sleep(600 * rank)


def refuse(rank):
    raise ValueError(f'rank {rank} refuses')


def note(rank, folder):
    (folder / str(rank)).write_text(str(os.getpid()))


@pytest.mark.slow
def test_ranks(tmp_path):
    run_ranks(note, tmp_path, folder=tmp_path)
    assert len({(tmp_path / str(rank)).read_text() for rank in range(2)}) == 2
    for target, limit, message in ((hang, 1, 'hang took more than 1 s'), (refuse, 300, 'refuses')):
        (tmp_path / target.__name__).mkdir()
        with pytest.raises(Exception, match=message):
            run_ranks(target, folder=tmp_path / target.__name__, limit=limit)
