"""Finding the sites of a model, named by timm or a toy, without data."""

from __future__ import annotations

import functools

import timm
import torch
from torch import fx, nn

from cadapt.graph.sites import find_sites
from cadapt.graph.trace import record_shapes, trace
from cadapt.site import Site


def traced(model: nn.Module, side: int = 32) -> fx.Graph:
    """A trace with its shapes."""
    graph = trace(model)
    record_shapes(graph, model, (3, side, side))
    return graph


def sites_of(model: nn.Module, side: int = 32) -> tuple[Site, ...]:
    return find_sites(traced(model, side), model)


@functools.cache
def timm_sites(name: str, side: int = 224) -> tuple[Site, ...]:
    """The sites of a timm model of its real size."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return sites_of(model, side)


def of_kind(sites: tuple[Site, ...], kind: str) -> list[Site]:
    return [site for site in sites if site.kind == kind]
