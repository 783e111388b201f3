"""Which weight of the squared cosine loss, and which scale of the logits, suit usual learning rates?

Trains a small timm ResNet for a few epochs on a part of a folder of small images (an ImageFolder: DIR/<class>/*.png;
made for CIFAR-100's training images at 32 x 32) with a static assignment, and prints the top-1 on images held out of
it: for cross-entropy and for SquaredCosineLoss at several weights, each over a grid of learning rates; then for
cross-entropy at several scales. Test images are not used.

    python benchmarks/loss_grid.py --data-dir DIR
"""
import argparse
from statistics import mean

import numpy as np
import torch
import torch.nn as nn
from results_file import write_results
from timm.models.resnet import BasicBlock, ResNet
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from timm_dl2pa import SquaredCosineLoss, default_scale, wrap_dl2pa

WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)
SCALES = (6.0, 10.0, 13.7, 16.0, 24.0, 48.0)
SGD_RATES = (0.02, 0.05, 0.1, 0.2)


def load_images(folder: str, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return `number` images, drawn by seed, as (N, 3, H, W) in -1..1, their labels, and the number of classes."""
    dataset = ImageFolder(folder)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:number]
    images, labels = zip(*(dataset[i] for i in tqdm(chosen, 'images', unit='image', disable=None)))
    images = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, torch.tensor(labels), len(dataset.classes)


def small_resnet(num_classes: int) -> nn.Module:
    """A timm ResNet of one block a stage, for small images: 3x3 stem, no max pooling."""
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=num_classes, channels=(16, 32, 64, 128))
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def train(args, data, loss: str, optimizer: str, rate: float, seed: int, weight=30.0, scale=None) -> float:
    """Return the top-1, in percent, on the held-out images."""
    x_train, y_train, x_held, y_held, num_classes = data
    torch.manual_seed(seed)
    model = wrap_dl2pa(small_resnet(num_classes), args.dim, seed=seed, scale=scale)
    model = model.to(memory_format=torch.channels_last)
    head = model.get_classifier()
    criterion = nn.CrossEntropyLoss() if loss == 'cross-entropy' else SquaredCosineLoss(head, weight=weight)
    if optimizer == 'sgd':
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = args.epochs * (len(x_train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x_train))[:len(x_train) // 128 * 128].view(-1, 128):
            images, labels = x_train[batch], y_train[batch]
            images = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, images, images.flip(3))
            with torch.autocast('cpu', torch.bfloat16):
                value = criterion(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(x_held.split(500), y_held.split(500)))
    return 100 * right / len(y_held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='an ImageFolder of equally sized small images')
    parser.add_argument('--dim', type=int, default=50)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--images', type=int, default=15000, help='training images')
    parser.add_argument('--held-out', type=int, default=5000)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    args = parser.parse_args()

    images, labels, num_classes = load_images(args.data_dir, args.images + args.held_out, seed=0)
    cut = args.images
    data = images[:cut], labels[:cut], images[cut:], labels[cut:], num_classes

    runs = [dict(loss='cross-entropy', optimizer='sgd', rate=rate) for rate in SGD_RATES]
    runs += [dict(loss='squared cosine', optimizer='sgd', rate=rate, weight=w) for w in WEIGHTS for rate in SGD_RATES]
    runs += [dict(loss='cross-entropy', optimizer='adamw', rate=1e-3)]
    runs += [dict(loss='squared cosine', optimizer='adamw', rate=1e-3, weight=w) for w in WEIGHTS]
    runs += [dict(loss='cross-entropy', optimizer='sgd', rate=0.1, scale=scale) for scale in SCALES]
    results = []
    bar = tqdm(runs, unit='run', disable=None)
    for run in bar:
        top1 = [train(args, data, seed=seed, **run) for seed in args.seeds]
        results.append({**run, 'top1': [round(t, 2) for t in top1], 'mean_top1': round(mean(top1), 2)})
        bar.write(str(results[-1]))
    settings = {name: value for name, value in vars(args).items() if name != 'data_dir'}
    settings |= {'batch_size': 128, 'default_scale': round(default_scale(num_classes), 2), 'num_classes': num_classes}
    print(write_results('loss_grid', settings, results))


if __name__ == '__main__':
    main()
