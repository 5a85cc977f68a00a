"""What one model offers for surgery: its stages, blocks and sites, and what every scheme would add to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cadapt.adapters import SCHEMES
from cadapt.backbone import Backbone, check_architecture, load_backbone
from cadapt.costing import cost
from cadapt.describe.adapters import AdapterSummary, summarise_adapters
from cadapt.planning import Survey, fitting_schemes, plan_insertions, survey
from cadapt.site import Site
from cadapt.surgery import operate

SCHEMA = 1
_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """A run of blocks at one resolution: its path, its blocks, and the shape it gives (without the batch)."""

    index: int
    path: str
    blocks: int
    convs: int
    out_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SchemeSummary:
    """What a scheme would add under its defaults, head left out; ``reason`` says why where it does not fit.

    ``macs_added`` is per picture; ``activation_bytes`` is what training keeps for backward, per picture.
    """

    name: str
    sites: int
    parameters: int
    share: float
    macs_added: int
    activation_bytes: int
    reason: str | None
    adapters: tuple[AdapterSummary, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """All of it for one model. ``activation_bytes`` of a scheme compares with that of the scheme ``full``."""

    name: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    stages: tuple[StageSummary, ...]
    sites: tuple[Site, ...]
    schemes: tuple[SchemeSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        counts = Counter(site.kind for site in self.sites)
        return {"schema": SCHEMA, "kind": "model", **asdict(self), "site_counts": dict(counts)}


def describe_architecture(name: str, img_size: int | None = None) -> ModelSummary:
    """Describe a timm architecture, without its weights.

    Raises:
        UsageError: there is no such architecture.
    """
    check_architecture(name)
    with torch.device("meta"):
        backbone = load_backbone(name, pretrained=False, img_size=img_size)
    return summarise(backbone)


def summarise(backbone: Backbone) -> ModelSummary:
    """Describe a base: its structure, and what each scheme would add."""
    surveyed = survey(backbone)
    size = backbone.preprocessing.input_size
    plain = cost(backbone.model, size, training=False)
    reasons = fitting_schemes(surveyed)
    return ModelSummary(
        name=backbone.base.name,
        parameters=plain.parameters,
        macs=plain.macs,
        input_size=size,
        stages=_stages(surveyed.sites),
        sites=surveyed.sites,
        schemes=tuple(_scheme(backbone, surveyed, name, reasons[name], plain.macs) for name in SCHEMES),
    )


def _stages(sites: tuple[Site, ...]) -> tuple[StageSummary, ...]:
    return tuple(
        StageSummary(
            index=site.stage or 0,
            path=site.path,
            blocks=sum(item.kind == "block" and item.stage == site.stage for item in sites),
            convs=sum(item.kind == "conv" and item.stage == site.stage for item in sites),
            out_shape=site.out_shape,
        )
        for site in sites
        if site.kind == "stage"
    )


def _scheme(backbone: Backbone, surveyed: Survey, name: str, reason: str | None, base_macs: int) -> SchemeSummary:
    if reason is not None:
        return SchemeSummary(
            name=name, sites=0, parameters=0, share=0.0, macs_added=0, activation_bytes=0, reason=reason
        )
    plan = plan_insertions(backbone, name, surveyed=surveyed)
    model = operate(backbone, plan, surveyed)
    # without a head nothing of a linear probe trains; the input of the classifier is all that its training keeps
    # two pictures: a batch norm that trains has no statistics of one picture whose maps are a single pixel
    spent = cost(model, backbone.preprocessing.input_size, batch=_BATCH)
    return SchemeSummary(
        name=name,
        sites=len(plan.insertions),
        parameters=spent.trainable_parameters,
        share=spent.trainable_parameters / max(1, backbone.base.parameters),
        macs_added=spent.macs - base_macs,
        activation_bytes=spent.activation_bytes // _BATCH,
        reason=None,
        adapters=summarise_adapters(plan),
    )
