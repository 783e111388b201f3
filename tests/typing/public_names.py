"""What a type checker sees of every public name. Nothing here is run: `test_typing.py` has it checked."""
from pathlib import Path

import torch
import torch.nn as nn
from typing_extensions import assert_type

from timm_dl2pa import (
    AlignmentResult,
    AssignmentResult,
    AssignmentScheduler,
    AssignmentUpdate,
    BalancedSoftmaxLoss,
    ClassMeans,
    DL2PAConfig,
    DL2PAHead,
    DotRegressionLoss,
    SampledCrossEntropyLoss,
    Schedule,
    SquaredCosineLoss,
    WeightedCrossEntropyLoss,
    add_classes,
    align_prototypes,
    default_scale,
    fold_dl2pa,
    load_head,
    load_model,
    load_prototypes,
    make_prototypes,
    max_cosine_lower_bound,
    prime,
    prototype_quality,
    push_head_to_hub,
    push_model_to_hub,
    save_model,
    save_prototypes,
    solve_assignment,
    uniformity,
    wrap_dl2pa,
)
from timm_dl2pa.prototypes import PrototypeInfo, PrototypeQuality


class Net(nn.Module):
    def features(self) -> int:
        return 3


def prototypes(folder: Path) -> None:
    points = make_prototypes(10, 4, objective='separated', method='auto')
    assert_type(points, torch.Tensor)
    points, info = make_prototypes(10, 4, return_info=True)
    assert_type(points, torch.Tensor)
    assert_type(info, PrototypeInfo)
    assert_type(make_prototypes(10, 4, return_info=False), torch.Tensor)
    assert_type(max_cosine_lower_bound(10, 4), float)
    assert_type(prototype_quality(points), PrototypeQuality)
    assert_type(prototype_quality(points).max_cosine, float)
    assert_type(uniformity(points), float)
    save_prototypes(folder / 'points.safetensors', points)
    assert_type(load_prototypes(str(folder)), torch.Tensor)


def assignment(means: torch.Tensor, points: torch.Tensor) -> None:
    solved = solve_assignment(class_means=means, prototypes=points)
    assert_type(solved, AssignmentResult)
    assert_type(solved.assignment, torch.Tensor)
    assert_type(solved.moved, int)
    aligned = align_prototypes(means, points)
    assert_type(aligned, AlignmentResult)
    assert_type(aligned.prototypes, torch.Tensor)


def head(folder: Path, features: torch.Tensor, labels: torch.Tensor) -> None:
    config = DL2PAConfig(12, 10, 4, neck='linear', recipe='paper', train_output='logits')
    made = DL2PAHead.from_config(config)
    assert_type(made, DL2PAHead)
    assert_type(made.config, DL2PAConfig)
    assert_type(made.prototypes, torch.Tensor)
    assert_type(made.assignment, torch.Tensor)
    assert_type(made.class_prototypes, torch.Tensor)
    assert_type(made.num_classes, int)
    assert_type(made.embed(features), torch.Tensor)
    assert_type(made.nearest(features, k=2), tuple[torch.Tensor, torch.Tensor])
    assert_type(made.save_pretrained(folder, label_names=['cat', 'dog']), Path)
    assert_type(made.push_to_hub('me/head'), str)
    assert_type(load_head(folder), DL2PAHead)
    assert_type(DL2PAHead.from_pretrained('me/head', num_classes=3), DL2PAHead)
    assert_type(default_scale(10), float)
    for criterion in (SquaredCosineLoss(made, reduction='sum'), DotRegressionLoss(made, class_weights='auto'),
                      SampledCrossEntropyLoss(made, 100), BalancedSoftmaxLoss(10), WeightedCrossEntropyLoss(10)):
        criterion(made(features), labels).backward()


def models(folder: Path, images: torch.Tensor) -> None:
    net = wrap_dl2pa(Net(), 8, recipe='even', neck='linear_bn', head=None)
    assert_type(net, Net)
    assert_type(net.features(), int)
    assert_type(fold_dl2pa(net, images=images), Net)
    assert_type(add_classes(net, (images, images), ['new'], place='free'), Net)
    made: nn.Module = wrap_dl2pa(load_model('me/model'), prototypes=folder / 'points.safetensors')
    assert_type(save_model(made, folder, label_names={0: 'cat', 1: 'dog'}), Path)
    assert_type(load_model(folder, 'cpu'), nn.Module)
    assert_type(push_head_to_hub(made, 'me/head'), str)
    assert_type(push_model_to_hub(made, 'me/model', metrics={'accuracy': 0.9}), str)


def training(model: nn.Module, labels: torch.Tensor) -> None:
    schedule = Schedule(((100, 1000), (1000, None)), 'batches')
    assert_type(schedule.due(100), bool)
    scheduler = AssignmentScheduler(model, schedule, total='20 epochs', warmup='placed', warmup_length='30 %')
    assert_type(scheduler.step(labels), AssignmentUpdate | None)
    assert_type(scheduler.history, list[AssignmentUpdate])
    assert_type(scheduler.heads, list[DL2PAHead])
    assert_type(scheduler.class_means, ClassMeans)
    assert_type(scheduler.class_means.directions(), torch.Tensor)
    assert_type(scheduler.steps, int)
    assert_type(scheduler.warming_up, bool)
    assert_type(prime(model, [(labels, labels)], scheduler, max_batches=3), float)
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
