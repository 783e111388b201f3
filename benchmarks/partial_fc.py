"""Partial FC's sampled softmax, written from its paper: the peer at very many classes."""
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['PartialFC']


class PartialFC(nn.Module):
    """Learned class centres, of which each step takes the batch's classes and a random sample of the others.

    (X. An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
    FC", CVPR 2022, section 3.2: the positive class centres are always taken, negative ones at random until the sample
    has its size.) Cross-entropy over the sample, cosines times a scale. Centres that were not taken do not move: SGD
    with momentum keeps a momentum for each, and applies it to those of the sample alone.

    Args:
        num_classes: C.
        dim: d.
        share: Share of the classes that a step takes, above 0 and at most 1.
        scale: Factor on the cosines.
        lr: SGD's learning rate for the centres.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        device: Where the centres live.
    """

    def __init__(self, num_classes: int, dim: int, share: float = 0.1, scale: float = 64.0, *, lr: float = 0.01,
                 momentum: float = 0.9, weight_decay: float = 1e-4, device: torch.device | str | None = None):
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f'share must be above 0 and at most 1, not {share}.')
        self.sample_size = max(1, round(share * num_classes))
        self.scale, self.lr, self.momentum, self.weight_decay = scale, lr, momentum, weight_decay
        self.register_buffer('centres', torch.randn(num_classes, dim, device=device).mul_(0.01))
        self.register_buffer('momenta', torch.zeros(num_classes, dim, device=device))

    @torch.no_grad()
    def sample(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the classes of a step (S,), sorted, and where the labels (B,) stand among them.

        Random numbers in [0, 1) decide; the batch's classes get 2. Where the batch has more classes than the sample is
        to have, all of them are taken. Reading how many the batch has waits for the device.
        """
        numbers = torch.rand(len(self.centres), device=labels.device)
        numbers[labels] = 2.0
        size = max(self.sample_size, int((numbers == 2.0).sum()))
        classes = numbers.topk(size).indices.sort().values
        return classes, torch.searchsorted(classes, labels)

    def loss(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of embeddings (B, d) over the sample; `step` then moves its centres."""
        self._classes, places = self.sample(labels)
        self._active = self.centres[self._classes].requires_grad_()
        cosines = F.normalize(embeddings.float()) @ F.normalize(self._active).t()
        return F.cross_entropy(self.scale * cosines, places)

    @torch.no_grad()
    def step(self) -> None:
        """Move the centres that the last loss was of."""
        gradient = self._active.grad.add_(self._active.detach(), alpha=self.weight_decay)
        momenta = self.momenta[self._classes].mul_(self.momentum).add_(gradient)
        self.momenta[self._classes] = momenta
        self.centres[self._classes] = self._active.detach() - self.lr * momenta
