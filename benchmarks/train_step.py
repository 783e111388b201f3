"""What the plugin costs the real training step: backbone, head, loss, backward and optimiser, through timm's task.

Side by side in one process, in interleaved rounds, medians; data aside (random images of 224 x 224 at hand), the SGD of
timm's default (momentum 0.9, weight decay 2e-5):

- linear: the timm model as it is, cross-entropy, timm's ClassificationTask without the plugin's doing;
- criterion: the plugin, a DL2PA head, the same cross-entropy on its logits;
- squared_cosine: the plugin with dl2pa_loss=squared_cosine.

The plugin's warm-up is under way throughout, as in the first nine tenths of a training: its steps
cost more than those after.

The tracking (what the assignment's scheduler does at each batch, re-solves aside) is timed within a further step of
each round, as reading the clock makes a GPU wait.

Ratios are medians over the rounds, each of which times all methods one after the other. With `--compile` the task is
compiled as train.py's --torchcompile does it.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --models resnet50 --sizes 1000,512 --batch-size 256 --amp bfloat16 \
        --channels-last [--compile inductor]
"""
import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import timm
import torch
from results_file import add_output_argument, result_name, write_results
from timm.task import ClassificationTask
from tqdm import tqdm

from timm_dl2pa.timm_scripts import plugged_in

SIZES = ((1000, 512), (21841, 128))
METHODS = ('linear', 'criterion', 'squared_cosine')


def make_step(model_name: str, num_classes: int, dim: int, method: str, args: argparse.Namespace,
              now: Callable[[], float]) -> tuple[Callable[[torch.Tensor, torch.Tensor], None], list[float]]:
    """Return a training step, and the list that takes the seconds of the tracking within each.

    Reading the clock waits for the device, so the tracking is timed while `tracking` holds a None at its end.
    """
    device = torch.device(args.device)
    options = {} if method == 'linear' else {'dl2pa_dim': dim, 'dl2pa_loss': method}
    model = timm.create_model(model_name, num_classes=num_classes, **options).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    task = ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    task.get_trainable_module().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=2e-5)
    if args.compile:
        task.compile(backend=args.compile)
    tracking: list[float | None] = []
    if method != 'linear':
        track = task.assignment_scheduler.step

        def timed(targets: torch.Tensor) -> Any:
            if not tracking or tracking[-1] is not None:
                return track(targets)
            began = now()
            update = track(targets)
            tracking[-1] = now() - began
            return update

        task.assignment_scheduler.step = timed

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, getattr(torch, args.amp)) if args.amp else nullcontext()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast():
            loss = task(images, labels)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=1)

    return step, tracking


def measure(model_name: str, num_classes: int, dim: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a model and a size."""
    device = torch.device(args.device)

    def now() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    with plugged_in():
        steps = {method: make_step(model_name, num_classes, dim, method, args, now) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    result: dict[str, Any] = {'model': model_name, 'num_classes': num_classes, 'dim': dim,
                              'compiled': bool(args.compile)}
    size = args.image_size
    for number in tqdm(range(args.rounds + args.warm_up), f'{model_name} ({num_classes}, {dim})', unit='round',
                       disable=None):
        batches = [(torch.randn(args.batch_size, 3, size, size, device=device),
                    torch.randint(0, num_classes, (args.batch_size,), device=device)) for _ in range(args.repeats)]
        if args.channels_last:
            batches = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in batches]
        for method, (step, tracking) in list(steps.items()):
            began = now()
            try:
                for images, labels in batches:
                    step(images, labels)
            except Exception as error:
                # The others' figures are worth having.
                result[f'{method}_failed'] = f'{type(error).__name__}: {error}'.splitlines()[0]
                del steps[method]
                continue
            seconds = (now() - began) / args.repeats
            if number >= args.warm_up:
                times[method].append(seconds)
            if method != 'linear':
                tracking.append(None)
                step(*batches[0])
    for method, (_, tracking) in steps.items():
        result[f'{method}_ms'] = round(1000 * median(times[method]), 2)
        result[f'{method}_images_a_second'] = round(args.batch_size / median(times[method]), 1)
        if method != 'linear':
            tracked = median(tracking[args.warm_up:])
            result[f'{method}_tracking_ms'] = round(1000 * tracked, 4)
            result[f'{method}_tracking_share'] = round(tracked / median(times[method]), 6)
            if 'linear' in steps:
                ratios = [ours / linear for ours, linear in zip(times[method], times['linear'])]
                result[f'{method}_over_linear'] = round(median(ratios), 4)
    return result


def size_of(text: str) -> tuple[int, int]:
    """Return the pair (C, d) of the text 'C,d'."""
    num_classes, dim = map(int, text.split(','))
    return num_classes, dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'vit_small_patch16_224'])
    parser.add_argument('--sizes', type=size_of, nargs='+', default=SIZES, metavar='C,d')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--amp', choices=('bfloat16', 'float16'), help='autocast to this')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', metavar='BACKEND', help="compile the task, e.g. with 'inductor'")
    parser.add_argument('--rounds', type=int, default=12, help='each times --repeats steps of each method')
    parser.add_argument('--repeats', type=int, default=1)
    parser.add_argument('--warm-up', type=int, default=1, help='rounds before these')
    parser.add_argument('--seed', type=int, default=0)
    add_output_argument(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    name = result_name('train_step_compiled' if args.compile else 'train_step', args.device)
    results = []
    for model_name in args.models:
        for num_classes, dim in args.sizes:
            results.append(measure(model_name, num_classes, dim, args))
            print(results[-1], flush=True)
            path = write_results(name, vars(args), results, args.output)
    print(path)


if __name__ == '__main__':
    main()
