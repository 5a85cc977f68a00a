"""What one model offers for surgery: its stages, blocks and sites, and what every scheme would add to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cadapt.backbone import Backbone, check_architecture, load_backbone
from cadapt.costing import cost
from cadapt.describe.garbage import collecting_later
from cadapt.describe.schemes import USUAL_SCHEMES, SchemeSummary, summarise_schemes
from cadapt.planning import survey
from cadapt.site import Site

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """A run of blocks at one resolution: its path, its blocks, and the shape it gives (without the batch)."""

    index: int
    path: str
    blocks: int
    convs: int
    out_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """All of it for one model. ``activation_bytes`` of a scheme compares with that of the scheme ``full``.

    ``activation_batch`` is how many pictures they are of: a batch's, or one picture's share.
    """

    name: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    stages: tuple[StageSummary, ...]
    sites: tuple[Site, ...]
    schemes: tuple[SchemeSummary, ...]
    activation_batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        counts = Counter(site.kind for site in self.sites)
        return {"schema": SCHEMA, "kind": "model", **asdict(self), "site_counts": dict(counts)}


def describe_architecture(
    name: str,
    img_size: int | None = None,
    schemes: Sequence[str] = USUAL_SCHEMES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch: int | None = None,
) -> ModelSummary:
    """Describe a timm architecture, without its weights; arguments as :func:`summarise` takes them.

    Raises:
        UsageError: there is no such architecture or scheme.
    """
    check_architecture(name)
    with torch.device("meta"):
        backbone = load_backbone(name, pretrained=False, img_size=img_size)
    return summarise(backbone, schemes, progress, batch)


def summarise(
    backbone: Backbone,
    schemes: Sequence[str] = USUAL_SCHEMES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch: int | None = None,
) -> ModelSummary:
    """Describe a base: its structure, and what schemes would add.

    Args:
        backbone: the base; it is left as it was.
        schemes: names of schemes, or of several joined by ``+``.
        progress: called with how many schemes are done, and of how many.
        batch: pictures that activations are counted for; None for a picture's share.
    """
    with collecting_later():
        surveyed = survey(backbone)
        size = backbone.preprocessing.input_size
        plain = cost(backbone.model, size, training=False)
        summaries = summarise_schemes(backbone, surveyed, schemes, plain.macs, progress, batch)
    return ModelSummary(
        name=backbone.base.name,
        parameters=plain.parameters,
        macs=plain.macs,
        input_size=size,
        stages=_stages(surveyed.sites),
        sites=surveyed.sites,
        schemes=summaries,
        activation_batch=batch or 1,
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
