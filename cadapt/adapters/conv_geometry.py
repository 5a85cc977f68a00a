"""How a Conv-Adapter is cut to a site: its width, kernel, stride and padding, or the reason why none would do.

Everything here is arithmetic over a site's record. The rule throughout is that Δ covers the same grid as what it is
added to, with the adapted component's own kernel where it has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cadapt.adapters.conv_settings import ConvAdapterConfig
from cadapt.adapters.tokens import explain_grid
from cadapt.plan import Form
from cadapt.site import PaddingMode, Pair, Site

DEFAULT_GAMMA = 4
DEFAULT_POOL = 2
# beside pooling, global attention or an MLP there is no kernel to copy: the least that sees neighbours
DEFAULT_KERNEL = 3


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Kernel, stride, padding and dilation of an adapter's first conv, as a :class:`Site` gives them."""

    kernel: Pair
    stride: Pair
    padding: Pair | Literal["same"]
    dilation: Pair
    padding_mode: PaddingMode = "zeros"


def input_channels(site: Site, form: Form) -> int:
    """Channels of what the adapter is given: the site's input beside it, its output behind it."""
    return site.out_channels if form == "sequential" else site.in_channels


def input_grid(site: Site, form: Form) -> Pair | None:
    """Height and width of what the adapter is given, or None where there is no grid."""
    return site.output_grid if form == "sequential" else site.grid


def find_width(site: Site, form: Form, config: ConvAdapterConfig) -> int | None:
    """The bottleneck's channels w, or None where γ leaves no whole groups."""
    channels = input_channels(site, form)
    if config.down == "spatial":
        return channels
    width = max(1, channels // (config.gamma or DEFAULT_GAMMA))
    if channels % width == 0 or config.conv_type != "depthwise":
        return width
    if config.gamma is not None:
        return None
    divisors = [value for value in range(1, channels + 1) if channels % value == 0]
    return min(divisors, key=lambda value: abs(math.log(value / width)))


def find_pool(config: ConvAdapterConfig) -> int:
    """The side in pixels of the average pool in front of Δ; 1 is none."""
    return (config.gamma or DEFAULT_POOL) if config.down == "spatial" else 1


def find_geometry(site: Site, form: Form, config: ConvAdapterConfig) -> Geometry | None:
    """Kernel, stride and padding that keep the adapted component's grid, or None where K cannot."""
    own, padding = _own_kernel(site)
    if form == "sequential":
        own = (own[0] - 1 + own[0] % 2, own[1] - 1 + own[1] % 2)
    wanted = (config.kernel, config.kernel) if config.kernel else own
    if config.conv_type == "linear":
        wanted = (1, 1)
    if form == "sequential":
        if wanted[0] % 2 == 0:
            return None
        kept = (site.dilation[0] * (wanted[0] // 2), site.dilation[1] * (wanted[1] // 2))
        return Geometry(kernel=wanted, stride=(1, 1), padding=kept, dilation=site.dilation)
    if padding == "same":
        return _beside(site, wanted, "same")
    grown = [site.dilation[axis] * (wanted[axis] - own[axis]) for axis in (0, 1)]
    # a kernel that grows by an odd number has no middle to grow from: with a stride it may keep the grid all the same
    for extra in (0, 1) if grown[0] % 2 or grown[1] % 2 else (0,):
        padding_now = (padding[0] + (grown[0] + extra) // 2, padding[1] + (grown[1] + extra) // 2)
        geometry = _beside(site, wanted, padding_now)
        keeps = site.grid is not None and reached_grid(site.grid, geometry) == site.output_grid
        if min(padding_now) >= 0 and (keeps or not (grown[0] % 2 or grown[1] % 2)):
            return geometry
    return None


def _beside(site: Site, kernel: Pair, padding: Pair | Literal["same"]) -> Geometry:
    return Geometry(
        kernel=kernel,
        stride=site.stride,
        padding=padding,
        dilation=site.dilation,
        padding_mode=site.padding_mode,
    )


def _own_kernel(site: Site) -> tuple[Pair, Pair | Literal["same"]]:
    """The adapted component's kernel and padding, or the default ones, which give ceil(H / stride) rows."""
    if site.kernel is not None:
        return site.kernel, site.padding
    reach = DEFAULT_KERNEL // 2
    padding = (site.dilation[0] * reach, site.dilation[1] * reach)
    return (DEFAULT_KERNEL, DEFAULT_KERNEL), "same" if site.padding == "same" else padding


def reached_grid(grid: Pair, geometry: Geometry) -> Pair:
    """Height and width of what a conv gives from a grid."""

    def side(axis: int) -> int:
        if geometry.padding == "same":
            return -(-grid[axis] // geometry.stride[axis])
        reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
        return (grid[axis] + 2 * geometry.padding[axis] - reach) // geometry.stride[axis] + 1

    return side(0), side(1)


def explain_misfit(site: Site, form: Form, config: ConvAdapterConfig) -> str | None:
    """Why a Conv-Adapter with these settings cannot stand at a site, or None where it can."""
    reason = explain_grid(site, form)
    if reason is not None:
        return reason
    grid, out_grid = input_grid(site, form), site.output_grid
    assert grid is not None and out_grid is not None, site.name
    if find_width(site, form, config) is None:
        channels = input_channels(site, form)
        gammas = [str(value) for value in (1, 2, 4, 8, 16, 32) if channels % value == 0]
        return f"{channels} channels do not divide by γ={config.gamma}; here γ can be {', '.join(gammas)}"
    geometry = find_geometry(site, form, config)
    if geometry is None:
        own, padding = _own_kernel(site)
        return f"K={config.kernel or 1} cannot keep the grid of this {_show(own)} kernel with padding {padding}"
    reached = reached_grid(grid, geometry)
    if reached != out_grid:
        return (
            f"a {_show(geometry.kernel)} kernel with stride {_show(geometry.stride)} takes its {_show(grid)} grid "
            f"to {_show(reached)}, not to {_show(out_grid)}"
        )
    pool = find_pool(config)
    if min(reached_grid((grid[0] // pool, grid[1] // pool), geometry)) < 1 or min(grid) < pool:
        return f"its {_show(grid)} grid is too small to be pooled by {pool} for a {_show(geometry.kernel)} kernel"
    return explain_padding((grid[0] // pool, grid[1] // pool), geometry)


def explain_padding(grid: Pair, geometry: Geometry) -> str | None:
    """Why a map is too small to be padded by what it shows itself, or None where it is not: torch would fail."""
    if geometry.padding == "same" or geometry.padding_mode not in ("reflect", "circular"):
        return None
    most = [side - 1 if geometry.padding_mode == "reflect" else side for side in grid]
    if all(padding <= limit for padding, limit in zip(geometry.padding, most, strict=True)):
        return None
    mode = geometry.padding_mode
    return f"its {_show(grid)} grid is too small to be padded by {_show(geometry.padding)} in the mode '{mode}'"


def _show(sides: Pair) -> str:
    return f"{sides[0]}×{sides[1]}"
