"""A scheduler without a warm-up, and batches for the heads of `make_head`."""
import torch

from timm_dl2pa import AssignmentScheduler


def paper_rule(model, *args, **kwargs):
    """Without a warm-up."""
    return AssignmentScheduler(model, *args, warmup='none', **kwargs)


def feed(model, scheduler, seed, rows=32):
    """One batch whose features point where class (label) says, so that a re-solve has something to find."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (rows,), generator=generator)
    corners = torch.randn(7, 12, generator=torch.Generator().manual_seed(99))
    model(corners[labels] + 0.1 * torch.randn(rows, 12, generator=generator))
    return scheduler.step(labels)
