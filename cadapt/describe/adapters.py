"""What one adapter of a plan is made of: its own kernel and its parameters, counted on a build without data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cadapt.adapters import get_scheme
from cadapt.plan import Form, Insertion, Plan
from cadapt.site import Pair, Site, SiteKind


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


def _summarise(insertion: Insertion) -> AdapterSummary:
    site, form = insertion.site, insertion.form
    settings = tuple(sorted(insertion.config.items()))
    kernel, parameters = _measure(insertion.scheme, _anywhere(site), form, settings)
    return AdapterSummary(site=site.name, kind=site.kind, form=form, kernel=kernel, parameters=parameters)


def _anywhere(site: Site) -> Site:
    """The site without its place: adapters at equal sites are equal, and most blocks of a model are."""
    return replace(site, path="", call=0, stage=None)


@functools.lru_cache(maxsize=4096)
def _measure(scheme: str, site: Site, form: Form, settings: tuple[tuple[str, Any], ...]) -> tuple[Pair | None, int]:
    method = get_scheme(scheme)
    with torch.device("meta"):
        adapter = method.build(site, form, method.configure(dict(settings)))
    parameters = sum(item.numel() for item in adapter.parameters() if item.requires_grad)
    return kernel_of(adapter), parameters


def kernel_of(adapter: nn.Module) -> Pair | None:
    """The kernel of an adapter's largest convolution, or None where it has none.

    >>> kernel_of(nn.Sequential(nn.Conv2d(8, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 8, 1)))
    (3, 3)
    """
    convs = (module for module in adapter.modules() if isinstance(module, nn.Conv2d))
    height, width = max((conv.kernel_size for conv in convs), key=math.prod, default=(0, 0))
    return (height, width) if height else None
