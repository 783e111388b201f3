"""What the plugin costs the real training step: backbone, head, loss, backward and optimiser, through timm's task.

Side by side in one process, in interleaved rounds, medians; data aside (random images of 224 x 224 at hand), the SGD of
timm's default (momentum 0.9, weight decay 2e-5):

- linear: the timm model as it is, cross-entropy, timm's ClassificationTask without the plugin's doing;
- criterion: the plugin, a DL2PA head, the same cross-entropy on its logits;
- squared_cosine: the plugin with dl2pa_loss=squared_cosine.

The tracking (what the assignment's scheduler does at each batch, re-solves aside) is timed within the step.

    python benchmarks/train_step.py
"""
import argparse
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from results_file import write_results
from timm.task import ClassificationTask
from tqdm import tqdm

from timm_dl2pa.timm_scripts import plugged_in

SIZES = ((1000, 512), (21841, 128))
METHODS = ('linear', 'criterion', 'squared_cosine')


def make_step(model_name: str, num_classes: int, dim: int, method: str, device: torch.device, now: Callable[[], float]):
    """Return a training step, and the list that takes the seconds of the tracking within each."""
    options = {} if method == 'linear' else {'dl2pa_dim': dim, 'dl2pa_loss': method}
    model = timm.create_model(model_name, num_classes=num_classes, **options).to(device)
    task = ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    task.get_trainable_module().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=2e-5)
    tracking: list[float] = []
    if method != 'linear':
        track = task.assignment_scheduler.step

        def timed(targets: torch.Tensor):
            began = now()
            update = track(targets)
            tracking.append(now() - began)
            return update

        task.assignment_scheduler.step = timed

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        task(images, labels)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=1)

    return step, tracking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'vit_small_patch16_224'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    def now() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    results = []
    for model_name in args.models:
        for num_classes, dim in SIZES:
            with plugged_in():
                steps = {method: make_step(model_name, num_classes, dim, method, device, now) for method in METHODS}
            times: dict[str, list[float]] = {method: [] for method in METHODS}
            for number in tqdm(range(args.rounds + 1), f'{model_name} ({num_classes}, {dim})', unit='round'):
                images = torch.randn(args.batch_size, 3, 224, 224, device=device)
                labels = torch.randint(0, num_classes, (args.batch_size,), device=device)
                for method, (step, _) in steps.items():
                    began = now()
                    step(images, labels)
                    if number:  # the first round warms up
                        times[method].append(now() - began)
            result = {'model': model_name, 'num_classes': num_classes, 'dim': dim}
            for method, (_, tracking) in steps.items():
                result[f'{method}_ms'] = round(1000 * median(times[method]), 2)
                if tracking:
                    result[f'{method}_tracking_ms'] = round(1000 * median(tracking[1:]), 4)
                    result[f'{method}_tracking_share'] = round(median(tracking[1:]) / median(times[method]), 6)
                    ratios = [ours / linear for ours, linear in zip(times[method], times['linear'])]
                    result[f'{method}_over_linear'] = round(median(ratios), 4)
            results.append(result)
            print(result)
            del steps
    name = 'train_step' if device.type == 'cpu' else f'train_step_{device.type}'
    print(write_results(name, vars(args), results))


if __name__ == '__main__':
    main()
