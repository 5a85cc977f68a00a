"""The figures a merge is judged by: errors on random input, an adapter's effect, and what it costs.

Every comparison is between two ways to compute the same thing, in one precision, on input that no training saw.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cadapt.meta import meta_copy
from cadapt.plan import Form, Insertion
from cadapt.site import Site


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The largest difference over the largest value, and ‖Δ‖/‖h‖ on the first input (None where h is zero)."""

    error: float
    effect: float | None = None


def _inputs(site: Site, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Random input at the site's own size, and on a grid one larger: padding may depend on the parity of the size."""
    generator = torch.Generator().manual_seed(0)
    yield torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)
    if site.layout == "NCHW" and len(shape) == 3:
        larger = (1, shape[0], shape[1] + 1, shape[2] + 1)
        yield torch.randn(larger, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def compare_layers(
    insertion: Insertion, adapter: nn.Module, layer: nn.Module, merged: nn.Module, dtype: torch.dtype
) -> Comparison:
    """Compare a merged layer with the layer and its adapter, all in one precision.

    Args:
        insertion: where and how the adapter stands.
        adapter: the trained adapter.
        layer: the base's layer.
        merged: the layer that is to stand for both.
        dtype: the precision to compute in.
    """
    parts = (copy.deepcopy(part).to(dtype).eval() for part in (adapter, layer, merged))
    adapter, layer, merged = parts
    errors: list[float] = []
    effects: list[float | None] = []
    for x in _inputs(insertion.site, insertion.site.in_shape, dtype):
        hidden = layer(x)
        delta = adapter(x if insertion.form != "sequential" else hidden)
        if effects and delta.shape != hidden.shape:
            continue  # an even kernel and an odd one agree on the grids of one parity only: no such input is adapted
        errors.append(relative_error(merged(x), hidden + delta))
        effects.append(share_of(delta, hidden))
    return Comparison(error=_worst(errors), effect=effects[0])


@torch.no_grad()
def compare_adapters(insertion: Insertion, adapter: nn.Module, other: nn.Module, dtype: torch.dtype) -> Comparison:
    """Compare two forms of one adapter in one precision; arguments as in :func:`compare_layers`."""
    adapter, other = (copy.deepcopy(part).to(dtype).eval() for part in (adapter, other))
    inputs = _inputs(insertion.site, adapter_input(insertion.site, insertion.form), dtype)
    return Comparison(error=_worst([relative_error(other(x), adapter(x)) for x in inputs]))


@torch.no_grad()
def effect_of(insertion: Insertion, adapter: nn.Module, layer: nn.Module | None) -> float | None:
    """‖Δ‖/‖h‖ on random input; None where the site is no single layer that can be called by itself, or h is zero."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    x = next(_inputs(insertion.site, insertion.site.in_shape, layer.weight.dtype))
    hidden = layer(x)
    delta = adapter(x if insertion.form != "sequential" else hidden)
    return share_of(delta, hidden)


def share_of(change: torch.Tensor, own: torch.Tensor) -> float | None:
    """The norm of one over the norm of the other: 0 where the first is zero, else None where the other is."""
    size = float(own.norm())
    if not bool(change.any()):
        return 0.0
    return float(change.norm()) / size if size else None


def adapter_input(site: Site, form: Form) -> tuple[int, ...]:
    """The shape, without the batch, of what an adapter at a site is given."""
    return site.out_shape if form == "sequential" else site.in_shape


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest absolute difference over the largest absolute value; infinite where the shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.abs().max())
    return float((got - wanted).abs().max()) / (scale or 1.0)


def _worst(errors: list[float]) -> float:
    # not max(): it may pass over a NaN
    return float(torch.tensor(errors, dtype=torch.float64).max())


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply–accumulates of one call on one input of that shape (without the batch), counted without data."""
    counter = FlopCounterMode(display=False)
    twin = meta_copy(module)
    dtype = next((parameter.dtype for parameter in twin.parameters()), torch.float32)
    with torch.no_grad(), counter:
        twin(torch.empty((1, *shape), device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2
