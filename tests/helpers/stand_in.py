"""What timm's train.py does, with timm.task, timm.data and timm.utils alone: the same calls in the same order.

The data are made at random, in an order that is a function of the epoch, so that a resumed run sees what the unbroken
one saw.
"""
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm import utils
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

CLASSES, BATCH, BATCHES = 5, 10, 4
DEVICE = torch.device('cpu')


class Killed(Exception):
    """Stands for a SIGKILL: nothing of the process is left."""


def make_model(name='test_resnet', **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=CLASSES, **kwargs)


def batches(epoch, size=32, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(epoch)
    patterns = torch.randn(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(99))
    for index in range(BATCHES):
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        images = patterns[labels] + torch.randn(BATCH, 3, size, size, generator=generator)
        if world_size > 1:
            # Rank 1 has fewer rows in the last batch.
            cut = BATCH // 2 if index < BATCHES - 1 else BATCH - 2
            images, labels = (images[:cut], labels[:cut]) if rank == 0 else (images[cut:], labels[cut:])
        yield images, labels


def train(
        folder,
        *,
        model=None,
        make_task=ClassificationTask,
        criterion=None,
        epochs=3,
        stop_after=None,
        resume='',
        recovery_interval=0,
        validate=True,
        die_after=None,
        ema=False,
        compiled=False,
        mixup=None,
        accumulate=1,
        autocast=None,
        dtype=None,
        lr=0.05,
        clip=None,
        size=32,
        log_wandb=False,
        broadcast_buffers=True,
        **model_kwargs,
):
    """Train and return the task, with the losses of all batches; `die_after` updates it raises Killed.

    `stop_after` so many epochs it ends, of the `epochs` that the script was asked for.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    model = make_model(**model_kwargs) if model is None else model
    model.to(dtype=dtype)
    criterion = criterion or LabelSmoothingCrossEntropy(0.1)
    task = make_task(model, criterion=criterion, device=DEVICE, dtype=dtype, verbose=rank == 0)
    trainable, eval_model = task.get_trainable_module(), task.get_eval_model()
    optimizer = torch.optim.SGD(trainable.parameters(), lr=lr, momentum=0.9)
    first_epoch = resume_task_checkpoint(task, str(resume), optimizer=optimizer) if resume else 0
    if ema:
        task.setup_ema(decay=0.9)
        if resume:
            load_task_ema_checkpoint(task, str(resume))
    if compiled:
        task.compile(backend='eager')
        eval_model = task.get_eval_model()
    if distributed:
        task.prepare_distributed(device_ids=[DEVICE], broadcast_buffers=broadcast_buffers)
    saver = None
    if rank == 0:
        args = Namespace(model='test', epochs=epochs, recovery_interval=recovery_interval,
                         val_split='validation' if validate else '')
        Path(folder).mkdir(exist_ok=True)
        saver = utils.CheckpointSaver(task.get_trainable_module(), optimizer, args, checkpoint_dir=str(folder),
                                      recovery_dir=str(folder), task=task)
    task.losses, updates, header = [], first_epoch * (BATCHES // accumulate), not resume
    for epoch in range(first_epoch, stop_after or epochs):
        task.get_trainable_module().train()
        for index, (images, labels) in enumerate(batches(epoch, size, rank, world_size)):
            images = images.to(dtype=dtype)
            if mixup is not None:
                images, labels = mixup(images, labels)
            with torch.autocast('cpu', autocast) if autocast else nullcontext():
                loss = task(images, labels)['loss'] / accumulate
            loss.backward()
            task.losses.append(loss.item())
            if (index + 1) % accumulate:
                continue
            if clip:
                utils.dispatch_clip_grad(task.get_clip_parameters(exclude_head=clip == 'agc'), value=0.1, mode=clip)
            optimizer.step()
            optimizer.zero_grad()
            if updates == die_after:
                raise Killed
            updates += 1
            task.update_ema(step=updates)
            update = index // accumulate
            if saver is not None and recovery_interval and (update + 1) % recovery_interval == 0:
                saver.save_recovery(epoch, batch_idx=update)
        metrics = None
        if validate:
            eval_model.eval()
            with torch.inference_mode():
                images, labels = next(batches(1000, size))
                output = eval_model(images.to(dtype=dtype))
                assert output.shape == (BATCH, CLASSES)
                metrics = {'top1': utils.accuracy(output.float(), labels)[0].item()}
        if saver is not None:
            utils.update_summary(epoch, {'loss': loss.item()}, metrics, filename=str(Path(folder) / 'summary.csv'),
                                 write_header=header, log_wandb=log_wandb)
            header = False
            saver.save_checkpoint(epoch, metric=metrics['top1'] if metrics else loss.item())
    return task
