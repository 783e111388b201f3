"""Processes that a test starts, and that do not outlive it."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 300  # seconds; a loaded machine may take many times what an idle one takes


def run(
        command: Sequence[str],
        *,
        fails: bool | None = False,
        limit: float = LIMIT,
        environment: dict[str, str] | None = None,
        **kwargs,
) -> subprocess.CompletedProcess:
    """Run a command and return its output as text; `environment` is added to that of the tests.

    It must end with code 0, with another one if it `fails`, or with any (None). After `limit` seconds it is killed,
    with all that it started, and what it printed is shown.
    """
    kwargs = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **kwargs}
    with subprocess.Popen(command, text=True, start_new_session=True, env={**os.environ, **(environment or {})},
                          **kwargs) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            kill_family(process.pid)
            out, err = process.communicate()
            raise AssertionError(f'{command} took more than {limit} s:\n{tail(out, err)}') from None
        except BaseException:  # Ctrl-C
            kill_family(process.pid)
            raise
    assert fails is None or (process.returncode != 0) == fails, f'{command}: {process.returncode}\n{tail(out, err)}'
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def python(code: str, *arguments: str, **kwargs) -> str:
    """Run Python code in a process of its own, and return what it prints."""
    return run([sys.executable, '-c', code, *arguments], **kwargs).stdout


def run_ranks(
        target: Callable,
        *arguments,
        folder: Path,
        count: int = 2,
        backend: str = 'gloo',
        limit: float = LIMIT,
) -> None:
    """Call `target(rank, *arguments)` in `count` processes that form a group, with 'nccl' one to a GPU.

    They are forks of one process that has imported everything, and done nothing: an import takes seconds. Their
    environment is that of the first call.
    """
    mp.get_context('forkserver').set_forkserver_preload(['timm_dl2pa', 'timm.loss', 'timm.task', 'pytest'])
    ranks = mp.start_processes(_rank, (backend, count, str(folder / 'rendezvous'), target, arguments), nprocs=count,
                               join=False, start_method='forkserver')
    end = time.monotonic() + limit
    try:
        while not ranks.join(timeout=max(end - time.monotonic(), 0)):
            assert time.monotonic() < end, f'{target.__name__} took more than {limit} s'
    finally:
        for process in ranks.processes:
            process.kill()


def _rank(rank: int, backend: str, count: int, rendezvous: str, target: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if backend == 'nccl':
        torch.cuda.set_device(rank)
    # They meet in a file: a port that is free now may be another test's a moment later.
    dist.init_process_group(backend, init_method=f'file://{rendezvous}', rank=rank, world_size=count)
    target(rank, *arguments)
    dist.barrier()
    # Threads of the backend now and then abort the process while it is torn down (seen without any code of ours).
    os._exit(0)


def kill_family(pid: int) -> None:
    """Kill a process, its group, and all that it started: torchrun gives each rank a session of its own."""
    family = descendants(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started. (None where there is no /proc.)"""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended
            # `pid (name) state parent ...`; a name may hold blanks and brackets.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    found, rest = [], [pid]
    while rest:
        parent = rest.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found += children
        rest += children
    return found


def tail(*texts: str | None, most: int = 4000) -> str:
    return '\n'.join(text[-most:] for text in texts if text)
