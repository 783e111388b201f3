"""The assignment: ours beside scipy's dense solver and the package `lap` or `lapx`, from the class means to the answer.

    python benchmarks/assignment.py                      # 100 to 10,000 classes; minutes
    python benchmarks/assignment.py --large              # 21,841 and 100,000; an hour, 12 GB for the peers' matrices
    python benchmarks/assignment.py --recorded           # class means of a training on scikit-learn's digits
    python benchmarks/assignment.py --device cuda        # 21,841 and 100,000: ours on the GPU, beside ours on the CPU

Class means are w p_a(c) + noise of norm 1: w = 1 is what training leads to, 0.3 what is hard. Rounds are interleaved,
seconds are medians of them (who takes over half a minute has one). Peak memory is what a solver takes beyond the
inputs. A row is written when it is done; --resume keeps the rows that are there. `lap` and `lapx` are one module:
whichever is installed is measured.
"""
import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import add_output_argument, read_results, result_name, write_results
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from timm_dl2pa import AssignmentResult, AssignmentScheduler, DL2PAHead, make_prototypes, solve_assignment

ATTACHED = ('in place', '0.1 % displaced', '1 % displaced', '10 % displaced')
DRIFT = 'loose, drift of 0.01, earlier prices'
COLD = 'loose, cold'
# Who takes longer, in seconds, is run once.
LONG = 30
# C, d, start, peers. At 21,841 a peer's matrix takes 4 GB, and `lap` too long where means are loose; at 100,000, 80.
PEERS = ('scipy', 'lap')
SMALL = [(size, 128, case, PEERS) for size in (100, 1000, 10_000) for case in (*ATTACHED, COLD, DRIFT)]
LARGE = [
    (21_841, 128, '1 % displaced', PEERS),
    (21_841, 128, COLD, ('scipy',)),
    (21_841, 128, DRIFT, ()),
    (21_841, 512, '1 % displaced', ()),
    (100_000, 128, '1 % displaced', ()),
    (100_000, 128, COLD, ()),
    (100_000, 512, '1 % displaced', ()),
    (21_841, 128, '10 % displaced', PEERS),
    (21_841, 512, COLD, ()),
]
ON_A_GPU = [
    (21_841, 128, '1 % displaced', ()),
    (21_841, 128, COLD, ()),
    (21_841, 128, DRIFT, ()),
    (100_000, 128, '1 % displaced', ()),
]


def unit_rows(generator: np.random.Generator, count: int, dim: int) -> np.ndarray:
    points = generator.standard_normal((count, dim))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def problem(
        size: int, dim: int, case: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | AssignmentResult]:
    """Return class means, prototypes, and the start. Prototypes are random: optimised ones take longer than this."""
    generator = np.random.default_rng(seed)
    prototypes, noise = unit_rows(generator, size, dim), unit_rows(generator, size, dim)
    if case in ATTACHED:
        start = np.arange(size)
        share = {'in place': 0.0, '0.1 % displaced': 0.001, '1 % displaced': 0.01, '10 % displaced': 0.1}[case]
        if share:
            moved = generator.permutation(size)[:max(2, round(share * size))]
            start[moved] = start[np.roll(moved, 1)]
        return prototypes + noise, prototypes, start
    means = 0.3 * prototypes + noise
    start = generator.permutation(size)
    if case == COLD:
        return means, prototypes, start
    earlier = solve_assignment(class_means=means, prototypes=prototypes, start=start)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return means + np.tan(0.01) * lengths * unit_rows(generator, size, dim), prototypes, earlier


def by_scipy(means: np.ndarray, prototypes: np.ndarray, start: Any) -> np.ndarray:
    return linear_sum_assignment(means @ prototypes.T, maximize=True)[1]


def by_lap(means: np.ndarray, prototypes: np.ndarray, start: Any) -> np.ndarray:
    import lap
    return lap.lapjv(-(means @ prototypes.T))[1].astype(np.int64)


def by_ours(means: np.ndarray, prototypes: np.ndarray, start: Any) -> AssignmentResult:
    return solve_assignment(class_means=means, prototypes=prototypes, start=start)


def by_ours_on(device: str) -> Callable:
    """Return our solver, with the passes over all pairs on a device; moving the inputs there counts."""
    warm = torch.ones(64, 64, device=device)
    (warm @ warm).topk(2)  # what a device does once, it does now

    def solve(means: np.ndarray, prototypes: np.ndarray, start: Any) -> AssignmentResult:
        return solve_assignment(class_means=torch.from_numpy(means).to(device),
                                prototypes=torch.from_numpy(prototypes).to(device), start=start)
    return solve


def solvers(peers: tuple[str, ...], device: str) -> dict[str, Callable]:
    found: dict[str, Callable] = {'ours': by_ours}
    if device != 'cpu':
        found[f'ours on {torch.device(device).type}'] = by_ours_on(device)
    if 'scipy' in peers:
        found['scipy'] = by_scipy
    if 'lap' in peers:
        found |= {f'{name} {version(name)}': by_lap for name in packages_distributions().get('lap', [])[:1]}
    return found


def _highest() -> int | None:
    """Return the process's peak memory in bytes since it was last forgotten (Linux)."""
    status = Path('/proc/self/status')
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith('VmHWM'))


def timed(solve: Callable, *problem: Any) -> tuple[Any, float, int | None]:
    """Return the answer, the seconds, and the peak of memory beyond what was in use."""
    before = None
    if _highest() is not None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be taken again
        try:
            Path('/proc/self/clear_refs').write_text('5')  # forgets the peak
            before = _highest()
        except OSError:  # a system that lets nobody: there is no figure then
            pass
    began = time.perf_counter()
    answer = solve(*problem)
    seconds = time.perf_counter() - began
    return answer, seconds, None if before is None else _highest() - before


def measure(means: np.ndarray, prototypes: np.ndarray, start: Any, rounds: int, peers: tuple[str, ...],
            device: str) -> dict[str, Any]:
    """Return what each solver took, and how good its answer is."""
    chosen = solvers(peers, device)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks: dict[str, list[int | None]] = {name: [] for name in chosen}
    row: dict[str, Any] = {}
    for _ in range(rounds):
        for name, solve in chosen.items():
            if seconds[name] and seconds[name][0] > LONG:
                continue
            answer, took, peak = timed(solve, means, prototypes, start)
            seconds[name].append(took)
            peaks[name].append(peak)
            if isinstance(answer, AssignmentResult):
                if name == 'ours':
                    row.update(moved=answer.moved, exact=answer.exact, gap=answer.gap)
                else:
                    row[f'{name} exact'] = answer.exact
                answer = answer.assignment.numpy()
            row[f'{name} objective'] = float(np.einsum('cd,cd->', means, prototypes[answer]))
    for name in chosen:
        row[f'{name} seconds'] = round(statistics.median(seconds[name]), 6)
        row[f'{name} peak_mb'] = None if peaks[name][0] is None else round(max(peaks[name]) / 2 ** 20)
    for name in chosen:
        if name != 'ours':
            row[f'faster than {name}'] = round(row[f'{name} seconds'] / row['ours seconds'], 3)
    return row


def recorded(seed: int) -> list[tuple[str, np.ndarray, np.ndarray, Any]]:
    """Return the class means at each re-solve of a training on scikit-learn's digits, with that re-solve's start."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    x, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    torch.manual_seed(seed)
    head = DL2PAHead(64, 10, 8, prototypes=make_prototypes(10, 8, seed=seed))
    scheduler = AssignmentScheduler(head, interval=20, warmup='none')
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    problems = []
    for batch in range(100):
        some = torch.randint(0, len(x), (64,))
        loss = torch.nn.functional.cross_entropy(16 * head(x[some]), labels[some])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch and batch % scheduler.interval == 0:
            problems.append((f'digits, after {batch} batches', scheduler.class_means.directions().numpy(),
                             head.prototypes.double().numpy(), head.assignment.numpy().copy()))
        scheduler.step(labels[some])
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--sizes', type=int, nargs='+', help='only these numbers of classes; a size of no plan is '
                                                             'solved once, with 1 %% displaced')
    parser.add_argument('--large', action='store_true')
    parser.add_argument('--recorded', action='store_true')
    parser.add_argument('--resume', action='store_true', help='keep the rows that are in the results already')
    add_output_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = result_name('assignment' + ('_large' if args.large else '_recorded' if args.recorded else ''), args.device)
    results = read_results(name, args.output) if args.resume else []
    done = [(row['num_classes'], row['dim'], row['case']) for row in results]
    if args.recorded:
        plan = [(len(means), means.shape[1], case, PEERS, (means, prototypes, start))
                for case, means, prototypes, start in recorded(args.seed)]
    else:
        sizes = LARGE if args.large else SMALL if args.device == 'cpu' else ON_A_GPU
        if args.sizes is not None:
            new = set(args.sizes) - {entry[0] for entry in sizes}
            sizes = [*(entry for entry in sizes if entry[0] in args.sizes),
                     *((size, 16, '1 % displaced', ()) for size in sorted(new))]
        plan = [(*entry, None) for entry in sizes]
    path = None
    with threadpool_limits(args.threads):
        for size, dim, case, peers, given in plan:
            if (size, dim, case) in done:
                continue
            rounds = 1 if size > 10_000 else 3 if size == 10_000 else 9
            row = {'num_classes': size, 'dim': dim, 'case': case, 'rounds': rounds,
                   **measure(*(given or problem(size, dim, case, args.seed)), rounds, peers, args.device)}
            results.append(row)
            print(row, flush=True)
            path = write_results(name, vars(args), results, args.output)
    print(path)


if __name__ == '__main__':
    main()
