"""At which input, and made how, an architecture is run: as small as it takes, with paths dropped in train mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from cadapt.backbone import Backbone, resolve_preprocessing
from cadapt.errors import CadaptError
from cadapt.plan import Base, Plan
from cadapt.planning import Survey, plan_insertions, survey, with_head
from tests.zoo.census import make_on_meta

SCHEMES = ("conv-par", "conv-seq", "res-par", "res-seq")
SIDES = (64, 96, 128, 160)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is made and how large its pictures are; ``side`` None is its own size."""

    name: str
    side: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def bare_backbone(name: str, model: nn.Module, side: int | None) -> Backbone:
    """A model as planning takes it, without the digest and the probe of its identity, which are tested elsewhere."""
    parameters = sum(item.numel() for item in model.parameters())
    base = Base(name=name, source="given", parameters=parameters, sha256="")
    return Backbone(model=model, base=base, preprocessing=resolve_preprocessing(model, side))


def make_plan(backbone: Backbone, scheme: str, surveyed: Survey) -> Plan:
    """A scheme's plan with a copy of the base's head, where it has one that can be copied.

    Raises:
        CadaptError: the scheme has nothing to adapt here.
    """
    plan = plan_insertions(backbone, scheme, surveyed=surveyed)
    try:
        return with_head(plan, backbone, None)
    except CadaptError:
        return plan


def count_adapters(backbone: Backbone, surveyed: Survey) -> dict[str, int | str]:
    """For each scheme how many adapters it places, or the reason why it refuses."""
    counts: dict[str, int | str] = {}
    for scheme in SCHEMES:
        try:
            counts[scheme] = len(plan_insertions(backbone, scheme, surveyed=surveyed).insertions)
        except CadaptError as error:
            counts[scheme] = error.message
    return counts


def choose_setting(name: str, native: Mapping[str, int | str]) -> tuple[Setting, Survey]:
    """The smallest input at which all schemes place what they place at the native size, with the survey there."""
    lively = _droppable(name)
    wanted = {scheme: count for scheme, count in native.items() if isinstance(count, int)}
    for setting in _candidates(replace(lively, side=None)):
        try:
            model = make_on_meta(name, **setting.arguments)
            backbone = bare_backbone(name, model, setting.side)
            _run_on_meta(model, backbone)
            surveyed = survey(backbone)
        except Exception:  # noqa: S112 - a size that a model does not take fails in as many ways as there are models
            continue
        counts = count_adapters(backbone, surveyed)
        if {scheme: count for scheme, count in counts.items() if isinstance(count, int)} == wanted:
            return setting, surveyed
    model = make_on_meta(name, **lively.arguments)
    return lively, survey(bare_backbone(name, model, None))


def _droppable(name: str) -> Setting:
    """The architecture with as much dropping in train mode as it lets one ask for."""
    for arguments in ({"drop_path_rate": 0.1, "drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"drop_rate": 0.1}):
        try:
            make_on_meta(name, **arguments)
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
        return Setting(name=name, arguments=arguments)
    return Setting(name=name)


def _candidates(setting: Setting) -> Iterator[Setting]:
    """Small sides first; a model built for one size is built for this one, where it takes that."""
    for side in SIDES:
        yield replace(setting, side=side)
        yield replace(setting, side=side, arguments={**setting.arguments, "img_size": side})


def _run_on_meta(model: nn.Module, backbone: Backbone) -> None:
    with torch.no_grad():
        model(torch.empty(2, *backbone.preprocessing.input_size, device="meta"))
