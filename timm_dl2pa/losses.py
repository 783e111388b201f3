"""The paper's two losses, on what a DL2PA head returns in training, and a cross-entropy for long tails."""
import warnings

import torch
import torch.nn as nn

from .head import DL2PAHead, plain_tensor

__all__ = ['BalancedSoftmaxLoss', 'DotRegressionLoss', 'SquaredCosineLoss']

REDUCTIONS = ('mean', 'sum', 'none')


class _PrototypeLoss(nn.Module):
    """The cosine of each sample with its target's prototype, from logits or from embeddings.

    Which of the two an output is, is decided by the head's `train_output` and mode, never by its shape.

    A warm-up may need another loss, as the head's training view tells: where class vectors follow the embeddings, a
    loss of distances alone is least where all embeddings are one. Then it is the cross-entropy of the scaled cosines,
    without `weight`, and a warning says so once.
    """

    def __init__(self, head: DL2PAHead, reduction: str, weight: float):
        super().__init__()
        if not isinstance(head, DL2PAHead):
            raise TypeError(f'head must be a DL2PAHead, not {type(head).__name__}: of a wrapped model, take '
                            f'model.get_classifier() (the first of them, if it has several).')
        if head.config.learn_scale:
            raise ValueError(f'{type(self).__name__} depends on cosines alone and would give the learned scale no '
                             f'gradient: make the head with learn_scale=False.')
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be one of {", ".join(REDUCTIONS)}, not {reduction!r}.')
        self._warned = False
        self._head = (head,)  # in a tuple, so that the head's parameters do not become the loss's
        self.reduction = reduction
        self.weight = weight

    @property
    def head(self) -> DL2PAHead:
        return self._head[0]

    def _needs_cross_entropy(self) -> bool:
        return self.head.training and self.head.training_view.warmup_loss == 'cross_entropy'

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f'{type(self).__name__} is the cross-entropy of the scaled cosines, without its weight, '
                          f'during the warm-up, in which class vectors follow the embeddings. To train without a '
                          f"warm-up, use recipe='paper' or warmup='none'.", stacklevel=4)

    def _cosines(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cosines in float32: (B,) with the target's prototype for hard targets, (B, C) for soft ones and
        in a warm-up."""
        head = self.head
        embedded = head.training and head.train_output == 'embeddings'
        width = head.dim if embedded else head.num_classes
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[1] != width:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f'output must be the {"embeddings" if embedded else "logits"} (B, {width}) that the head '
                             f'returns now, not {what}.')
        if targets.shape not in ((len(output),), (len(output), head.num_classes)):
            raise ValueError(f'targets must be class indices ({len(output)},) or soft targets '
                             f'({len(output)}, {head.num_classes}), not of the shape {tuple(targets.shape)}.')
        if targets.ndim == 1 and targets.is_floating_point():
            raise ValueError(f'targets of the shape {tuple(targets.shape)} must be class indices, not {targets.dtype}.')
        warmup = self._needs_cross_entropy()
        if not embedded:
            chosen = output if targets.ndim == 2 or warmup else output.gather(1, targets.long().unsqueeze(1)).squeeze(1)
            return chosen.float() / head.current_scale()
        if targets.ndim == 2 or warmup:
            return head.cosines(output)
        # The rows of the B targets alone: nothing here grows with the number of classes. gather refuses labels < 0.
        return (output.float() * head.prototypes[head.assignment.gather(0, targets.long())]).sum(dim=1)

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, float32: () or, with reduction 'none', (B,).

        Args:
            output: What the head returned: logits (B, C), or embeddings (B, d).
            targets: Class indices (B,), or soft targets (B, C).
        """
        output, targets = plain_tensor(output), plain_tensor(targets)
        cosines = self._cosines(output, targets)
        if not self._needs_cross_entropy():
            return self._reduce(self.weight * self._per_sample(cosines, targets))
        self._warn_once()
        logits = self.head.current_scale() * cosines
        return self._reduce(nn.functional.cross_entropy(
            logits, targets.long() if targets.ndim == 1 else targets.to(logits.dtype), reduction='none'))

    def _per_sample(self, cosines: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss (B,) of the cosines (B,) with hard targets, (B, C) with soft ones."""
        raise NotImplementedError

    def _reduce(self, per_sample: torch.Tensor) -> torch.Tensor:
        if self.reduction == 'none':
            return per_sample
        return per_sample.sum() if self.reduction == 'sum' else per_sample.mean()

    def extra_repr(self) -> str:
        return f'reduction={self.reduction!r}, weight={self.weight:g}'


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

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: The head's scale is learned, or `reduction` is unknown.

    Example:
        >>> head = DL2PAHead(in_features=512, num_classes=100, dim=50, recipe='paper')
        >>> criterion = SquaredCosineLoss(head, reduction='sum', weight=1.0)    # as the paper has it
        >>> loss = criterion(head(torch.randn(8, 512)), torch.arange(8))
    """

    def __init__(self, head: DL2PAHead, reduction: str = 'mean', weight: float = 30.0):
        super().__init__(head, reduction, weight)

    def _per_sample(self, cosines: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        squared = (1.0 - cosines).square()
        if targets.ndim == 2:
            squared = (targets.to(squared.dtype) * squared).sum(dim=1)
        return squared


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

    Raises:
        TypeError: `head` is no DL2PAHead.
        ValueError: The head's scale is learned, or `reduction` is unknown.

    Example:
        >>> head = DL2PAHead(in_features=512, num_classes=100, dim=50, learn_scale=False)
        >>> criterion = DotRegressionLoss(head)
        >>> loss = criterion(head(torch.randn(8, 512)), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]))
    """

    def __init__(self, head: DL2PAHead, reduction: str = 'mean', weight: float = 1.0):
        super().__init__(head, reduction, weight)

    def _per_sample(self, cosines: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        squared = (1.0 - cosines).square()
        if targets.ndim == 1:
            targets, ones = targets.long(), torch.ones_like(squared)
            counts = squared.new_zeros(self.head.num_classes).index_add_(0, targets, ones)
            return 0.5 * self._squared_lengths(counts, len(targets))[targets] * squared
        shares = targets.to(squared.dtype)
        shares = shares - shares.amin(dim=1, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
        squared_lengths = self._squared_lengths(shares.sum(dim=0), len(targets))
        return 0.5 * (shares * squared_lengths * squared).sum(dim=1)

    @staticmethod
    def _squared_lengths(counts: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Return L_c^2, (C,), zero for classes that are not present in the counts (C,)."""
        present = counts > 0
        number_present = present.sum().clamp_min(1)
        return torch.where(present, batch_size / number_present / torch.where(present, counts, 1.0), 0.0)


class BalancedSoftmaxLoss(nn.Module):
    """Computes the cross-entropy of `logits_c + log n_c`, with the number n_c of samples of class c, for long tails.

    (Balanced softmax, Ren et al., NeurIPS 2020; logit adjustment, Menon et al., ICLR 2021.) The term tells the softmax
    the frequency of the classes, so that the logits need not learn it: in evaluation, without the term, they classify
    as if all classes were equally frequent. For equally frequent classes it is the cross-entropy.

    It takes the logits of any classifier, a DL2PA head's or a linear one's. Without `class_counts` it counts the
    targets that it is given while gradients are enabled, one more for each class; soft ones by their shares. Each
    process of a distributed run counts its own, which are about proportional.

    Buffer, in the state dict: `class_counts` (C,) float32.

    Args:
        num_classes: C.
        class_counts: (C,) positive numbers, proportional to the numbers of samples. Default: counted in training.
        reduction: 'mean' or 'sum' over the batch, or 'none'.

    Raises:
        ValueError: The counts are not C positive, finite numbers, or `reduction` is unknown.

    Example:
        >>> criterion = BalancedSoftmaxLoss(num_classes=3, class_counts=torch.tensor([500, 50, 5]))
        >>> loss = criterion(torch.randn(8, 3), torch.randint(0, 3, (8,)))
    """

    class_counts: torch.Tensor

    def __init__(self, num_classes: int, class_counts: torch.Tensor | None = None, reduction: str = 'mean'):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be one of {", ".join(REDUCTIONS)}, not {reduction!r}.')
        self.counting = class_counts is None
        counts = torch.as_tensor([1.0] * num_classes if class_counts is None else class_counts).float()
        if counts.shape != (num_classes,) or not bool((counts.isfinite() & (counts > 0)).all()):
            raise ValueError(f'class_counts must be {num_classes} positive numbers: count a class without samples as '
                             f'1.')
        self.reduction = reduction
        self.register_buffer('class_counts', counts.clone())

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, float32: () or, with reduction 'none', (B,).

        Args:
            logits: (B, C).
            targets: Class indices (B,), or soft targets (B, C).

        Raises:
            ValueError: The shapes do not fit.
        """
        logits, targets = plain_tensor(logits), plain_tensor(targets)
        classes = len(self.class_counts)
        if logits.ndim != 2 or logits.shape[1] != classes or targets.shape not in ((len(logits),), logits.shape):
            raise ValueError(f'logits must be (B, {classes}) and targets (B,) or (B, {classes}), not '
                             f'{tuple(logits.shape)} and {tuple(targets.shape)}.')
        if self.class_counts.device != logits.device:
            self.to(logits.device)
        logits = logits.float()
        targets = targets.long() if targets.ndim == 1 else targets.to(logits.dtype)
        if self.counting and torch.is_grad_enabled():
            if targets.ndim == 1:
                counts = self.class_counts.index_add(0, targets, torch.ones_like(targets, dtype=torch.float32))
            else:
                counts = self.class_counts + targets.sum(dim=0)
            self.class_counts = counts
        return nn.functional.cross_entropy(logits + self.class_counts.log(), targets, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f'num_classes={len(self.class_counts)}, reduction={self.reduction!r}'
