"""scipy's sparse assignment solver, in this process or in another one."""
import io
import math
import subprocess
import sys
import threading
import time

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

__all__ = ['solve_sparse']

# Problems of fewer pairs take less than a second.
_MIN_PROCESS_PAIRS = 2 ** 17
# The program of the other process. It imports neither PyTorch nor this package, which takes longer than most problems.
_PROGRAM = """
import io, sys
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
problem = np.load(io.BytesIO(sys.stdin.buffer.read()))
pairs = csr_array((problem['costs'], problem['columns'], problem['first']), shape=tuple(problem['shape']))
sys.stdout.buffer.write(min_weight_full_bipartite_matching(pairs)[1].astype(np.int64).tobytes())
"""


def solve_sparse(costs: np.ndarray, columns: np.ndarray, first: np.ndarray, shape: tuple[int, int],
                 seconds: float = float('inf')) -> np.ndarray:
    """Find the matching of all rows with the smallest cost, by shortest augmenting paths (Jonker and Volgenant 1987).

    scipy's solver holds Python's global interpreter lock until it is done, and cannot be stopped. In a background
    thread, or within a time limit, a large problem is therefore solved in a separate process.

    Args:
        costs: (N,) float64, the positive costs of the pairs, ordered by row.
        columns: (N,) int64, the columns of the pairs.
        first: (C + 1,) int64, the index of the first pair of each row, and N.
        shape: The number of rows C and the number of columns.
        seconds: The time limit. Small problems, which take less than a second, have none.

    Returns:
        (C,) int64, the column of each row.

    Raises:
        RuntimeError: The other process failed.
        TimeoutError: It was not done in time.
    """
    in_this_process = threading.current_thread() is threading.main_thread() and math.isinf(seconds)
    if len(costs) < _MIN_PROCESS_PAIRS or in_this_process:
        return min_weight_full_bipartite_matching(csr_array((costs, columns, first), shape=shape))[1].astype(np.int64)
    problem = io.BytesIO()
    began = time.monotonic()
    np.savez(problem, costs=costs, columns=columns, first=first, shape=shape)
    left = None if math.isinf(seconds) else max(0.0, seconds - (time.monotonic() - began))
    try:
        done = subprocess.run([sys.executable, '-c', _PROGRAM], input=problem.getvalue(), capture_output=True,
                              check=False, timeout=left)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f'{len(costs)} pairs were not matched within {seconds:.3g} s.') from None
    if done.returncode:
        raise RuntimeError(f'the process of the background solver ended with the status {done.returncode}: '
                           f'{done.stderr.decode(errors="replace").strip()[-500:]}')
    return np.frombuffer(done.stdout, np.int64).copy()
