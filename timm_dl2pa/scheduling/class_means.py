"""Streaming mean directions of classes, from the embeddings of training batches."""
import torch
import torch.distributed as dist

from ..distributed import add_over_ranks, is_distributed, rank
from ..head import MANY_CLASSES, first_of_each
from ..values import whole_number
from .gathering import Gathering
from .targets import IGNORED, check_targets, shares_of

__all__ = ['ClassMeans', 'MovingClassMeans', 'directions_of', 'make_class_means']


def directions_of(sums: torch.Tensor) -> torch.Tensor:
    """Return the directions of sums (C, d), float64 on the CPU: unit rows, zero where a sum is."""
    directions = sums.to('cpu', torch.float64, copy=True)
    lengths = directions.norm(dim=1, keepdim=True)
    return directions.div_(torch.where(lengths > 0, lengths, 1.0))


class ClassMeans:
    """Keeps a running sum of unit embeddings for each class; its direction is the class mean m_c.

    Between two calls of `decay` the sum is plain, so that it does not depend, beyond float32 rounding, on how the
    samples fell into batches or onto processes. It stays linear, so that the sums of processes can be added up; its
    direction is taken when needed.

    In a distributed run each process sums its own samples, and `merge` moves everybody's onto rank 0.

    Args:
        num_classes: C.
        dim: d.
        device: Where the sums live, (C, d) float32.

    Example:
        >>> means = ClassMeans(num_classes=3, dim=2)
        >>> means.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> means.directions()[0]
        tensor([0.7071, 0.7071], dtype=torch.float64)
    """

    def __init__(self, num_classes: int, dim: int, device: torch.device | str | None = None):
        self.num_classes: int = whole_number('num_classes', num_classes, least=1)
        self.dim: int = whole_number('dim', dim, least=1)
        self.sums: torch.Tensor = torch.zeros(self.num_classes, self.dim, device=device, dtype=torch.float32)
        # Smallest and largest hard label seen, kept on the device: reading them at every step would wait for it.
        self.label_range: torch.Tensor = torch.tensor([0, 0], device=device)
        # How many samples came since the last `decay`, and how many of them were left out as not finite.
        self.tally: torch.Tensor = torch.tensor([0, 0], device=device)

    def to(self, device: torch.device | str) -> 'ClassMeans':
        """Move the sums, in place."""
        self.sums = self.sums.to(device)
        self.label_range = self.label_range.to(device)
        self.tally = self.tally.to(device)
        return self

    @torch.no_grad()
    def add(self, embeddings: torch.Tensor, targets: torch.Tensor, weight: float = 1.0) -> None:
        """Fold a batch in. Costs O(B d), and a pass over soft targets; never waits for the device.

        Args:
            embeddings: (B, d), unit rows, float32.
            targets: Class indices (B,), where -100 marks a sample that is left out; or soft targets (B, C) as mixup and
                cutmix make them: of each row, the two largest entries count, by how far they rise above the row's
                smallest, which takes out the constant that label smoothing adds. Each sample has the same weight.
                (With C = 2 a mixed sample is one of its main class: there the other share cannot be told from
                smoothing.)
            weight: Of each sample.

        Raises:
            ValueError: The shapes do not fit. Labels out of range and values that are not finite are found by `check`.
        """
        check_targets(targets, embeddings, self.num_classes)
        if len(targets) == 0:
            return
        self._note_labels(targets)
        for labels, share in shares_of(targets, self.num_classes):
            # A share of zero must not carry a NaN of the embedding into a class that the sample is not of.
            self.sums.index_add_(0, labels, torch.where(share != 0, share * embeddings, 0.0), alpha=weight)

    def _note_labels(self, targets: torch.Tensor) -> None:
        if targets.ndim == 1:
            labels = targets.long()
            lowest, highest = torch.aminmax(torch.cat([labels.where(labels != IGNORED, 0), self.label_range]))
            self.label_range = torch.stack([lowest, highest])

    def count(self, tally: torch.Tensor) -> None:
        """Add to the numbers of samples, and of those left out as not finite: (2,) int64, on the sums' device."""
        self.tally += tally

    def reset(self) -> None:
        """Forget all samples."""
        self.sums.zero_()
        self.label_range.zero_()
        self.tally.zero_()

    def check(self) -> int:
        """Return how many samples were left out as not finite since the last `decay`. Waits for the device.

        Raises:
            ValueError: They were all, a sum is not finite, or a label was out of range. The class is named.
        """
        lowest, highest = self.label_range.tolist()
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(f'targets contained class {lowest if lowest < 0 else highest}, '
                             f'outside 0..{self.num_classes - 1}.')
        broken = (~torch.isfinite(self.sums).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            more = f' (and of {len(broken) - 1} more)' if len(broken) > 1 else ''
            raise ValueError(f'embeddings or targets of class {broken[0]}{more} were not finite: the training has '
                             f'diverged, or its input holds NaN. The assignment was left as it is.')
        samples, left_out = self.tally.tolist()
        if left_out and left_out == samples:
            raise ValueError(f'the embeddings or targets of all {samples} samples since the last re-solve were not '
                             f'finite: the training has diverged, or its input holds NaN. The assignment was left as '
                             f'it is.')
        return left_out

    def directions(self) -> torch.Tensor:
        """Return the class means (C, d), float64 on the CPU: unit rows, zero for a class without samples."""
        return directions_of(self.sums)

    def decay(self, momentum: float) -> None:
        """Multiply what was summed so far by `momentum`, 0 to 1, and count samples anew."""
        self.sums *= momentum
        self.tally.zero_()

    def merge(self) -> None:
        """Move the sums of all processes to rank 0. Every process must call it; alone, it does nothing."""
        if is_distributed():
            dist.reduce(self.sums, dst=0)
            self._merge_counts()
            if rank() != 0:
                self.sums.zero_()

    def _merge_counts(self) -> None:
        extremes = torch.stack([-self.label_range[0], self.label_range[1]])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        self.label_range = torch.stack([-extremes[0], extremes[1]])
        dist.reduce(self.tally, dst=0)
        if rank() != 0:
            self.tally.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums (C, d) float32, the range of labels and the tally, (2,) int64, as copies on the CPU."""
        return {'sums': self.sums.cpu().clone(), 'label_range': self.label_range.cpu().clone(),
                'tally': self.tally.cpu().clone()}

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raise a ValueError unless a state has all entries, and those of as many classes and dimensions."""
        missing = sorted(self.state_dict().keys() ^ state.keys())
        if missing:
            raise ValueError(f'the saved class means lack, or do not know, {", ".join(missing)}: they are of another '
                             f'recipe.')
        if state['sums'].shape != self.sums.shape:
            raise ValueError(f'the saved class means have the shape {tuple(state["sums"].shape)}, '
                             f'not {tuple(self.sums.shape)}: they are of another head.')

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state. In a distributed run, all processes may load the same one: rank 0 keeps it.

        Raises:
            ValueError: See `check_state`. Nothing was changed.
        """
        self.check_state(state)
        self._take(state)
        if rank() != 0:
            self.sums.zero_()

    def _take(self, state: dict[str, torch.Tensor]) -> None:
        self.sums = state['sums'].to(self.sums.device, torch.float32, copy=True)
        self.label_range = state['label_range'].to(self.label_range.device, torch.int64, copy=True)
        self.tally = state['tally'].to(self.tally.device, torch.int64, copy=True)
        if rank() != 0:
            self.tally.zero_()


class MovingClassMeans(ClassMeans):
    """An exponential moving average of each class's unit embeddings: DL2PA, section 3.2, with `memory` 0.9.

    A class's sum and its count are multiplied by `memory` for each of its new samples, so that about the last
    `1 / (1 - memory)` samples count. Every process of a distributed run has the same averages: each batch is added up
    over the processes.

    Args:
        num_classes: C.
        dim: d.
        memory: Factor for each sample, from 0 to 1.
        device: Where the sums (C, d) and the counts (C,) live, float32.
    """

    def __init__(self, num_classes: int, dim: int, memory: float = 0.9, device: torch.device | str | None = None):
        super().__init__(num_classes, dim, device)
        self.memory = memory
        self._gathering = Gathering()
        self.counts: torch.Tensor = torch.zeros(num_classes, device=device, dtype=torch.float32)

    def to(self, device: torch.device | str) -> 'MovingClassMeans':
        """Move sums and counts, in place."""
        super().to(device)
        self.counts = self.counts.to(device)
        return self

    @torch.no_grad()
    def add(self, embeddings: torch.Tensor, targets: torch.Tensor, weight: float = 1.0) -> None:
        """Fold a batch in, as `ClassMeans.add` does. In a distributed run every process must call it, also with no
        samples. The weight has no effect: the latest samples count most as it is."""
        check_targets(targets, embeddings, self.num_classes)
        if len(targets) > 0:
            self._note_labels(targets)
        parts = list(shares_of(targets, self.num_classes))
        labels, shares = (torch.cat(part) for part in zip(*parts))
        embeddings = embeddings.float().repeat(len(parts), 1)
        if self.num_classes > MANY_CLASSES:
            _, (labels, shares, embeddings) = self._gathering(labels, shares, embeddings)
        elif is_distributed():
            self._add_over_ranks(labels, shares, embeddings)
            return
        # The rows of the batch's classes alone: nothing here grows with the number of classes.
        first = first_of_each(labels)
        counts = torch.zeros_like(shares).index_add_(0, first, shares)
        sums = torch.zeros_like(embeddings).index_add_(0, first, torch.where(shares != 0, shares * embeddings, 0.0))
        kept = self.memory ** counts
        self.sums.index_copy_(0, labels, (kept * self.sums[labels] + sums)[first])
        self.counts.index_copy_(0, labels, (kept * self.counts[labels].unsqueeze(1) + counts)[first].squeeze(1))

    def _add_over_ranks(self, labels: torch.Tensor, shares: torch.Tensor, embeddings: torch.Tensor) -> None:
        sums = torch.zeros_like(self.sums).index_add_(0, labels, torch.where(shares != 0, shares * embeddings, 0.0))
        counts = torch.zeros_like(self.counts).index_add_(0, labels, shares.squeeze(1))
        add_over_ranks(sums, counts)
        kept = self.memory ** counts
        self.sums.mul_(kept.unsqueeze(1)).add_(sums)
        self.counts.mul_(kept).add_(counts)

    def centred_directions(self) -> torch.Tensor:
        """Return the unit directions (C, d), float32, in which the class means lie from their mean.

        In a young network all embeddings lie in a narrow cone: what tells classes apart is where they lie in it.
        Classes without samples have rows of zeros.
        """
        seen = (self.counts > 0).unsqueeze(1)
        means = self.sums / torch.where(seen, self.counts.unsqueeze(1), 1.0)
        centre = means.sum(dim=0) / seen.sum().clamp_min(1)
        return torch.nn.functional.normalize(torch.where(seen, means - centre, 0.0), dim=1)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self.counts.zero_()

    def decay(self, momentum: float) -> None:
        """Multiply sums and counts by `momentum`, 0 to 1."""
        super().decay(momentum)
        self.counts *= momentum

    def merge(self) -> None:
        """Merge range of labels and tally. The averages are the same on every process already."""
        if is_distributed():
            self._merge_counts()

    def state_dict(self) -> dict[str, torch.Tensor | float]:
        """Return sums (C, d), counts (C,), float32, range of labels and tally, (2,) int64, on the CPU, and `memory`."""
        return {**super().state_dict(), 'counts': self.counts.cpu().clone(), 'memory': self.memory}

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        """See `ClassMeans.check_state`; `memory` must be the same."""
        super().check_state(state)
        if state['memory'] != self.memory:
            raise ValueError(f'the saved class means have the memory {state["memory"]}, not {self.memory}.')
        if tuple(state['counts'].shape) != (self.num_classes,):
            raise ValueError(f'the saved counts have the shape {tuple(state["counts"].shape)}, not '
                             f'({self.num_classes},): they are of another head.')

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state; all processes load the same one.

        Raises:
            ValueError: See `check_state`. Nothing was changed.
        """
        self.check_state(state)
        self._take(state)
        self.counts = state['counts'].to(self.counts.device, torch.float32, copy=True)


def make_class_means(
        num_classes: int,
        dim: int,
        memory: float | None,
        device: torch.device | str | None = None,
) -> ClassMeans:
    """Return `ClassMeans`, or with a `memory` `MovingClassMeans`."""
    if memory is None:
        return ClassMeans(num_classes, dim, device)
    return MovingClassMeans(num_classes, dim, memory, device)
