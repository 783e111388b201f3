"""Resolver: solves the assignment from class means, at once or in a thread, and puts it in force."""
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..assignment import AssignmentResult, solve_assignment
from ..distributed import rank, solve_on_rank_0
from ..head import DL2PAHead
from ..values import real_number, whole_number
from .background import Background
from .class_means import ClassMeans, directions_of
from .clock import Clock
from .update import AssignmentUpdate
from .warmup import Warmup

__all__ = ['PendingSolve', 'Resolver']

# Number of updates that are kept, and saved in every checkpoint: those of a thousand epochs at the usual interval.
_HISTORY = 1000


@dataclass
class PendingSolve:
    """A solve that runs in the background. Only rank 0 has the class sums, and solves.

    Attributes:
        step: Batches that had been folded in when it began.
        epoch: Epochs that were over.
        take_at: Batches after which its answer is taken.
        left_out: Samples that were left out of the class sums, as not finite.
        sums: (C, d) float32 class sums; None on other ranks.
        solver: The thread; None until it is started.
    """
    step: int
    epoch: int
    take_at: int
    left_out: int
    sums: torch.Tensor | None
    solver: Background[tuple[AssignmentResult, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the sums, not what was made of them so far."""
        return {'step': self.step, 'epoch': self.epoch, 'take_at': self.take_at, 'left_out': self.left_out,
                'sums': None if self.sums is None else self.sums.cpu().clone()}


class Resolver:
    """Holds what a re-solve needs beside the class means: dual prices, the least gain, and a solve that is pending.

    `history` lists the last thousand updates that were put in force, and `updates` counts all.

    Args:
        heads: The heads of a model. The first one's prototypes and assignment count, all get the answer.
        min_gain: Least gain in the objective, as a share of its magnitude, below which nothing moves.
        lag: After how many batches the answer of a solve in the background is taken.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, heads: Sequence[DL2PAHead], *, min_gain: float = 0.0, lag: int = 16):
        self.heads = heads
        self.min_gain: float = real_number('min_gain', min_gain)
        if not 0 <= self.min_gain < 1:
            raise ValueError(f'min_gain must be a share from 0 to below 1, not {min_gain}.')
        self.lag: int = whole_number('lag', lag, least=1)
        self._history: deque[AssignmentUpdate] = deque(maxlen=_HISTORY)
        self.updates: int = 0
        self.prices: torch.Tensor | None = None
        self.pending: PendingSolve | None = None

    @property
    def history(self) -> list[AssignmentUpdate]:
        """The last updates, in their order."""
        return list(self._history)

    def reset(self) -> None:
        """Forget prices, and a solve that is pending."""
        self.prices = self.pending = None

    def resolve(self, class_means: ClassMeans, clock: Clock, warmup: Warmup | None = None) -> AssignmentUpdate:
        """Solve on rank 0 by class means that are merged there, and put the answer in force on every process.

        Args:
            class_means: Of the training so far.
            clock: Of the training.
            warmup: The warm-up that ends now, which then gives the answer.

        Raises:
            ValueError: The class means are not finite, or a label was out of range. Nothing was changed.
        """
        began = time.perf_counter()

        def solve() -> tuple[AssignmentResult, torch.Tensor | None, int]:
            left_out = self._checked(class_means)
            if warmup is not None:
                return *warmup.solve(class_means), left_out
            return self._match(class_means.directions(), self.head.prototypes, self._in_force()), None, left_out

        result, prototypes, left_out = solve_on_rank_0(solve, self.head.prototypes.device)
        return self._put_in_force(result, prototypes, AssignmentUpdate(
            clock.batches, clock.epochs, result.moved, result.objective_before, result.objective,
            time.perf_counter() - began, 'resolve' if warmup is None else warmup.name, left_out))

    @staticmethod
    def _checked(class_means: ClassMeans) -> int:
        """Return how many samples were left out, and warn if there were some. On rank 0."""
        left_out = class_means.check()
        if left_out:
            warnings.warn(f'{left_out} samples since the last re-solve were left out of the class means: their '
                          f'embeddings or targets were not finite.', stacklevel=2)
        return left_out

    def launch(self, class_means: ClassMeans, clock: Clock) -> None:
        """Begin a solve in the background, by class means that are merged on rank 0.

        Raises:
            ValueError: As `resolve`.
        """
        left_out = solve_on_rank_0(lambda: self._checked(class_means), self.head.prototypes.device)
        self.pending = PendingSolve(clock.batches, clock.epochs, clock.batches + self.lag, left_out,
                                    class_means.sums.clone() if rank() == 0 else None)
        self._start_thread()

    def _start_thread(self) -> None:
        pending = self.pending
        if pending.sums is None:
            return
        # A copy: what is loaded into the model meanwhile goes to the same memory. On a GPU the copy of the means to the
        # CPU, which comes after it on the training's stream, waits for both: the thread has a stream of its own.
        prototypes, start = self.head.prototypes.clone(), self._in_force()
        means = directions_of(pending.sums)

        def solve() -> tuple[AssignmentResult, float]:
            began = time.perf_counter()
            result = self._match(means, prototypes, start)
            return result, time.perf_counter() - began

        pending.solver = Background(solve)

    def take(self, step: int) -> AssignmentUpdate | None:
        """Put the answer of the solve in the background in force, once `lag` batches have passed; else return None.

        In a distributed run every process must call it at the same step.
        """
        pending = self.pending
        if pending is None:
            return None
        if pending.solver is None:
            self._start_thread()  # resumed from a checkpoint
        if step < pending.take_at:
            return None
        self.pending = None
        result, seconds = solve_on_rank_0(lambda: pending.solver.result(), self.head.prototypes.device)
        return self._put_in_force(result, None, AssignmentUpdate(
            pending.step, pending.epoch, result.moved, result.objective_before, result.objective, seconds,
            left_out=pending.left_out))

    @property
    def head(self) -> DL2PAHead:
        """The head whose prototypes and assignment count."""
        return self.heads[0]

    def _in_force(self) -> AssignmentResult:
        """Return the assignment in force, with the prices of the last solve."""
        unknown = float('nan')
        return AssignmentResult(self.head.assignment.cpu(), 0, unknown, unknown, prices=self.prices)

    def _match(self, means: torch.Tensor, prototypes: torch.Tensor, start: AssignmentResult) -> AssignmentResult:
        """Return the best assignment, or the one in force if the gain is too small."""
        result = solve_assignment(class_means=means, prototypes=prototypes, start=start)
        if result.objective - result.objective_before < self.min_gain * abs(result.objective):
            result = replace(result, assignment=start.assignment, moved=0, objective=result.objective_before,
                             exact=result.exact and result.moved == 0)
        return result

    def _put_in_force(self, result: AssignmentResult, prototypes: torch.Tensor | None,
                      update: AssignmentUpdate) -> AssignmentUpdate:
        for head in self.heads:
            head.assign(result.assignment, prototypes)
        self.prices = result.prices
        self._history.append(update)
        self.updates += 1
        return update

    def state_dict(self) -> dict[str, Any]:
        """Return history, prices and the pending solve: tensors on the CPU and plain numbers."""
        return {'history': [asdict(update) for update in self._history],
                'updates': self.updates,
                'prices': None if self.prices is None else self.prices.clone(),
                'pending': self.pending and self.pending.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless a state is complete and of as many prototypes."""
        missing = sorted(self.state_dict().keys() ^ state.keys())
        if missing:
            raise ValueError(f'the saved state of the re-solves lacks, or does not know, {", ".join(missing)}.')
        prices, count = state['prices'], len(self.head.prototypes)
        if prices is not None and len(prices) != count:
            raise ValueError(f'the saved prices are of {len(prices)} prototypes, not {count}: they are of another '
                             f'head.')
        pending = state['pending']
        if pending is not None and pending.keys() != {'step', 'epoch', 'take_at', 'left_out', 'sums'}:
            raise ValueError(f'the saved pending solve has the entries {", ".join(pending)}.')
        names = {field.name for field in fields(AssignmentUpdate)}
        if any(entry.keys() != names for entry in state['history']):
            raise ValueError(f'an entry of the saved history has not the values {", ".join(sorted(names))}.')

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checked state. In a distributed run all processes load the same one: rank 0 keeps the sums."""
        self._history = deque((AssignmentUpdate(**entry) for entry in state['history']), _HISTORY)
        self.updates = state['updates']
        self.prices = None if state['prices'] is None else state['prices'].cpu().clone()
        pending = state['pending']
        self.pending = None if pending is None else PendingSolve(
            **{**pending, 'sums': pending['sums'].clone() if rank() == 0 else None})
