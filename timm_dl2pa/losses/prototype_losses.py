"""The losses of cosines with prototypes: the paper's squared cosine, and its dot regression for long tails."""
import warnings
from typing import Literal

import torch

from ..head import MANY_CLASSES, NUM_SAMPLED, DL2PAHead
from ..values import real_number
from .head_loss import HeadLoss
from .targets import Reduction, reduced

__all__ = ['DotRegressionLoss', 'SquaredCosineLoss']



class _PrototypeLoss(HeadLoss):
    """The cosine of each sample with its target's prototype, from logits or from embeddings.

    A warm-up may need another loss, as the head's training view tells: where class vectors follow the embeddings, a
    loss of distances alone is least where all embeddings are one. Then it is the cross-entropy of the scaled cosines,
    without `weight`, and a warning says so once. For very many classes it samples them, where it takes embeddings.
    """

    def __init__(self, head: DL2PAHead, reduction: Reduction, weight: float,
                 class_weights: torch.Tensor | Literal['auto'] | None, ignore_index: int):
        if isinstance(head, DL2PAHead) and head.config.learn_scale:
            raise ValueError(f'{type(self).__name__} depends on cosines alone and would give the learned scale no '
                             f'gradient: make the head with learn_scale=False.')
        has_many = isinstance(head, DL2PAHead) and head.num_classes > MANY_CLASSES
        super().__init__(head, reduction, class_weights, ignore_index, NUM_SAMPLED if has_many else None)
        self._warned = False
        self.weight: float = real_number('weight', weight, 0, remedy='It is a factor on the whole loss: weights of the '
                                                                     'classes are class_weights.')

    def _needs_cross_entropy(self) -> bool:
        return self.head.training and self.head.training_view.warmup_loss == 'cross_entropy'

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f'{type(self).__name__} is the cross-entropy of the scaled cosines, without its weight, '
                          f'during the warm-up, in which class vectors follow the embeddings. To train without a '
                          f"warm-up, use recipe='paper' or warmup='none'.", stacklevel=4)

    def _cosines(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cosines in float32: (B,) with the target's prototype for hard targets, (B, C) for soft ones."""
        head = self.head
        soft = targets.ndim == 2
        labels = targets if soft else targets.where(targets != self.ignore_index, 0)
        if not self._takes_embeddings():
            chosen = output if soft else output.gather(1, labels.unsqueeze(1)).squeeze(1)
            return chosen.float() / head.current_scale()
        # Of hard targets the B rows alone: nothing here grows with the number of classes.
        return head.cosines(output) if soft else (output.float() * head.vectors_of(labels)).sum(dim=1)

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, float32: () or, with reduction 'none', (B,).

        Args:
            output: What the head returned: logits (B, C), or embeddings (B, d).
            targets: Class indices (B,), or soft targets (B, C).

        Raises:
            ValueError: The shapes or dtypes do not fit.
        """
        output, targets = self._checked(output, targets)
        weights = self.class_weights(targets)
        if self._needs_cross_entropy():
            self._warn_once()
            return self._cross_entropy(output, targets, weights)
        cosines = self._cosines(output, targets)
        if targets.ndim == 2:
            targets = self._shares(targets)
        factors = self._class_factors(targets)
        if weights is not None:
            factors = weights if factors is None else factors * weights
        losses = self.weight * self._expected((1.0 - cosines).square(), targets, factors)
        return reduced(losses, targets, self.reduction, weights, self.ignore_index)

    def _expected(self, squared: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """Return the mean of (B,) or (B, C) by the targets' shares, (B,), with factors (C,) for the classes."""
        if targets.ndim == 2:
            return (targets * squared if factors is None else targets * factors * squared).sum(dim=1)
        kept = targets != self.ignore_index
        squared = torch.where(kept, squared, 0.0)
        return squared if factors is None else factors[targets.where(kept, 0)] * squared

    def _shares(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the shares (B, C) that soft targets stand for."""
        return targets

    def _class_factors(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Return factors (C,) for the classes of a batch, or None."""
        return None

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, weight={self.weight:g}'


class SquaredCosineLoss(_PrototypeLoss):
    """Pulls each embedding to its class's prototype by `weight * (1 - cos(z, p_a(y)))^2`, the paper's balanced loss.

    (Of Hyperspherical Prototype Networks, Mettes et al. 2019.) The paper sums it over a batch of 128 and trains at the
    learning rate 0.01: that is `reduction='sum', weight=1`. By default it is the batch's mean times 30, which does not
    depend on the batch size and suits the usual learning rates of cross-entropy. Of the weights 1, 3, 10, 30 and 100 it
    was the best on average over SGD's learning rates 0.02 to 0.2 at batch 128 (`benchmarks/results/loss_grid.json`; one
    seed of a short training). The paper's sum over 128 samples at 0.01 equals a mean times 12.8 at 0.1.

    With soft targets (B, C) it is the expectation `sum_c t_c (1 - cos(z, p_a(c)))^2`, which needs the (B, C) cosines.
    With hard targets and a head that returns embeddings the cost does not depend on the number of classes.

    Args:
        head: The head whose output this takes. Held, but not registered: its parameters are not this module's.
        reduction: 'mean' or 'sum' over the batch, or 'none'.
        weight: Factor on the loss.
        class_weights: (C,) weights of the classes, or 'auto' for the inverse of their frequencies; see `ClassWeights`.
            The mean divides by the samples' weights, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: The label of samples that are left out.

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: The head's scale is learned, or an argument is out of range.

    Example:
        >>> head = DL2PAHead(in_features=512, num_classes=100, dim=50, recipe='paper')
        >>> criterion = SquaredCosineLoss(head, reduction='sum', weight=1.0)    # as the paper has it
        >>> loss = criterion(head(torch.randn(8, 512)), torch.arange(8))
    """

    def __init__(
            self,
            head: DL2PAHead,
            reduction: Reduction = 'mean',
            weight: float = 30.0,
            class_weights: torch.Tensor | Literal['auto'] | None = None,
            ignore_index: int = -100,
    ):
        super().__init__(head, reduction, weight, class_weights, ignore_index)


class DotRegressionLoss(_PrototypeLoss):
    """Gives each class that is present in a batch the same weight: dot regression, the paper's loss for long tails.

    `(h.m - |m| |h|)^2 / (2 |h|)` (Yang et al., NeurIPS 2022) with the unit embedding h and m = L_c p_a(c), where a
    class present n_c times in a batch of B has the squared length `L_c^2 = (B / number of classes present) / n_c`. As
    |h| = 1 it is `L_c^2 (1 - cos)^2 / 2`: the squared cosine loss, in which each class present weighs the same.

    With soft targets (B, C) the loss is mixed in the same shares. Each row's smallest entry is taken out first (label
    smoothing would make every class of the data set present) and n_c is the sum of the rest: for mixup and cutmix of a
    batch with itself, exactly its number of samples of class c.

    Args:
        head: The head whose output this takes. Held, but not registered: its parameters are not this module's.
        reduction: 'mean' (the paper's) or 'sum' over the batch, or 'none'.
        weight: Factor on the loss; 1 is the paper's, for a learning rate of 0.1.
        class_weights: (C,) weights of the classes, or 'auto' for the inverse of their frequencies; see `ClassWeights`.
            The mean divides by the samples' weights, as in `torch.nn.CrossEntropyLoss`.
        ignore_index: The label of samples that are left out.

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: The head's scale is learned, or an argument is out of range.

    Example:
        >>> head = DL2PAHead(in_features=512, num_classes=100, dim=50, learn_scale=False)
        >>> criterion = DotRegressionLoss(head)
        >>> loss = criterion(head(torch.randn(8, 512)), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]))
    """

    def __init__(
            self,
            head: DL2PAHead,
            reduction: Reduction = 'mean',
            weight: float = 1.0,
            class_weights: torch.Tensor | Literal['auto'] | None = None,
            ignore_index: int = -100,
    ):
        super().__init__(head, reduction, weight, class_weights, ignore_index)

    def _shares(self, targets: torch.Tensor) -> torch.Tensor:
        shares = targets - targets.amin(dim=1, keepdim=True)
        return shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)

    def _class_factors(self, targets: torch.Tensor) -> torch.Tensor:
        if targets.ndim == 2:
            return 0.5 * self._squared_lengths(targets.sum(dim=0), len(targets))
        kept = targets != self.ignore_index
        counts = torch.zeros(self.head.num_classes, device=targets.device, dtype=torch.float32)
        counts.index_add_(0, targets.where(kept, 0), kept.float())
        return 0.5 * self._squared_lengths(counts, kept.sum())

    @staticmethod
    def _squared_lengths(counts: torch.Tensor, batch_size: torch.Tensor | int) -> torch.Tensor:
        """Return L_c^2, (C,), zero for classes that are not present in the counts (C,)."""
        present = counts > 0
        number_present = present.sum().clamp_min(1)
        return torch.where(present, batch_size / number_present / torch.where(present, counts, 1.0), 0.0)
