"""Trained-like models to merge: tiny bases with adapters whose every parameter is random, and toys for odd convs."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.backbone import Backbone, describe_model
from cadapt.planning import Survey, plan_insertions, survey, with_head
from cadapt.surgery import operate
from tests.models import TinyNet, enliven, randomise, surveyed

CLASSES = 5


class ConvBlock(nn.Module):
    """act(conv(x)) joined to a shortcut that keeps its shape; with a norm behind the conv where asked."""

    def __init__(self, conv: nn.Conv2d, *, norm: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.act = nn.ReLU()
        self.project = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride=conv.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))) + self.project(x)


class TiedNet(TinyNet):
    """Two convs that share one weight."""

    def __init__(self) -> None:
        super().__init__(*(ConvBlock(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)))
        self.blocks[1].conv.weight = self.blocks[0].conv.weight


def toy(conv: nn.Conv2d, *, norm: bool = False) -> tuple[Backbone, Survey]:
    """A tiny base around one conv of 8 channels, and its sites."""
    model = TinyNet(ConvBlock(conv, norm=norm))
    model.fc = nn.Linear(conv.out_channels, CLASSES)
    return traced(model)


def traced(model: nn.Module, side: int = 64) -> tuple[Backbone, Survey]:
    backbone = describe_model(randomise(model).eval(), side)
    return backbone, survey(backbone)


def same_padded(**settings: Any) -> nn.Conv2d:
    conv: nn.Conv2d = Conv2dSame(8, 8, **settings)
    return conv


def trained(base: str | tuple[Backbone, Survey], scheme: str, **settings: Any) -> AdaptedModel:
    """A base with random, non-zero adapters and a head of its own."""
    backbone, sites = surveyed(base) if isinstance(base, str) else base
    plan = plan_insertions(backbone, scheme, settings, surveyed=sites)
    model = operate(backbone, with_head(plan, backbone, CLASSES), sites)
    enliven(model.adapters, scale=0.3)
    return model


def linear(base: str | tuple[Backbone, Survey], scheme: str = "conv-par", **settings: Any) -> AdaptedModel:
    """The same without a non-linearity in the adapters."""
    return trained(base, scheme, activation="identity", **settings)
