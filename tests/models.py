"""Tiny bases for tests: one for each trait that has broken adapters elsewhere, with random but lively weights.

``BASES`` maps a trait to a function that builds the model. Norm weights, layer scales and gains are randomised,
for where they start at zero (timm zeroes the last norm of a residual branch) nothing behind them would be tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import timm
import torch
from timm.layers import GroupNormAct, StdConv2dSame
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.densenet import DenseNet
from timm.models.dla import DLA, DlaBasic
from timm.models.efficientnet import EfficientNet
from timm.models.metaformer import MetaFormer
from timm.models.pit import PoolingVisionTransformer
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from torch import nn
from torch.nn import functional

from cadapt.backbone import Backbone, describe_model
from cadapt.planning import Survey, survey

CLASSES = 7


class TinyNet(nn.Module):
    """A stem, some blocks that keep the channels, and a classifier: the frame of the toys."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class PlainBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.act(self.conv1(x)))


class OverwritingBlock(nn.Module):
    """Its first act is to overwrite its input, so that the shortcut carries relu(x)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.act1(x)
        branch = self.act2(self.conv1(branch))
        return self.conv2(branch) + x


class DroppingBlock(nn.Module):
    """x + conv(dropout(relu(conv(x)))) with a functional dropout that is told the mode."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = functional.relu(self.conv1(x))
        return x + self.conv2(functional.dropout(branch, 0.5, training=self.training))


class ReusedNet(TinyNet):
    """One block, called twice."""

    def __init__(self) -> None:
        super().__init__(PlainBlock())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.blocks(self.stem(x)))
        return self.fc(self.pool(x).flatten(1))


def _weight_standardised() -> nn.Module:
    norm = functools.partial(GroupNormAct, num_groups=4)
    return ResNetV2((1, 2), channels=(32, 48), num_classes=CLASSES, stem_chs=16, norm_layer=norm,
                    conv_layer=StdConv2dSame, stem_type="same")  # fmt: skip


def _same_padded() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e3_c16_se0.25"], ["ir_r1_k3_s2_e3_c24"]]
    return EfficientNet(decode_arch_def(blocks), CLASSES, num_features=48, stem_size=8, pad_type="same",
                        act_layer=nn.SiLU)  # fmt: skip


def _grouped() -> nn.Module:
    cfg = RegNetCfg(depth=4, w0=16, wa=16.0, wm=1.3, group_size=8, se_ratio=0.25, stem_width=8)
    return RegNet(cfg, num_classes=CLASSES)


def _windowed() -> nn.Module:
    return SwinTransformer(img_size=64, num_classes=CLASSES, embed_dim=16, depths=(2, 1), num_heads=(2, 4),
                           window_size=4, drop_path_rate=0.0)  # fmt: skip


def _dense() -> nn.Module:
    return DenseNet(growth_rate=8, block_config=(2, 2), num_classes=CLASSES)


def _straight() -> nn.Module:
    # no batch norm: each conv's output is overwritten by the ReLU behind it
    model = VGG([8, 16, "M", 16, 16, "M"], num_classes=CLASSES)
    model.pre_logits = nn.AdaptiveAvgPool2d(1)
    model.head.fc = nn.Linear(16, CLASSES)
    return model


def _reparameterised() -> nn.Module:
    """RepVGG's and MobileOne's blocks as they train: sums of parallel convs and norms."""
    blocks = (
        ByoBlockCfg(type="rep", d=2, c=16, s=2, gs=8),
        ByoBlockCfg(type="one", d=1, c=16, s=2, gs=1, block_kwargs={"num_conv_branches": 2}),
        ByoBlockCfg(type="one", d=1, c=24, s=1, gs=0),
    )
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=CLASSES)


def _second_input() -> nn.Module:
    model = DLA(levels=(1, 1, 1, 2, 1, 1), channels=(8, 8, 16, 16, 24, 24), num_classes=CLASSES, block=DlaBasic)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # made for norms that measure; with statistics drawn at random the logits would be in the hundreds
            module.weight.data.mul_(0.5)
    return model


def _class_token() -> nn.Module:
    return PoolingVisionTransformer(img_size=64, patch_size=8, stride=8, base_dims=(8, 8), depth=(1, 2), heads=(2, 4),
                                    mlp_ratio=2, num_classes=CLASSES)  # fmt: skip


def _pooled() -> nn.Module:
    return MetaFormer(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=CLASSES, use_mlp_head=False)


def _mixed_kernels() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3.5_s2_e2_c16"], ["ir_r1_k3.5.7_s2_e3_c24"]]
    return EfficientNet(decode_arch_def(blocks), CLASSES, num_features=48, stem_size=8, pad_type="same")


def _timm(name: str) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=CLASSES)


BASES: Mapping[str, Callable[[], nn.Module]] = {
    "plain": _timm("test_resnet"),
    "grouped": _grouped,
    "weight-standardised": _weight_standardised,
    "norm-free": _timm("test_nfnet"),
    "same-padded": _same_padded,
    "reused": ReusedNet,
    "overwriting": lambda: TinyNet(OverwritingBlock(), OverwritingBlock()),
    "windowed": _windowed,
    "dense": _dense,
    "straight": _straight,
    "layer-scaled": _timm("test_convnext"),
    "depth-wise": _timm("test_efficientnet"),
    "hard-swish": _timm("mobilenetv3_small_050"),
    "tokens": _timm("test_vit"),
    "re-parameterised": _reparameterised,
    "second-input": _second_input,
    "class-token": _class_token,
    "pooled": _pooled,
    "mixed-kernels": _mixed_kernels,
    "functional-dropout": lambda: TinyNet(DroppingBlock(), DroppingBlock()),
}
# timm builds this one for a fixed input
_SIZES = {"tokens": 160}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms, scales, gains, biases and running statistics values that are neither zero nor one."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf in ("bias", "running_mean"):
            uniform(tensor, -0.2, 0.2)
        elif leaf in ("running_var", "gamma", "gain", "skipinit_gain") or (leaf == "weight" and tensor.ndim == 1):
            uniform(tensor, 0.5, 1.5)
    return model


def make_model(trait: str, seed: int = 0) -> nn.Module:
    """Build a tiny base in eval mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BASES[trait]()
    return randomise(model, seed).eval()


def input_side(trait: str) -> int:
    return _SIZES.get(trait, 64)


def make_images(trait: str, batch: int = 2, seed: int = 0) -> torch.Tensor:
    side = input_side(trait)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def make_backbone(trait: str, seed: int = 0) -> Backbone:
    return describe_model(make_model(trait, seed), input_side(trait))


@functools.cache
def surveyed(trait: str) -> tuple[Backbone, Survey]:
    """A tiny base with its sites, built once: read only."""
    backbone = make_backbone(trait)
    return backbone, survey(backbone)


@torch.no_grad()
def enliven(adapters: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Add noise to every parameter, as training would, so that adapters that start at zero do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
