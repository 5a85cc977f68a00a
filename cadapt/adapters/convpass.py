"""Convpass: a convolutional bottleneck past each attention and MLP branch of a transformer's block.

Jie and Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv 2207.07039:
X ← X + Block(LN X) + s·CP(LN X), for ViT and Swin; where the norm closes the branch (Swin-v2) the bypass reads X and
joins behind the norm. It stands beside any branch that attends or is an MLP on a grid, one that
shrinks the grid included. Where the block drops paths, one draw drops branch and bypass (the paper's code draws twice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from cadapt.adapters.scaling import with_scale_folded
from cadapt.adapters.scheme import MergedLayer, Placement, Refusal, Scheme, joining
from cadapt.adapters.tokens import explain_grid, from_map, to_map
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Layout, Pair, Site, SiteKind

_WIDEST = 1024
_LARGEST_SCALE = 1e6


@dataclass(frozen=True, kw_only=True)
class ConvpassConfig:
    """Settings of Convpass.

    Args:
        h: channels of the bottleneck.
        s: what the bypass is scaled by. The paper searches 0.01, 0.1, 1, 10 and 100 per task; 1 is its code's default.
        dropout: rate of the dropout before the last map; it lives in training only.
        conv_init: whether the conv starts as the ``identity``, or ``xavier`` (the paper's code has both).

    Raises:
        UsageError: a value out of its range.
    """

    h: int = 8
    s: float = 1.0
    dropout: float = 0.1
    conv_init: Literal["identity", "xavier"] = "identity"

    def __post_init__(self) -> None:
        if not 1 <= self.h <= _WIDEST:
            raise UsageError(f"h is {self.h}, expected 1 to {_WIDEST}", hint="try --set h=8")
        if not 0 < self.s < _LARGEST_SCALE:
            raise UsageError(f"s is {self.s:g}, expected a positive number", hint="try --set s=0.1")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout:g}, expected 0 or more, below 1", hint="try --set dropout=0.1")


class Convpass(nn.Module):
    """Δ(X) = s · W_up(dropout(σ(Conv3×3(σ(W_down X))))) with σ(x) = x·sigmoid(1.702x), arXiv 2207.07039.

    Maps what ``layout`` says, ``[B, C_in, H, W]``, ``[B, H, W, C_in]`` or tokens ``[B, P + H·W, C_in]``, to the same
    with C_out channels; ``grid`` is the tokens' (H, W). Each of P ``prefix_tokens`` goes through the conv alone, as a
    picture of one pixel, in which only the kernel's centre tap meets anything. With a ``stride`` the grid shrinks to
    ⌈H / stride⌉, and the prefix tokens stay. Parameters: C_in·h + h + 9·h² + h + h·C_out + C_out.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        scale: float,
        dropout: float,
        stride: Pair = (1, 1),
        layout: Layout = "NLC",
        grid: Pair | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_channels, width)
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, out_channels)
        self.scale = scale
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        if self.layout == "NCHW":
            # linear maps work on the last axis; what is laid out for the conv has h channels only
            return self._bypass(x.permute(0, 2, 3, 1), "NHWC").permute(0, 3, 1, 2)
        return self._bypass(x, self.layout)

    def _bypass(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Δ with the channels last: a map, or tokens."""
        hidden = _quick_gelu(self.down(x))
        map_BhHW, prefix_BhP1 = to_map(hidden, layout, self.grid, self.prefix_tokens)
        if layout == "NLC" and self.prefix_tokens:
            prefix_BhP1 = nn.functional.conv2d(prefix_BhP1, self.conv.weight[:, :, 1:2, 1:2], self.conv.bias)
        hidden = from_map(self.conv(map_BhHW), prefix_BhP1, layout, self.prefix_tokens)
        delta: torch.Tensor = self.up(self.dropout(_quick_gelu(hidden)))
        return delta if self.scale == 1.0 else self.scale * delta


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _build(site: Site, form: Form, config: ConvpassConfig) -> Convpass:
    adapter = Convpass(
        site.in_channels,
        config.h,
        site.out_channels,
        scale=config.s,
        dropout=config.dropout,
        stride=site.stride,
        layout=site.layout,
        grid=site.grid,
        prefix_tokens=site.prefix_tokens,
    )
    _initialise(adapter, config.conv_init)
    return adapter


@torch.no_grad()
def _initialise(adapter: Convpass, conv_init: str) -> None:
    """The paper's code's initialisation: W_up is zero, so that the bypass adds nothing at first."""
    nn.init.xavier_uniform_(adapter.down.weight)
    if conv_init == "identity":
        nn.init.dirac_(adapter.conv.weight)
    else:
        nn.init.xavier_uniform_(adapter.conv.weight)
    nn.init.zeros_(adapter.up.weight)
    for layer in (adapter.down, adapter.conv, adapter.up):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _explain_misfit(site: Site, form: Form, config: ConvpassConfig) -> str | None:
    """Why Convpass cannot stand at a site, or None where it can."""
    if form != "bypass":
        return f"Convpass joins as a bypass, and not in the form '{form}'"
    reason = explain_grid(site, form)
    if reason is not None:
        return reason
    grid, wanted = site.grid, site.output_grid
    assert grid is not None and wanted is not None, site.name
    reached = (math.ceil(grid[0] / site.stride[0]), math.ceil(grid[1] / site.stride[1]))
    if reached != wanted:
        return (
            f"its 3×3 conv with stride {_show(site.stride)} takes the {_show(grid)} grid to {_show(reached)}, "
            f"where the branch gives {_show(wanted)}"
        )
    return None


def _show(sides: Pair) -> str:
    return f"{sides[0]}×{sides[1]}"


def fold_scale(adapter: nn.Module, config: ConvpassConfig) -> tuple[nn.Module, ConvpassConfig]:
    """Return an equal adapter with s = 1, folded into its last map."""
    return with_scale_folded(adapter), replace(config, s=1.0)


def _refuse_merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Refusal | MergedLayer:
    return Refusal(reason="its two QuickGELUs, before and behind the 3×3 conv, are not linear")


def _beside(*kinds: SiteKind) -> Callable[[Iterable[Site], ConvpassConfig], tuple[Placement, ...]]:
    def select(sites: Iterable[Site], config: ConvpassConfig) -> tuple[Placement, ...]:
        """The branches of these kinds: all where one has a grid, so that ``fits`` tells of those that have none."""
        branches = [site for site in sites if site.kind in kinds]
        if not any(site.grid for site in branches):
            return ()
        return tuple(Placement(site=site, form="bypass") for site in branches)

    return select


def _scheme(name: str, summary: str, needs: str, *kinds: SiteKind) -> Scheme:
    return Scheme(
        name=name,
        paper="arXiv 2207.07039",
        summary=summary,
        config=ConvpassConfig,
        needs=needs,
        joins=joining("bypass", *kinds),
        select=_beside(*kinds),
        fits=_explain_misfit,
        build=_build,
        merge=_refuse_merge,
        simplify=fold_scale,
    )


SCHEMES = (
    _scheme(
        "convpass",
        "convolutional bottleneck past each attention and MLP branch",
        "attention or MLP branches on a grid, as ViT and Swin have",
        "attention",
        "mlp",
    ),
    _scheme(
        "convpass-attn",
        "convolutional bottleneck past each attention branch",
        "attention branches on a grid, as ViT and Swin have",
        "attention",
    ),
)
