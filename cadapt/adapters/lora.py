"""LoRA: an update of low rank for the weight of every convolution and linear layer of the blocks.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1: W + (α/r) B A, computed
as a path parallel to the layer. For a conv A has the conv's kernel and B is 1×1, group by group where it has groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from cadapt.adapters.conv_geometry import Geometry
from cadapt.adapters.conv_merge import add_to_layer, find_plain_conv, regroup
from cadapt.adapters.conv_reach import explain_reach, make_conv, own_geometry
from cadapt.adapters.scaling import with_scale_folded
from cadapt.adapters.scheme import Fold, Placement, Refusal, Scheme, joining
from cadapt.adapters.tokens import from_map, to_map
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Layout, Site

_LARGEST_ALPHA = 1e6
_LARGEST_RANK = 65_536


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of LoRA.

    Args:
        rank: r, for each group of a conv. Where an update of rank r would hold more numbers than the weight itself,
            r is the largest that does not; at least 1, which for a depth-wise conv is an update of full rank.
        alpha: α of the scale α/r, with r as set here; None is a scale of 1.
        dropout: probability of dropping a value of what A reads, in training.

    Raises:
        UsageError: a value out of its range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _LARGEST_RANK:
            raise UsageError(f"rank is {str(self.rank):.12}, expected 1 to {_LARGEST_RANK}", hint="try --set rank=8")
        if self.alpha is not None and not 0 < abs(self.alpha) < _LARGEST_ALPHA:
            raise UsageError(
                f"alpha is {self.alpha:g}, expected a number other than 0", hint="leave it out for a scale of 1"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout:g}, expected 0 to below 1", hint="try --set dropout=0.1")


class Lora(nn.Module):
    """Δ(x) = s · B A x with A of low rank, arXiv 2106.09685 equation 3.

    Without a ``geometry`` A and B are linear layers on the last dimension: ``[…, C_in]`` to ``[…, C_out]``. With one
    they are convs on maps, ``[B, C_in, H, W]`` or channels last where ``layout`` says so: A has the geometry and
    gives ``rank`` channels for each of ``groups``, B is 1×1. A starts as layers usually do, B at zero. Parameters:
    rank·(C_in·K² + C_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        *,
        geometry: Geometry | None = None,
        groups: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        layout: Layout = "NC",
    ) -> None:
        super().__init__()
        self.down: nn.Conv2d | nn.Linear
        self.up: nn.Conv2d | nn.Linear
        if geometry is None:
            self.down = nn.Linear(in_channels, rank, bias=False)
            self.up = nn.Linear(rank, out_channels, bias=False)
        else:
            self.down = make_conv(in_channels, rank * groups, geometry, groups=groups, bias=False)
            self.up = nn.Conv2d(rank * groups, out_channels, 1, groups=groups, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale, self.groups, self.layout = scale, groups, layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        if isinstance(self.down, nn.Linear):
            return self._scaled(self.up(self.down(self.dropout(x))))
        map_BCHW, rest = to_map(self.dropout(x), self.layout, None, 0)
        return from_map(self._scaled(self.up(self.down(map_BCHW))), rest, self.layout)

    def _scaled(self, delta: torch.Tensor) -> torch.Tensor:
        return delta if self.scale == 1.0 else self.scale * delta

    def weight_update(self) -> torch.Tensor:
        """ΔW = s · B A in fp64: ``[C_out, C_in]``, or ``[C_out, C_in / groups, K, K]`` for convs."""
        down, up = self.down.weight.detach().double(), self.up.weight.detach().double()
        out_channels, rank = up.shape[:2]
        product = up.reshape(self.groups, -1, rank) @ down.reshape(self.groups, rank, -1)
        return self.scale * product.reshape(out_channels, *down.shape[1:])


def _is_linear_layer(site: Site) -> bool:
    """Whether the site is a linear layer and no 1×1 conv: only convs have their channels in front."""
    return site.kind == "linear" and site.layout != "NCHW"


def find_groups(site: Site) -> int:
    """Groups of the update: the conv's; where the site is several convs, as many of the widest one's as divide."""
    return math.gcd(site.groups, site.in_channels, site.out_channels)


def find_rank(site: Site, config: LoraConfig) -> int:
    """The rank in each group: r(m + n) numbers are no more than the m·n of the group's weight, where r > 1."""
    groups = find_groups(site)
    taps = 1 if site.kernel is None else site.kernel[0] * site.kernel[1]
    rows, columns = site.out_channels // groups, site.in_channels // groups * taps
    return max(1, min(config.rank, rows * columns // (rows + columns)))


def _select(sites: Iterable[Site], config: LoraConfig) -> tuple[Placement, ...]:
    kinds = ("conv", "downsample", "linear")
    return tuple(Placement(site=site, form="parallel") for site in sites if site.kind in kinds)


def _fits(site: Site, form: Form, config: LoraConfig) -> str | None:
    return None if _is_linear_layer(site) else explain_reach(site)


def _build(site: Site, form: Form, config: LoraConfig) -> Lora:
    return Lora(
        site.in_channels,
        site.out_channels,
        find_rank(site, config),
        geometry=None if _is_linear_layer(site) else own_geometry(site),
        groups=find_groups(site),
        scale=1.0 if config.alpha is None else config.alpha / config.rank,
        dropout=config.dropout,
        layout=site.layout,
    )


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Fold:
    """W + s · B A, exactly; the bias stays."""
    assert isinstance(adapter, Lora)
    is_linear = isinstance(adapter.down, nn.Linear)
    found = _find_plain_linear(layer) if is_linear else find_plain_conv(site, layer)
    if isinstance(found, Refusal):
        return found
    update = adapter.weight_update()
    if isinstance(found, nn.Conv2d) and found.groups != adapter.groups:
        if adapter.groups % found.groups:
            return Refusal(reason=f"the update has {adapter.groups} groups, the conv {found.groups}")
        # an adapter before this one left the conv fewer groups
        update = regroup(update, adapter.groups, found.groups)
    return add_to_layer(found, update, None)


def _find_plain_linear(layer: nn.Module | None) -> nn.Linear | Refusal:
    # a subclass, or a parametrised layer, may compute its weight
    if type(layer) is nn.Linear:
        return layer
    kind = "no module" if layer is None else f"a {type(layer).__name__}"
    return Refusal(reason=f"the layer is {kind}, and not a plain linear one that could take it up")


def fold_scale(adapter: nn.Module, config: LoraConfig) -> tuple[nn.Module, LoraConfig]:
    """Return an equal adapter of scale 1, folded into B, and without dropout, for use after training."""
    folded = with_scale_folded(adapter)
    folded.dropout = nn.Identity()
    return folded, replace(config, alpha=None, dropout=0.0)


SCHEMES = (
    Scheme(
        name="lora",
        paper="arXiv 2106.09685",
        summary="update of low rank for each conv and linear layer",
        config=LoraConfig,
        needs="convs or linear layers in its blocks",
        joins=joining("parallel", "conv", "downsample", "linear"),
        select=_select,
        fits=_fits,
        build=_build,
        merge=_merge,
        simplify=fold_scale,
    ),
)
