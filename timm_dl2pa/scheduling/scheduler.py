"""AssignmentScheduler: keeps class means during training and re-solves the assignment from them."""
import math
from typing import Any

import torch
import torch.nn as nn

from ..distributed import check_on_every_rank, is_distributed
from ..head import DL2PAHead, heads_of, leave_out_of_broadcasts
from ..losses.targets import as_labels
from ..recipes import Recipe, RecipeName, WarmupName, find_recipe
from ..values import checked_value
from .checks import check_heads, check_numbers, check_same_classes, check_scheduler_state, settled_by_pinned
from .class_means import ClassMeans, make_class_means
from .clock import Clock, Duration
from .forwards import Forwards
from .resolver import Resolver
from .schedule import Schedule
from .targets import IGNORED, check_targets, check_values, samples_that_count
from .update import AssignmentUpdate
from .warmup import Warmup
from .warmups import warmup_maker
from .watch import LoopWatch

__all__ = ['AssignmentScheduler']


class AssignmentScheduler:
    """Step 2 of DL2PA: now and then, assigns prototypes by the class means, `a <- argmax sum_c <m_c, p_a(c)>`.

    Call `step(targets)` once after each training batch's forward (and backward): it takes the embeddings of the head's
    forward in training mode. Where there were several, say which: `step(targets, output)`. A re-solve that falls due is
    only marked: it runs at the next `step`, before that batch is folded in. So a checkpoint holds the assignment that
    its metric was measured with.

    The recipe decides the warm-up, after which labels alone move, and the class means. 'placed' moves prototypes with
    their classes for 90 % of the training; 'even' rotates the evenly spread set once; 'paper' matches from the start,
    by the paper's moving average. The class means of the first two are running sums, which do not depend on how samples
    fall into batches or processes. In a distributed run every process must make the same calls. Of several heads the
    first is observed, and all get its assignment. A second scheduler on a model takes the place of the first.

    Of a head that is pinned (`wrap_dl2pa(head=...)`) nothing changes: there is no warm-up, and no re-solve (`stop=0`).

    Args:
        model: A wrapped model (also inside DistributedDataParallel or torch.compile), or a head.
        interval: Number of batches between re-solves, or 'epoch' (told by `epoch_end()`), a `Schedule` or its text. A
            whole interval passes between the end of the warm-up and the first re-solve.
        recipe: 'placed', 'even' or 'paper'. Default: the head's.
        total: Length of the training, which shares refer to: its number of batches, or '20 epochs'.
        warmup: 'placed', 'rotated' or 'none'. Default: the recipe's.
        warmup_length: Number of batches, '5 epochs', 'half' or '30 %' of the training, or math.inf: until
            `end_warmup()`. Default: the recipe's. Where that is a share and there is no `total`, 'placed' lasts until
            `end_warmup()`, and 'rotated' for one interval.
        evenness: For 'placed', how strongly prototypes are kept apart. Default: `default_evenness`.
        start: Batches (epochs, if `interval` counts those) before which no re-solve falls due.
        stop: Those after which none does. 0 keeps the assignment static, without a warm-up. Default: never stops.
        momentum: Factor on the class sums after each re-solve, from 0 (forget) to 1. Default: the recipe's.
        min_gain: Least gain in the objective, as a share of its magnitude, below which nothing moves.
        background: Solve in a thread of rank 0 while training goes on.
        lag: After how many batches its answer is taken: always the same number, so that runs repeat exactly.
        ignore_index: The label of samples that are left out, as in torch's losses.

    Raises:
        ValueError: The model has no DL2PA head, its heads differ, an argument is out of range, or the head is pinned
            and a warm-up or re-solves are asked for.

    Example:
        >>> scheduler = AssignmentScheduler(model, interval=len(loader), total=20 * len(loader))
        >>> for images, labels in loader:
        ...     criterion(model(images), labels).backward(); optimizer.step(); optimizer.zero_grad()
        ...     update = scheduler.step(labels)     # None, or an AssignmentUpdate
    """

    start: int
    stop: int | None
    momentum: float
    ignore_index: int

    def __init__(self, model: nn.Module, interval: int | str | Schedule = 'epoch', *, recipe: RecipeName | None = None,
                 total: int | str | None = None, warmup: WarmupName | None = None,
                 warmup_length: float | str | None = None, evenness: float | None = None, start: int = 0,
                 stop: int | None = None, momentum: float | None = None, min_gain: float = 0.0,
                 background: bool = False, lag: int = 16, ignore_index: int = IGNORED):
        self.heads: list[DL2PAHead] = check_heads(model, heads_of(model))
        head = self.heads[0]
        self.recipe: Recipe = find_recipe(head.config.recipe if recipe is None else recipe)
        warmup, stop = settled_by_pinned(head, warmup, stop)
        self.start, self.stop, self.momentum, self.ignore_index = check_numbers(
            start, stop, self.recipe.momentum if momentum is None else momentum, ignore_index)
        self.schedule: Schedule = Schedule.of(interval)
        self.background: bool = checked_value('background', background, bool)
        self.clock: Clock = Clock(total)
        self._recipe_length = Duration.of(self.recipe.warmup_length)  # read once: each batch of a warm-up asks
        self._given_length = None if warmup_length is None else Duration.of(warmup_length, 'warmup_length')
        self.resolver: Resolver = Resolver(self.heads, min_gain=min_gain, lag=lag)
        warmup = 'none' if self.stop == 0 else self.recipe.warmup if warmup is None else warmup
        self._make_warmup = warmup_maker(warmup, self.heads, evenness)
        self.warmup: Warmup | None = self._make_warmup()
        # Moved prototypes are good at any time; a rotation is good for nothing until it is done.
        self._may_last = self.warmup is not None and self.warmup.moves_prototypes
        self.class_means: ClassMeans = make_class_means(
            head.num_classes, head.dim, self.recipe.memory, head.prototypes.device)
        self.due: bool = False  # whether a re-solve waits for the next batch
        self._forwards = Forwards(head.num_classes, head.dim)
        self._watch = LoopWatch(needs_epochs='epochs' in (self.schedule.unit, self.warmup_length.unit))
        self._values_checked = False
        leave_out_of_broadcasts(model)
        for each in self.heads:
            each.training_view.attach(self)
        head.training_view.on_forward, head.training_view.on_mode = self._observe, self._watch.on_mode
        if self.warmup:
            self.warmup.begin()

    @property
    def steps(self) -> int:
        """Number of batches that were folded in."""
        return self.clock.batches

    @property
    def epochs(self) -> int:
        """Number of epochs that are over."""
        return self.clock.epochs

    @property
    def history(self) -> list[AssignmentUpdate]:
        """The updates, in their order."""
        return self.resolver.history

    @property
    def warming_up(self) -> bool:
        """Whether the warm-up is under way."""
        return self.warmup is not None

    @property
    def warmup_length(self) -> Duration:
        """Length of the warm-up: given; or the recipe's, if the clock measures that; else the warm-up's own."""
        interval = Duration(self.schedule.stages[0][0], self.schedule.unit)
        if self._given_length or self.clock.measures(self._recipe_length, interval):
            return self._given_length or self._recipe_length
        return Duration(math.inf) if self._may_last else interval

    def _observe(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        self._forwards.add(embeddings, output)
        if not torch.compiler.is_compiling():
            self._watch.on_forward()

    def step(self, targets: torch.Tensor, embeddings: torch.Tensor | None = None) -> AssignmentUpdate | None:
        """Fold in a batch of training; before that, `resolve_if_due`.

        Costs O(B d), and a pass over soft targets. Values of targets are checked in the first batch, on the CPU and in
        one process in each; later labels out of range are found by the re-solve. Apart from the first batch and a
        re-solve it never waits for the device. Samples whose embedding or targets are not finite, as where a
        mixed-precision training skips a batch, are left out and counted (`AssignmentUpdate.left_out`).

        Args:
            targets: The batch's class indices (B,), where `ignore_index` marks samples to leave out; or soft targets
                (B, C), as timm's mixup makes them or a teacher's probabilities: the two largest entries of each row
                count, by how far they rise above its smallest.
            embeddings: What the targets are for, if there were several forwards in training mode since the last step
                (SAM, consistency losses, FixMatch): the output of one, or a slice of it; or unit embeddings (B, d).
                The other forwards do not count.

        Raises:
            RuntimeError: No forward in training mode came since the last step, or several, and `embeddings` is None; or
                the model has got classes since (`add_classes`).
            ValueError: The targets do not fit the embeddings, are out of range, or do not sum to one.
        """
        check_same_classes(self.heads[0], self.class_means.num_classes)
        embeddings = self._forwards.embeddings_of(embeddings)
        targets, num_classes = as_labels(targets), self.class_means.num_classes
        check_targets(targets, embeddings, num_classes)
        if not self._values_checked:
            check_on_every_rank(lambda: check_values(targets, num_classes, self.ignore_index), embeddings.device)
            self._values_checked = True
            self._copy_heads_from_rank_0()
        elif targets.device.type == 'cpu' and not is_distributed():  # where one process alone raises, the others wait
            check_values(targets, num_classes, self.ignore_index)
        update = self.resolve_if_due()
        targets = targets.to(embeddings.device, non_blocking=True)
        embeddings, targets, tally = samples_that_count(embeddings, targets, self.ignore_index)
        weight = self.warmup.weight(self.steps) if self.warmup else 1.0
        self.class_means.to(embeddings.device).add(embeddings, targets, weight)
        self.class_means.count(tally)
        if self.warmup:
            self.warmup.add(embeddings, targets, self.clock.share_of(self.warmup_length))
        for head in self.heads:
            head.restore_scale()
        self._forwards.clear()
        self._watch.on_step(len(targets))
        self._count('batches')
        return update

    def epoch_end(self) -> None:
        """Tell that an epoch is over. With `interval='epoch'` a re-solve then is due at the next batch."""
        self._watch.on_epoch()
        self._count('epochs')

    def announce_epochs(self) -> None:
        """Tell that `epoch_end()` will come, as a callback does: then no warning says that the loop leaves it out."""
        self._watch.on_epoch()

    def _count(self, unit: str) -> None:
        count = self.clock.count(unit)
        if not self.warmup and self.schedule.unit == unit and self.schedule.due(count, self.clock.since_settled(unit)):
            self.due |= count >= self.start and (self.stop is None or count <= self.stop)

    def resolve_if_due(self) -> AssignmentUpdate | None:
        """Run the re-solve that is due, if any, and return what it did; of one in the background, when it is taken.

        `step` calls it. Call it before a forward for that batch to be trained under the new assignment already.

        Raises:
            ValueError: Targets were out of range or embeddings not finite (the class is named). Assignment and class
                sums stay as they were; `class_means.reset()` drops the sums.
        """
        check_same_classes(self.heads[0], self.class_means.num_classes)
        update = self.resolver.take(self.steps)
        self.due |= self.warming_up and self.clock.reached(self.warmup_length)
        if not self.due or self.resolver.pending is not None:
            return update
        self.merge()
        if self.background and not self.warmup:
            self.resolver.launch(self.class_means, self.clock)
        else:
            update = self.resolver.resolve(self.class_means, self.clock, self.warmup)
            if self.warmup:
                self._copy_heads_from_rank_0()
        self.class_means.decay(0.0 if self.warmup and self.warmup.moves_prototypes else self.momentum)
        self.leave_warmup()
        return update

    def _copy_heads_from_rank_0(self) -> None:
        """Let all processes have the same prototypes and assignment, whoever loaded what and rounded how."""
        for head in self.heads:
            head.copy_from_rank_0()

    def leave_warmup(self) -> None:
        """End the warm-up, if there is one. Nothing is solved, and nothing is due for a whole interval."""
        if self.warmup:
            self.warmup.end()
            self.clock.settle()
        self.warmup, self.due = None, False

    def end_warmup(self) -> None:
        """Let the warm-up end at the next batch, whatever its length: from then on prototypes are fixed."""
        self.due |= self.warming_up

    def skip_warmup(self) -> None:
        """End the warm-up without a re-solve, and forget the class sums: the assignment in force is a good one."""
        self.leave_warmup()
        self.resolver.reset()
        self.class_means.reset()

    def drop_forwards(self) -> None:
        """Forget the forwards since the last step: they were no training, and no step is for them."""
        self._forwards.clear()
        self._watch.on_drop()

    def merge(self) -> None:
        """Move the class sums of all processes to rank 0, for its `state_dict()`. Every process must call it."""
        self.class_means.to(self.heads[0].prototypes.device).merge()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the model's state dict: tensors on the CPU and plain numbers.

        In a distributed run call `merge()` on every process first, save rank 0's state, and load that on all.
        """
        return {'clock': self.clock.state_dict(), 'due': self.due, 'resolver': self.resolver.state_dict(),
                'class_means': self.class_means.state_dict(), 'warmup': self.warmup and self.warmup.saved_state(),
                'held_scales': [head.config.held_scale for head in self.heads]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            ValueError: It lacks something, or is of another head, warm-up or class means. Nothing was changed.
        """
        warmup = self._make_warmup() if state.get('warmup') else None
        check_scheduler_state(self.state_dict(), state, clock=self.clock, class_means=self.class_means,
                              resolver=self.resolver, warmup=warmup)
        self.leave_warmup()
        self.warmup = warmup
        if warmup:
            warmup.resume(state['warmup'])
        self.class_means.load_state_dict(state['class_means'])
        self.resolver.load_state_dict(state['resolver'])
        self.clock.load_state_dict(state['clock'])
        self.due = state['due']
        for head, scale in zip(self.heads, state['held_scales']):
            head.hold_scale(scale)
        self._forwards.clear()
