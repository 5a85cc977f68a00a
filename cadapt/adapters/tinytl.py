"""TinyTL's lite residual: beside each block a shallow branch that works on pooled maps, so that little is remembered.

Cai et al., "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning", arXiv 2007.11622, section 3.2 and
figure 2; the sizes are those of the authors' code. ``tinytl+bias`` is what the paper calls lite residual and bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.layers import make_divisible
from torch import nn
from torch.nn import functional

from cadapt.adapters.scheme import MergedLayer, Placement, Refusal, Scheme, joining
from cadapt.adapters.tokens import explain_grid, from_map, to_map
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Layout, Pair, Site

_WIDTH_STEP = 8
_CHANNELS_PER_GROUP = 8
_LARGEST = {"kernel": 63, "pool": 64, "groups": 1024, "expand": 64}


@dataclass(frozen=True, kw_only=True)
class LiteResidualConfig:
    """Settings of the lite residual; the defaults are the paper's.

    Args:
        kernel: the largest kernel of the grouped conv, odd. On maps that are smaller when pooled it is the largest odd
            one that they hold.
        pool: side of the average pool. A side that it would bring to one pixel is averaged as a whole.
        groups: of the first conv; they must divide the block's input channels.
        expand: the branch's width over the input channels; the width is rounded to a multiple of 8 (and of ``groups``).
            The paper's nets have narrow blocks; beside those of a ResNet or a ViT the default is larger than the block
            itself, and a small ``expand`` with more ``groups`` keeps it small.

    Raises:
        UsageError: an even kernel, or a value out of its range.
    """

    kernel: int = 5
    pool: int = 2
    groups: int = 2
    expand: float = 1.0

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not 0 < value <= largest:
                raise UsageError(f"{name} is {value}, expected more than 0 and at most {largest}")
        if self.kernel % 2 == 0:
            raise UsageError(f"kernel is {self.kernel}, expected an odd number: another would shift the map")


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The pool's window, the kernel and the stride by axis, and the output's grid beyond ceil(H / stride)."""

    window: Pair
    kernel: Pair
    stride: Pair
    excess: Pair


class LiteResidual(nn.Module):
    """Δ(x) = Up(GN(PW(ReLU(GN(Conv(AvgPool(x))))))), arXiv 2007.11622 section 3.2, added to a block's output.

    Maps ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``, the block's output size, by bilinear interpolation. Where
    ``layout`` says so it does the same on ``[B, H, W, C]`` and on tokens ``[B, P + H·W, C]``, ``grid`` being their
    (H, W). The paper has maps only; of P ``prefix_tokens`` each goes through by itself, as a picture of one pixel,
    which is nothing to pool and meets the kernel's centre tap alone. The norms are group norms with 8 channels to a
    group, as the authors' code puts in place of batch norms for small batches, or as near to 8 as divides; that code
    also standardises the convs' weights, which is left out. The last norm's weight starts at zero, the paper's way
    too. Parameters: C_in·K²·w / groups + w·C_out + 2w + 2·C_out.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        sizes: _Sizes,
        groups: int,
        layout: Layout = "NCHW",
        grid: Pair | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        rows, columns = sizes.kernel
        self.pool = nn.AvgPool2d(sizes.window)
        self.conv = nn.Conv2d(
            in_channels,
            width,
            sizes.kernel,
            stride=sizes.stride,
            padding=(rows // 2, columns // 2),
            groups=groups,
            bias=False,
        )
        self.norm = nn.GroupNorm(find_norm_groups(width), width)
        self.activation = nn.ReLU()
        self.pointwise = nn.Conv2d(width, out_channels, 1, bias=False)
        self.final_norm = nn.GroupNorm(find_norm_groups(out_channels), out_channels)
        self.stride, self.excess = sizes.stride, sizes.excess
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens
        for conv in (self.conv, self.pointwise):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.final_norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        map_BCHW, prefix_BCP1 = to_map(x, self.layout, self.grid, self.prefix_tokens)
        height, width = map_BCHW.shape[2:]
        size = [-(-height // self.stride[0]) + self.excess[0], -(-width // self.stride[1]) + self.excess[1]]
        refined = self._refine(self.pool(map_BCHW))
        delta = functional.interpolate(refined, size, mode="bilinear", align_corners=False)
        if self.prefix_tokens:
            prefix_BCP1 = self._refine_alone(prefix_BCP1)
        return from_map(delta, prefix_BCP1, self.layout, self.prefix_tokens)

    def _refine(self, pooled: torch.Tensor) -> torch.Tensor:
        """All but pooling and interpolation: [B, C_in, h, w] to [B, C_out, h', w']."""
        hidden = self.activation(self.norm(self.conv(pooled)))
        mixed: torch.Tensor = self.pointwise(hidden)
        # autocast computes norms in fp32: back to the convs' dtype, or all that follows the joint would be fp32
        normed: torch.Tensor = self.final_norm(mixed).to(mixed.dtype)
        return normed

    def _refine_alone(self, prefix_BCP1: torch.Tensor) -> torch.Tensor:
        """Each prefix token as a picture of its own: [B, C_in, P, 1] to [B, C_out, P, 1]."""
        pixels = prefix_BCP1.transpose(1, 2).flatten(0, 1).unsqueeze(3)
        refined = torch.unflatten(self._refine(pixels).flatten(1), 0, (-1, self.prefix_tokens))
        return refined.transpose(1, 2).unsqueeze(3)


def find_norm_groups(channels: int) -> int:
    """The number of groups of a group norm: that whose groups are nearest to 8 channels, in ratio."""
    divisors = [value for value in range(1, channels + 1) if channels % value == 0]
    size = min(divisors, key=lambda value: abs(math.log(value / _CHANNELS_PER_GROUP)))
    return channels // size


def _find_width(site: Site, config: LiteResidualConfig) -> int:
    """The branch's channels: the input's times ``expand``, to a multiple of 8, as in the authors' code."""
    step = math.lcm(_WIDTH_STEP, config.groups)
    return int(make_divisible(int(site.in_channels * config.expand), step))


def _find_sizes(site: Site, config: LiteResidualConfig) -> _Sizes:
    grid, out_grid = site.grid, site.output_grid
    assert grid is not None and out_grid is not None, site.name
    whole = [side // config.pool <= 1 for side in grid]
    pooled = [1 if whole[axis] else grid[axis] // config.pool for axis in (0, 1)]
    # the largest odd side that the pooled map holds, up to the setting
    kernel = [min(config.kernel, side - 1 + side % 2) for side in pooled]
    excess = [out_grid[axis] - -(-grid[axis] // site.stride[axis]) for axis in (0, 1)]
    return _Sizes(
        window=(grid[0] if whole[0] else config.pool, grid[1] if whole[1] else config.pool),
        kernel=(kernel[0], kernel[1]),
        stride=site.stride,
        excess=(excess[0], excess[1]),
    )


def _build(site: Site, form: Form, config: LiteResidualConfig) -> LiteResidual:
    return LiteResidual(
        site.in_channels,
        _find_width(site, config),
        site.out_channels,
        sizes=_find_sizes(site, config),
        groups=config.groups,
        layout=site.layout,
        grid=site.grid,
        prefix_tokens=site.prefix_tokens,
    )


def _select(sites: Iterable[Site], config: LiteResidualConfig) -> tuple[Placement, ...]:
    """Whole blocks with a grid."""
    return tuple(Placement(site=site, form="parallel") for site in sites if site.kind == "block" and site.grid)


def _explain_misfit(site: Site, form: Form, config: LiteResidualConfig) -> str | None:
    """Why no lite residual with these settings can stand at a site, or None where one can."""
    reason = explain_grid(site, form)
    if reason is None and site.in_channels % config.groups:
        return f"{config.groups} groups do not divide its {site.in_channels} input channels"
    return reason


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> MergedLayer | Refusal:
    return Refusal(reason="its norms and its ReLU are not linear")


SCHEMES = (
    Scheme(
        name="tinytl",
        paper="arXiv 2007.11622",
        summary="TinyTL's lite residual beside each block",
        config=LiteResidualConfig,
        needs="blocks on a grid (a branch of convs, attention or an MLP added to a shortcut, or modules that repeat)",
        joins=joining("parallel", "block"),
        select=_select,
        fits=_explain_misfit,
        build=_build,
        merge=_merge,
    ),
)
