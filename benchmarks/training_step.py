"""A training step of a small network: the plain one, and the same as a CUDA graph.

A step of a ResNet-32 on 32 x 32 images is some hundred tiny kernels, and launching them takes longer than running them.
A CUDA graph launches all of them at once.
"""
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn as nn

__all__ = ['GraphedStep', 'PlainStep', 'cuda_graph']


class PlainStep:
    """Forward, loss, backward and SGD, one call after the other.

    Args:
        model: Takes images (B, channels, H, W) and returns logits or embeddings.
        criterion: Takes these in float32, and targets.
        optimizer: SGD.
        autocast: Makes the context of the forward pass.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.SGD,
                 autocast: Callable[[], AbstractContextManager]):
        self.model, self.criterion, self.optimizer, self.autocast = model, criterion, optimizer, autocast

    def gradients(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute new gradients, and return the loss, detached."""
        with self.autocast():
            output = self.model(x)
        loss = self.criterion(output.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def __call__(self, x: torch.Tensor, targets: torch.Tensor, rate: float) -> torch.Tensor:
        """Take a step at the learning rate `rate`, and return the loss, detached."""
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        loss = self.gradients(x, targets)
        self.optimizer.step()
        return loss


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record what a function launches, on the current stream, without running it; return what runs it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (a progress bar's, a solver's) may use the device meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode='thread_local'):
        function()
    return graph.replay


class GraphedStep:
    """The plain step, recorded once and replayed. Call it on a stream that is not the default one.

    The first steps are plain ones: they make the momentum, and let cuDNN choose its algorithms. What the recording
    takes along is where tensors lie, not what they hold: prototypes and assignments may change in place between
    replays. It does not take along Python's part of a step. So it is made anew when the head's phase changes, and while
    class vectors stand in for the prototypes, a new tensor at each step, the steps are plain. The observer of the head
    is told the embeddings after each replay.

    Where recording fails the steps stay plain, and `failure` says why.

    Args:
        plain: The step.
        head: The DL2PA head of its model, if it has one.
        record: Records a function. Tests give one that works on a CPU.
    """
    PLAIN_STEPS = 3

    def __init__(self, plain: PlainStep, head: nn.Module | None = None,
                 record: Callable[[Callable[[], None]], Callable[[], None]] = cuda_graph):
        self.plain, self.head, self.record = plain, head, record
        self.failure: str | None = None
        self.replays = 0
        self._phase: bool | None = None
        self._steps = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, x: torch.Tensor, targets: torch.Tensor, rate: float) -> torch.Tensor:
        """Take a step at the learning rate `rate`, and return the loss, detached; the next step overwrites it."""
        phase = self.head is not None and self.head.warming_up
        if phase != self._phase:
            self._phase, self._steps, self._replay = phase, 0, None
        standing_in = self.head is not None and self.head.training_view.class_vectors is not None
        if self.failure or standing_in or self._steps < self.PLAIN_STEPS:
            self._steps += 1
            return self.plain(x, targets, rate)
        if self._replay is None:
            stream = torch.cuda.current_stream() if x.is_cuda else None
            try:
                self._record(x, targets)
            except Exception as error:
                self.failure = f'{type(error).__name__}: {error}'.splitlines()[0]
                warnings.warn(f'the training step is not recorded, and stays a plain one: {self.failure}', stacklevel=2)
                if stream is not None:  # a recording that broke off leaves its own
                    torch.cuda.set_stream(stream)
                    torch.cuda.synchronize()
                return self.plain(x, targets, rate)
        self._x.copy_(x)
        self._targets.copy_(targets)
        self._rate.fill_(rate)
        self._replay()
        self.replays += 1
        if self._seen:
            self.head.training_view.on_forward(*self._seen[-1])
        return self._loss

    def _record(self, x: torch.Tensor, targets: torch.Tensor) -> None:
        self._x, self._targets = x.clone(memory_format=torch.preserve_format), targets.clone()
        self._rate = torch.zeros((), device=x.device)
        self._loss = torch.zeros((), device=x.device)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        observer = None
        if self.head is not None:
            observer = self.head.training_view.on_forward
            if observer is not None:
                self.head.training_view.on_forward = self._observe
        # Those of before lie elsewhere.
        self.plain.optimizer.zero_grad(set_to_none=True)
        try:
            replay = self.record(self._step)
        finally:
            if observer is not None:
                self.head.training_view.on_forward = observer
        self._replay = replay

    def _observe(self, embeddings: torch.Tensor, output: torch.Tensor) -> None:
        self._seen[:] = [(embeddings, output)]

    def _step(self) -> None:
        self._loss.copy_(self.plain.gradients(self._x, self._targets))
        self._descend()

    @torch.no_grad()
    def _descend(self) -> None:
        """PyTorch's SGD with momentum and weight decay, with a learning rate that is a tensor."""
        for group in self.plain.optimizer.param_groups:
            parameters = [parameter for parameter in group['params'] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.plain.optimizer.state[parameter]['momentum_buffer'] for parameter in parameters]
            torch._foreach_add_(gradients, parameters, alpha=group['weight_decay'])
            torch._foreach_mul_(momenta, group['momentum'])
            torch._foreach_add_(momenta, gradients)
            torch._foreach_sub_(parameters, torch._foreach_mul(momenta, self._rate))
