"""FeatureSums: what a pass over images leaves of a head's features, whatever their number."""
import math
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import add_over_ranks, is_distributed, rank
from ..head import DL2PAHead
from .targets import check_values, samples_that_count, shares_of

__all__ = ['FeatureSums']

# Samples that are kept as they are: the standard error of an accuracy of 50 % is 1.8 points then.
_KEPT_SAMPLES = 768
# Kept samples by classes, at most: the scores of one setting.
_MAX_SCORES = 2 ** 24
_STATE = ('counts', 'sums', 'squares', 'tally', 'samples', 'labels', 'seen')


class FeatureSums:
    """Sums of a head's features (B, F), for each class and over all samples, and a random sample of the features.

    The memory is O(F^2 + C F). In a distributed run each process has its own, until `gather`.

    Args:
        head: Whose features they are.
        ignore_index: The label of samples that are left out.

    Attributes:
        counts: (C,) float64, samples of each class; soft targets count by their shares.
        sums: (C, F) float64.
        squares: (F, F) float64, the sum of outer products.
        tally: (2,) int64, how many samples came, without those to ignore, and how many were not finite.
        samples: (R, F) float32, a uniform sample of the features with one label each.
        labels: (R,) int64.
        seen: () int64, of how many it is.
    """

    def __init__(self, head: DL2PAHead, ignore_index: int):
        device = head.prototypes.device
        # MPS has no float64.
        kind: dict[str, Any] = dict(dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
        classes, width = head.num_classes, head.in_features
        self.num_classes = classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(classes, **kind)
        self.sums = torch.zeros(classes, width, **kind)
        self.squares = torch.zeros(width, width, **kind)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self.samples = torch.empty(0, width, dtype=torch.float32, device=device)
        self.labels = torch.empty(0, dtype=torch.int64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64)
        self._capacity = max(64, min(_KEPT_SAMPLES, _MAX_SCORES // classes))

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the features of a forward.

        Args:
            features: (B, F), or (B, N, F) of N patches to an image: each is a sample of the image's class.
            targets: (B,) int64, or (B, C).

        Raises:
            ValueError: They do not fit the features, or are out of range.
        """
        if targets.shape not in ((len(features),), (len(features), self.num_classes)):
            raise ValueError(f'targets must be class indices (B,) or soft targets (B, {self.num_classes}) for the '
                             f'{len(features)} images, not of the shape {tuple(targets.shape)}.')
        check_values(targets, self.num_classes, self.ignore_index)
        patches = math.prod(features.shape[1:-1])
        features = features.flatten(0, -2).to(self.sums)
        targets = targets.to(features.device).repeat_interleave(patches, dim=0)
        features, targets, tally = samples_that_count(features, targets, self.ignore_index)
        self.tally += tally
        shares = list(shares_of(targets, self.num_classes))
        for labels, share in shares:
            share = share.to(features)
            self.counts.index_add_(0, labels, share.squeeze(1))
            self.sums.index_add_(0, labels, share * features)
        self.squares.addmm_(features.t(), features)
        labels, share = shares[0]
        whole = share.squeeze(1) > 0.999  # mixed images have no label of their own
        self._keep(features[whole].float(), labels[whole])

    def _keep(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Fold samples into the uniform sample: of every `seen` samples each is kept with the same probability."""
        before = int(self.seen)
        self.seen += len(labels)
        room = self._capacity - len(self.labels)
        if room > 0:
            self.samples = torch.cat([self.samples, features[:room]])
            self.labels = torch.cat([self.labels, labels[:room]])
            features, labels, before = features[room:], labels[room:], before + len(features[:room])
        if not len(labels):
            return
        generator = torch.Generator().manual_seed(before)
        order = torch.arange(before + 1, before + 1 + len(labels), dtype=torch.float64)
        place = (torch.rand(len(labels), generator=generator, dtype=torch.float64, device='cpu') * order).long()
        for row in (place < self._capacity).nonzero().flatten().tolist():  # one after the other: places may repeat
            self.samples[place[row]], self.labels[place[row]] = features[row], labels[row]

    def gather(self) -> None:
        """Add up the processes' sums, and put their samples together. Every process must call it."""
        add_over_ranks(self.counts, self.sums, self.squares, self.tally)
        if not is_distributed():
            return
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self.labels.device)
        sizes[rank()] = len(self.labels)
        add_over_ranks(sizes)
        places = (len(sizes), int(sizes.max()))
        samples, labels = self.samples.new_zeros(*places, self.samples.shape[1]), self.labels.new_zeros(places)
        samples[rank(), :len(self.labels)], labels[rank(), :len(self.labels)] = self.samples, self.labels
        add_over_ranks(samples, labels)
        taken = torch.arange(places[1], device=sizes.device) < sizes.unsqueeze(1)
        self.samples, self.labels = samples[taken], labels[taken]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return sums and sample, as copies on the CPU."""
        return {name: getattr(self, name).cpu().clone() for name in _STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state. In a distributed run all processes load the same one, and rank 0 keeps it."""
        for name in _STATE:
            value = state[name].to(getattr(self, name), copy=True)
            if rank() != 0:
                value = value[:0] if name in ('samples', 'labels') else torch.zeros_like(value)
            setattr(self, name, value)
