"""Adapter files as training might have left them, made in no time: no value is zero, and the classes have names."""

from __future__ import annotations

from typing import Any

from cadapt.backbone import load_backbone
from cadapt.bundle import Bundle
from cadapt.library import to_bundle
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.surgery import operate
from tests.models import enliven

SIDE = 32
# of a fresh test_resnet the last norm of each block is zero, so that nothing inside a block would reach the logits
BASE = "test_efficientnet"
SITES = ("blocks.1.0.conv_exp", "blocks.2.0.conv_exp")


def lively_bundle(**settings: Any) -> Bundle:
    """Two Conv-Adapters for cats and dogs, on a base that is built again from its name and seed."""
    backbone = load_backbone(BASE, pretrained=False, img_size=SIDE)
    surveyed = survey(backbone)
    plan = plan_insertions(backbone, "conv-par", settings, include=SITES, surveyed=surveyed)
    model = operate(backbone, with_head(plan, backbone, 2), surveyed)
    enliven(model.adapters, scale=0.3)
    model.classes = ("cat", "dog")
    return to_bundle(model)
