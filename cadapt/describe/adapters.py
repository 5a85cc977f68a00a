"""What one adapter of a plan is made of: its kernel, its parameters and its cost, counted on a build without data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from cadapt.adapters import get_scheme
from cadapt.graph.operators import shape_of
from cadapt.merging.measure import adapter_input, count_macs
from cadapt.plan import Form, Insertion, Plan
from cadapt.planning import Survey
from cadapt.site import Pair, Site, SiteKind

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """An adapter at a site. ``kernel`` is its own largest one, which need not be the site's; None without a conv."""

    site: str
    kind: SiteKind
    form: Form
    kernel: Pair | None
    parameters: int


def summarise_adapters(plan: Plan) -> tuple[AdapterSummary, ...]:
    """Return what a plan's adapters are, in its order."""
    return tuple(_summarise(insertion) for insertion in plan.insertions)


def count_adapter_macs(plan: Plan, surveyed: Survey) -> int:
    """Multiply–accumulates that a plan's adapters add to one picture's forward pass, by the convention ``macs``."""
    given = next(node for node in surveyed.graph.nodes if node.op == "placeholder")
    located = {(item.site.kind, item.site.path, item.site.call): item for item in surveyed.located}
    total = 0
    for insertion in plan.insertions:
        site = insertion.site
        place = located[site.kind, site.path, site.call]
        # inside window attention the windows of a picture stand side by side as items of the batch
        items = _batch_of(place.output if insertion.form == "sequential" else place.input)
        total += _count_macs(*_likeness(insertion)) * items // _batch_of(given)
    return total


def _batch_of(node: fx.Node) -> int:
    shape = shape_of(node)
    assert shape is not None, node
    return shape[0]


def _summarise(insertion: Insertion) -> AdapterSummary:
    site = insertion.site
    kernel, parameters = _measure(*_likeness(insertion))
    return AdapterSummary(site=site.name, kind=site.kind, form=insertion.form, kernel=kernel, parameters=parameters)


def _likeness(insertion: Insertion) -> tuple[str, Site, Form, Settings]:
    """An insertion without its place: adapters at equal sites are equal, and most blocks of a model are."""
    anywhere = replace(insertion.site, path="", call=0, stage=None)
    return insertion.scheme, anywhere, insertion.form, insertion.settings


@functools.lru_cache(maxsize=4096)
def _measure(scheme: str, site: Site, form: Form, settings: Settings) -> tuple[Pair | None, int]:
    adapter = _build(scheme, site, form, settings)
    parameters = sum(item.numel() for item in adapter.parameters() if item.requires_grad)
    return kernel_of(adapter), parameters


@functools.lru_cache(maxsize=4096)
def _count_macs(scheme: str, site: Site, form: Form, settings: Settings) -> int:
    return count_macs(_build(scheme, site, form, settings).eval(), adapter_input(site, form))


def _build(scheme: str, site: Site, form: Form, settings: Settings) -> nn.Module:
    method = get_scheme(scheme)
    with torch.device("meta"):
        return method.build(site, form, method.configure(dict(settings)))


def kernel_of(adapter: nn.Module) -> Pair | None:
    """The kernel of an adapter's largest convolution, or None where it has none.

    >>> kernel_of(nn.Sequential(nn.Conv2d(8, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 8, 1)))
    (3, 3)
    """
    convs = (module for module in adapter.modules() if isinstance(module, nn.Conv2d))
    height, width = max((conv.kernel_size for conv in convs), key=math.prod, default=(0, 0))
    return (height, width) if height else None
