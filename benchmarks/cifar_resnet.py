"""The ResNets for 32 x 32 images as timm models: depth 6n + 2, widths 16, 32, 64 (He et al. 2016, section 4.2).

`cifar_resnet{8,14,20,32,44,56}` have option A's shortcuts, without parameters; with `shortcut='conv3x3'` a strided
3 x 3 convolution takes their place where the width changes, as in the code of Hyperspherical Prototype Networks.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

__all__ = ['CifarResNet']


class _OptionA(nn.Module):
    """Every second pixel, and zeros for the channels that are new."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if stride == 1 and in_channels == channels:
            self.shortcut = nn.Identity()
        elif shortcut == 'a':
            self.shortcut = _OptionA(channels - in_channels)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A timm classification model with 64 features.

    Args:
        depth: 6n + 2.
        num_classes: C; 0 for none.
        shortcut: 'a' or 'conv3x3'.
        in_chans: Channels of the images.
        global_pool: 'avg', as timm names it; nothing else.
    """

    def __init__(self, depth: int, num_classes: int = 100, shortcut: str = 'a', in_chans: int = 3,
                 global_pool: str = 'avg'):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f'depth must be 6n + 2, not {depth}.')
        if shortcut not in ('a', 'conv3x3'):
            raise ValueError(f"shortcut must be 'a' or 'conv3x3', not {shortcut!r}.")
        if global_pool != 'avg':
            raise ValueError(f"global_pool must be 'avg', not {global_pool!r}.")
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for stage, channels in enumerate((16, 32, 64)):
            for index in range((depth - 2) // 6):
                blocks.append(_Block(width, channels, 2 if stage and index == 0 else 1, shortcut))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


DEPTHS = (8, 14, 20, 32, 44, 56)
default_cfgs = generate_default_cfgs({f'cifar_resnet{depth}': dict(
    url='', num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), first_conv='conv1', classifier='fc',
    mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762)) for depth in DEPTHS})


def _register(depth: int) -> None:
    def make(pretrained: bool = False, **kwargs) -> CifarResNet:
        return build_model_with_cfg(CifarResNet, name, pretrained, depth=depth, **kwargs)

    make.__name__ = make.__qualname__ = name = f'cifar_resnet{depth}'
    make.__module__ = __name__
    globals()[name] = make
    __all__.append(name)
    register_model(make)


for _depth in DEPTHS:
    _register(_depth)
