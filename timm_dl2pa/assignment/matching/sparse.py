"""scipy's sparse solver, here or in another process."""
import io
import subprocess
import sys
import threading

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

__all__ = ['solve_sparse']

# From so many pairs on the solver may take a second.
_MANY = 2 ** 17
# It imports neither PyTorch nor this package, which would take longer than most problems.
_PROGRAM = """
import io, sys
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
problem = np.load(io.BytesIO(sys.stdin.buffer.read()))
pairs = csr_array((problem['costs'], problem['columns'], problem['first']), shape=tuple(problem['shape']))
sys.stdout.buffer.write(min_weight_full_bipartite_matching(pairs)[1].astype(np.int64).tobytes())
"""


def solve_sparse(costs: np.ndarray, columns: np.ndarray, first: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the cheapest matching (C,) int64 of all rows by shortest augmenting paths (Jonker and Volgenant 1987).

    scipy holds Python's lock all the time. So what is large and not called from the main thread, but beside something
    that goes on there, is solved in a process of its own.

    Args:
        costs: (N,) positive float64, by rows.
        columns: (N,).
        first: (C + 1,) where each row begins.
        shape: C and the number of columns.

    Raises:
        RuntimeError: The other process failed.
    """
    if len(costs) < _MANY or threading.current_thread() is threading.main_thread():
        return min_weight_full_bipartite_matching(csr_array((costs, columns, first), shape=shape))[1].astype(np.int64)
    problem = io.BytesIO()
    np.savez(problem, costs=costs, columns=columns, first=first, shape=shape)
    done = subprocess.run([sys.executable, '-c', _PROGRAM], input=problem.getvalue(), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f'the solver beside the training ended with the status {done.returncode}: '
                           f'{done.stderr.decode(errors="replace").strip()[-500:]}')
    return np.frombuffer(done.stdout, np.int64).copy()
