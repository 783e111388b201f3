"""AssignmentScheduler: keeps class means during training and re-solves the assignment from them."""
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from ..assignment.alignment import align_prototypes
from ..assignment.solve import MAX_SCORES, AssignmentResult, solve_assignment
from ..head.head import heads_of
from .background import Background
from .class_means import ClassMeans, RunningClassMeans, directions_of
from .placement import PrototypePlacement, check_evenness, default_evenness
from .schedule import Schedule

__all__ = ['AssignmentScheduler', 'AssignmentUpdate']


@dataclass(frozen=True)
class AssignmentUpdate:
    """What a re-solve did.

    Attributes:
        step: Number of batches that had been folded in.
        epoch: Number of epochs that were over (by `epoch_end()`).
        moved: Number of classes that changed their prototype.
        objective_before: `sum_c <m_c, p_a(c)>` over the class means, under the assignment that was in force.
        objective: The same under the new one: the maximum.
        seconds: Time of the re-solve; of one in the background, beside the training.
    """
    step: int
    epoch: int
    moved: int
    objective_before: float
    objective: float
    seconds: float


@dataclass
class _Pending:
    """A re-solve that runs in the background. Only rank 0 has the class sums, and solves."""
    step: int
    epoch: int
    take_at: int
    sums: torch.Tensor | None
    solver: Background[tuple[AssignmentResult, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the sums, not what was made of them so far."""
        return {'step': self.step, 'epoch': self.epoch, 'take_at': self.take_at,
                'sums': None if self.sums is None else self.sums.cpu().clone()}


class AssignmentScheduler:
    """Step 2 of DL2PA: now and then, assigns prototypes by the class means, `a <- argmax sum_c <m_c, p_a(c)>`.

    Call `step(targets)` once after each training batch's forward (and backward): it takes the embeddings of the head's
    last forward in training mode. A re-solve that falls due is only marked: it runs at the next `step`, before that
    batch is folded in. So none comes between training and validation, a checkpoint holds the assignment that its
    metric was measured with, and none comes after the last batch.

    By default training begins with a warm-up, in which the prototypes are placed: from the evenly spread set on, each
    class's prototype follows a running statistic of the embeddings, drawn to what tells its class apart and kept from
    the others by the paper's energy, with the weight `evenness` (`PrototypePlacement`). That takes no parameters, and
    its end is the last time that a prototype moves: from then on labels alone do. In few dimensions (d far below C)
    exactly even spread costs much accuracy; about half of the training is a good length. At every moment the head, and
    a checkpoint, has the prototypes that it is trained with.

    `evenness=math.inf` keeps the set exactly even. In its warm-up the head's class vectors in training are running
    means of each class's latest embeddings, seen from their common mean. At its end the whole set is rotated, and
    matched, in turns, until both fit the class means (`align_prototypes`). In evaluation the head classifies by its
    prototypes, which before that is no better than chance. One epoch is enough.

    `warmup=0` is the paper's rule: evenly spread prototypes, any assignment to begin with, which matching improves.

    The class means are running sums of unit embeddings; each re-solve multiplies what was summed by `momentum`. (The
    paper's moving average weighs the batches within an epoch instead. The sums do not depend on how samples fall into
    batches or processes.) In a distributed run (`torch.distributed` initialised) every process must make the same
    calls: at a re-solve the sums are merged, rank 0 solves, and all take its assignment, or raise its error.

    With `background=True` a re-solve runs in a thread of rank 0 while training goes on under the old assignment. The
    new one is taken `lag` batches later, by then at the latest waited for: so that runs repeat exactly, and resume
    exactly from a checkpoint that was saved in between. What falls due meanwhile begins after that. The solver's error
    is raised where its answer would have been taken. What would hold Python's lock for long runs in a process of its
    own. An answer that is still to be taken when training ends is dropped. The re-solve that ends the warm-up is not in
    the background.

    Each re-solve after the first starts from the prices of the one before (`solve_assignment`).

    Where a model has several DL2PA heads (a distilled one), the first is observed, and all get its assignment.

    `history` lists what each re-solve did.

    Args:
        model: A wrapped model (also inside DistributedDataParallel or torch.compile), or a head.
        interval: Re-solve after every so many batches, or after each 'epoch', of which `epoch_end()` tells. Or a
            `Schedule`, or its text: '100:1000,1000' is after every 100 batches up to the 1,000th, then every 1,000.
        start: No re-solve falls due before so many batches (epochs, if `interval` counts those).
        stop: None falls due after so many batches (epochs); 0 keeps the assignment static. Default: never stops.
        momentum: Factor on the class sums after each re-solve, from 0 (what was before is forgotten) to 1.
        warmup: Length of the warm-up in batches (epochs, if `interval` counts those), at least up to `start`; its end
            falls due as a re-solve does. Default: one interval, whole epochs rather than a few batches being what it
            takes. math.inf: until `end_warmup()`. 0: none, the paper's rule. With `stop=0` there is none.
        evenness: How strongly the warm-up keeps prototypes apart, at least 0; math.inf: exactly evenly. Default:
            (2 d / C)^2, at most 4 (`default_evenness`).
        min_gain: Least gain in the objective, as a share of its magnitude, below which nothing moves. The warm-up and
            its end are not held back.
        background: Solve in a thread, and take the answer later.
        lag: How many batches later.

    Raises:
        ValueError: The model has no DL2PA head, its heads differ, or a number is out of range.

    Example:
        >>> scheduler = AssignmentScheduler(model, interval=len(loader))
        >>> for images, labels in loader:
        ...     loss = criterion(model(images), labels)
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     update = scheduler.step(labels)     # None, or an AssignmentUpdate
    """

    def __init__(
            self,
            model: nn.Module,
            interval: int | str | Schedule = 'epoch',
            *,
            start: int = 0,
            stop: int | None = None,
            momentum: float = 0.5,
            warmup: float | None = None,
            evenness: float | None = None,
            min_gain: float = 0.0,
            background: bool = False,
            lag: int = 16,
    ):
        self.heads = heads_of(model)
        if not self.heads:
            raise ValueError(f'model ({type(model).__name__}) has no DL2PAHead: wrap it with wrap_dl2pa first.')
        schedule = Schedule.of(interval)
        if start < 0:
            raise ValueError(f'start must be at least 0, not {start}.')
        if stop is not None and stop < 0:
            raise ValueError(f'stop must be at least 0 or None, not {stop}.')
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum must be from 0 to 1, not {momentum}.')
        if warmup is None:
            warmup = schedule.stages[0][0]
        if not warmup >= 0:
            raise ValueError(f'warmup must be at least 0, not {warmup}.')
        if evenness is not None:
            check_evenness(evenness)
        if not 0 <= min_gain < 1:
            raise ValueError(f'min_gain must be a share from 0 to below 1, not {min_gain}.')
        if lag < 1:
            raise ValueError(f'lag must be at least 1, not {lag}.')
        head = self.heads[0]
        for other in self.heads[1:]:
            if other.num_classes != head.num_classes or not torch.equal(other.prototypes, head.prototypes):
                raise ValueError('the DL2PA heads of the model differ in classes or prototypes, so that they cannot '
                                 'share an assignment: make a scheduler for each head.')
        if evenness is None:
            evenness = default_evenness(head.num_classes, head.dim)
        if stop != 0 and warmup > 0 and evenness == math.inf and head.num_classes * len(head.prototypes) > MAX_SCORES:
            warnings.warn(f'{head.num_classes} classes are too many for the rotation at the end of the warm-up, which '
                          f'will raise. Leave the warm-up out (warmup=0), or keep the assignment static (stop=0).',
                          stacklevel=2)
        self.interval = interval
        self.schedule = schedule
        self.start = start
        self.stop = stop
        self.momentum = momentum
        self.warmup = warmup
        self.evenness = evenness
        self.min_gain = min_gain
        self.background = background
        self.lag = lag
        self.steps = 0
        self.epochs = 0
        self.history: list[AssignmentUpdate] = []
        self.class_means = ClassMeans(head.num_classes, head.dim, head.prototypes.device)
        self._due = False
        self._pending: _Pending | None = None
        self._prices: torch.Tensor | None = None
        self._embeddings: torch.Tensor | None = None
        head.observer = self._observe
        self._running: RunningClassMeans | None = None
        self._placement: PrototypePlacement | None = None
        on = warmup > 0 and stop != 0
        self._set_warmup(running=on and evenness == math.inf, placement=on and evenness < math.inf)

    @property
    def warming_up(self) -> bool:
        """Whether prototypes are being placed, or class means stand in for them."""
        return self._running is not None or self._placement is not None

    def end_warmup(self) -> None:
        """Have the re-solve that ends the warm-up fall due now, whatever `warmup` says. Afterwards it does nothing."""
        self._due |= self.warming_up

    def skip_warmup(self) -> None:
        """End the warm-up without a re-solve, and forget the class sums: the assignment in force is a good one."""
        self._set_warmup()
        self._due = False
        self._pending = self._prices = None
        self.class_means.reset()

    def _set_warmup(self, running: bool = False, placement: bool = False) -> None:
        head, device = self.heads[0], self.heads[0].prototypes.device
        self._running = RunningClassMeans(head.num_classes, head.dim, device=device) if running else None
        self._placement = PrototypePlacement(head.num_classes, self.evenness, device=device) if placement else None
        for head in self.heads:
            head.placing = placement
        self._give_vectors()

    def _give_vectors(self) -> None:
        # A new tensor each time: the old one may be needed for a backward pass that is still to come.
        vectors = None if self._running is None else self._running.directions()
        for head in self.heads:
            head.warmup_vectors = vectors

    def _observe(self, embeddings: torch.Tensor) -> None:
        self._embeddings = embeddings

    def step(self, targets: torch.Tensor) -> AssignmentUpdate | None:
        """Fold in the batch of the last forward in training mode; before that, run the re-solve that is due, if any.

        Costs O(B d), and a pass over soft targets; apart from a re-solve it never waits for the device.

        Args:
            targets: The batch's class indices (B,), or soft targets (B, C) as timm's mixup makes them.

        Returns:
            What the re-solve did, or None if none was due.

        Raises:
            RuntimeError: No forward in training mode came since the last step.
            ValueError: The targets do not fit the embeddings. Or, at a re-solve: targets were out of range or
                embeddings not finite (the class is named). The assignment stays as it was, and so do the class sums:
                `class_means.reset()` drops them, for those who want to go on.
        """
        embeddings = self._embeddings
        if embeddings is None:
            raise RuntimeError(
                'step() found no embeddings: call it once after each forward of the model in training mode. (Another '
                'scheduler on the same model takes them over; and a copy of a model reports to no scheduler.)')
        self.class_means.check_shapes(embeddings, targets)
        update = self.resolve_if_due()
        if self.class_means.sums.device != embeddings.device:
            self.class_means.to(embeddings.device)
        targets = targets.to(embeddings.device, non_blocking=True)
        self.class_means.add(embeddings, targets)
        if self._running is not None:
            self._running.to(embeddings.device).add(embeddings, targets)
            self._give_vectors()
        if self._placement is not None:
            head = self.heads[0]
            vectors = self._placement.to(embeddings.device).moved(
                head.class_prototypes, embeddings, targets, head.current_scale().detach())
            for head in self.heads:
                head.place(vectors)
        self._embeddings = None
        self.steps += 1
        if self.schedule.unit == 'batches':
            self._mark(self.steps)
        return update

    def epoch_end(self) -> None:
        """Tell that an epoch is over. With `interval='epoch'` a re-solve then is due at the next batch."""
        self.epochs += 1
        if self.schedule.unit == 'epochs':
            self._mark(self.epochs)

    def resolve_if_due(self) -> AssignmentUpdate | None:
        """Run the re-solve that is due, if any: `step` does so by itself.

        Call it before the forward of a batch for that batch to be trained under the new assignment already. In a
        distributed run every process must call it at the same point.

        Returns:
            What the re-solve did, or None if none was due; of one in the background, when it is taken.

        Raises:
            ValueError: Targets were out of range or embeddings not finite, as `step` says.
        """
        update = self._take() if self._pending is not None else None
        if not self._due or self._pending is not None:
            return update
        if not self.background or self.warming_up:
            return self._resolve()
        self._launch()
        return update

    def merge(self) -> None:
        """In a distributed run, move what every process summed to rank 0, whose `state_dict()` then is all there is.

        Every process must call it at the same point. Alone, it does nothing.
        """
        self.class_means.merge()

    def _mark(self, count: int) -> None:
        if self.warming_up:
            self._due |= count >= max(self.warmup, self.start)
        elif self.schedule.due(count):
            self._due |= count >= self.start and (self.stop is None or count <= self.stop)

    def _resolve(self) -> AssignmentUpdate:
        began = time.perf_counter()
        self.merge()
        result, prototypes = self._on_rank_0(self._solve)
        # While prototypes were placed they moved, and what was summed is of embeddings that followed them.
        self.class_means.decay(0.0 if self._placement is not None else self.momentum)
        if self.warming_up:
            self._set_warmup()
        self._due = False
        return self._apply(result, prototypes, self.steps, self.epochs, time.perf_counter() - began)

    def _launch(self) -> None:
        """Begin a re-solve in the background."""
        self.merge()
        self._on_rank_0(self.class_means.check)
        self._pending = _Pending(self.steps, self.epochs, self.steps + self.lag,
                                 self.class_means.sums.clone() if _rank() == 0 else None)
        self._start_solver()
        self.class_means.decay(self.momentum)
        self._due = False

    def _start_solver(self) -> None:
        pending, head = self._pending, self.heads[0]
        if pending.sums is None:
            return
        # A copy: what is loaded into the model meanwhile goes to the same memory.
        sums, prototypes, start = pending.sums, head.prototypes.clone(), self._in_force()

        def solve() -> tuple[AssignmentResult, float]:
            began = time.perf_counter()
            result = self._match(directions_of(sums), prototypes, start)
            return result, time.perf_counter() - began

        pending.solver = Background(solve)

    def _take(self) -> AssignmentUpdate | None:
        """Take the answer of the re-solve in the background, if its time has come."""
        pending = self._pending
        if pending.solver is None:
            self._start_solver()  # resumed from a checkpoint
        if self.steps < pending.take_at:
            return None
        self._pending = None
        result, seconds = self._on_rank_0(lambda: pending.solver.result())
        return self._apply(result, None, pending.step, pending.epoch, seconds)

    def _apply(self, result: AssignmentResult, prototypes: torch.Tensor | None, step: int, epoch: int,
               seconds: float) -> AssignmentUpdate:
        for head in self.heads:
            head.assign(result.assignment, prototypes)
        self._prices = result.prices
        update = AssignmentUpdate(step=step, epoch=epoch, moved=result.moved, objective_before=result.objective_before,
                                  objective=result.objective, seconds=seconds)
        self.history.append(update)
        return update

    @staticmethod
    def _on_rank_0(function: Callable[[], Any]) -> Any:
        """Return on every process what the function returns on rank 0, or raise its error."""
        answer: list[Any] = [None]
        if _rank() == 0:
            try:
                answer = [function()]
            except Exception as error:
                # Raised below, after the others have heard of it: they would wait forever.
                answer = [error]
        if _distributed():
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _in_force(self) -> AssignmentResult:
        """Return the assignment in force, with the prices of the last re-solve."""
        nothing = float('nan')
        return AssignmentResult(self.heads[0].assignment.cpu(), 0, nothing, nothing, prices=self._prices)

    def _match(self, means: torch.Tensor, prototypes: torch.Tensor, start: AssignmentResult) -> AssignmentResult:
        """Return the best assignment, or the one in force if the gain is too small."""
        result = solve_assignment(class_means=means, prototypes=prototypes, start=start)
        if result.objective - result.objective_before < self.min_gain * abs(result.objective):
            result = replace(result, assignment=start.assignment, moved=0, objective=result.objective_before,
                             exact=result.exact and result.moved == 0)
        return result

    def _solve(self) -> tuple[AssignmentResult, torch.Tensor | None]:
        """Return the assignment and, at the end of an even warm-up, the rotated prototypes."""
        self.class_means.check()
        head = self.heads[0]
        if self._placement is not None:
            objective = float((self.class_means.directions() * head.class_prototypes.cpu().double()).sum())
            return AssignmentResult(head.assignment.cpu(), 0, objective, objective), None
        if self._running is None:
            return self._match(self.class_means.directions(), head.prototypes, self._in_force()), None
        means = self._running.directions()
        aligned = align_prototypes(means, head.prototypes, seed=head.config.seed)
        before = head.assignment.cpu()
        return AssignmentResult(
            assignment=aligned.assignment,
            moved=int((aligned.assignment != before).sum()),
            objective_before=float((means.double() * head.class_prototypes.double()).sum()),
            objective=aligned.objective,
        ), aligned.prototypes

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: tensors on the CPU and plain numbers (`torch.load` with `weights_only=True`).

        Assignment and prototypes are in the model's state dict. In a distributed run each process has sums of its own:
        call `merge()` on every process first, save rank 0's state, and load that on all.
        """
        history = [asdict(update) for update in self.history]
        return {
            'steps': self.steps,
            'epochs': self.epochs,
            'due': self._due,
            'history': history,
            'prices': None if self._prices is None else self._prices.clone(),
            'pending': self._pending and self._pending.state_dict(),
            'running': None if self._running is None else self._running.state_dict(),
            'placement': None if self._placement is None else self._placement.state_dict(),
            **self.class_means.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            ValueError: It is of a head with other numbers of classes or dimensions. Nothing was changed.
        """
        steps, epochs, due = state['steps'], state['epochs'], state['due']
        history = [AssignmentUpdate(**update) for update in state['history']]
        # States of version 0.1.0 have none of these.
        running, placement = state.get('running'), state.get('placement')
        prices, pending = state.get('prices'), state.get('pending')
        if prices is not None and len(prices) != len(self.heads[0].prototypes):
            raise ValueError(f'the saved prices are of {len(prices)} prototypes, not '
                             f'{len(self.heads[0].prototypes)}: they are of another head.')
        self.class_means.load_state_dict(state)
        self._set_warmup(running=running is not None, placement=placement is not None)
        if placement is not None:
            self._placement.load_state_dict(placement)
        if running is not None:
            self._running.load_state_dict(running)
            self._give_vectors()
        self.steps, self.epochs, self._due, self.history = steps, epochs, due, history
        self._embeddings = None
        self._prices = None if prices is None else prices.clone()
        self._pending = None if pending is None else _Pending(
            **{**pending, 'sums': pending['sums'].clone() if _rank() == 0 else None})


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
