"""Conv-Adapter: a depth-wise separable bottleneck beside or behind convolutions and residual blocks.

Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv 2208.07463:
Δ(x) = α ⊙ PW(σ(DW(x))), equation 2, in the four adapting schemes of section 3.4, figure 3. The paper has maps only;
on tokens Δ works on their grid, and prefix tokens are treated as in Convpass (arXiv 2207.07039, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from timm.layers import create_act_layer
from torch import nn

from cadapt.adapters.conv_geometry import (
    Geometry,
    explain_misfit,
    find_geometry,
    find_pool,
    find_width,
    input_channels,
    input_grid,
    reached_grid,
)
from cadapt.adapters.conv_merge import merge_conv_adapter
from cadapt.adapters.conv_reach import make_conv
from cadapt.adapters.conv_settings import ConvAdapterConfig
from cadapt.adapters.scheme import Placement, Scheme, joining
from cadapt.adapters.tokens import from_map, to_map
from cadapt.plan import Form
from cadapt.site import Layout, Pair, Site, SiteKind


class ConvAdapter(nn.Module):
    """Δ(x) = α ⊙ PW(σ(DW(x))), arXiv 2208.07463 equation 2.

    Maps ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``. Where ``layout`` says that the base passes ``[B, H, W, C]`` or
    tokens ``[B, P + H·W, C]`` here, the result is of that kind as well; ``grid`` is the tokens' (H, W). Of P
    ``prefix_tokens`` each goes through Δ alone, as a picture of one pixel, in which only the kernel's centre tap meets
    anything; so P of them come out, whatever the stride. Parameters: C_in·K² + w + w·C_out + 2·C_out for w = C_in / γ.

    With ``pool`` over 1 maps are averaged over squares of that side first and Δ is brought back bilinearly to the size
    it has without (the spatial down-sampling of table 5); prefix tokens are not pooled.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        geometry: Geometry,
        groups: int,
        activation: str,
        alpha: float,
        learn_alpha: bool,
        layout: Layout = "NCHW",
        grid: Pair | None = None,
        prefix_tokens: int = 0,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.depthwise = make_conv(in_channels, width, geometry, groups=groups, bias=True)
        self.activation = nn.Identity() if activation == "identity" else create_act_layer(activation)
        self.pointwise = nn.Conv2d(width, out_channels, 1)
        self.alpha = nn.Parameter(torch.full((1, out_channels, 1, 1), alpha)) if learn_alpha else None
        self.fixed_alpha = alpha
        self.layout, self.grid, self.prefix_tokens = layout, grid, prefix_tokens
        self.pool, self.geometry = pool, geometry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x); shapes as the class says."""
        if self.layout == "NLC":
            return self._on_tokens(x)
        if self.layout == "NHWC":
            return self._on_map(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self._on_map(x)

    def _on_map(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if self.pool == 1:
            return self._finish(self.depthwise(x_BCHW))
        delta = self._finish(self.depthwise(nn.functional.avg_pool2d(x_BCHW, self.pool)))
        size = reached_grid((x_BCHW.shape[2], x_BCHW.shape[3]), self.geometry)
        return nn.functional.interpolate(delta, size=size, mode="bilinear", align_corners=False)

    def _on_tokens(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """Δ of the grid's tokens on their map and of the prefix tokens one by one, in the order they came in."""
        map_BCHW, prefix_BCP1 = to_map(x_BNC, "NLC", self.grid, self.prefix_tokens)
        delta = self._on_map(map_BCHW)
        alone = self._finish(self._centre(prefix_BCP1)) if self.prefix_tokens else prefix_BCP1
        return from_map(delta, alone, "NLC", self.prefix_tokens)

    def _centre(self, prefix_BCP1: torch.Tensor) -> torch.Tensor:
        """DW of each prefix token by itself: [B, C, P, 1] times the centre tap of the kernel, to [B, w, P, 1]."""
        depth = self.depthwise
        row, column = ((side - 1) // 2 for side in depth.kernel_size)
        tap = depth.weight[:, :, row : row + 1, column : column + 1]
        return nn.functional.conv2d(prefix_BCP1, tap, depth.bias, groups=depth.groups)

    def _finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """α ⊙ PW(σ(h)) for h = DW(x), [B, w, H', W']."""
        delta: torch.Tensor = self.pointwise(self.activation(hidden))
        if self.alpha is not None:
            # in the dtype of Δ: under autocast an fp32 α would drag all that follows the joint back to fp32
            delta = self.alpha.to(delta.dtype) * delta
        elif self.fixed_alpha != 1.0:
            delta = self.fixed_alpha * delta
        return delta


def _build(site: Site, form: Form, config: ConvAdapterConfig) -> ConvAdapter:
    width, geometry = find_width(site, form, config), find_geometry(site, form, config)
    assert width is not None and geometry is not None, site.name
    activation = config.activation or site.activation
    adapter = ConvAdapter(
        input_channels(site, form),
        width,
        site.out_channels,
        geometry=geometry,
        groups=width if config.conv_type == "depthwise" else 1,
        activation=activation,
        alpha=config.alpha_init,
        learn_alpha=config.alpha == "learned",
        layout=site.layout,
        grid=input_grid(site, form),
        prefix_tokens=site.prefix_tokens,
        pool=find_pool(config),
    )
    _initialise(adapter, activation, config.init)
    return adapter


@torch.no_grad()
def _initialise(adapter: ConvAdapter, activation: str, init: str) -> None:
    """The paper's initialisation (its code: kaiming for ResNets, else truncated normal); by default PW is zero."""
    for conv in (adapter.depthwise, adapter.pointwise):
        if "gelu" in activation:
            nn.init.trunc_normal_(conv.weight, std=0.02)
        else:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    if init == "zero":
        nn.init.zeros_(adapter.pointwise.weight)


@torch.no_grad()
def fold_alpha(adapter: nn.Module, config: ConvAdapterConfig) -> tuple[nn.Module, ConvAdapterConfig]:
    """Fold α into the point-wise conv: α ⊙ (P z + b) = (α P) z + α b. Returns an equal adapter without α.

    The argument is left as it was. Computed in fp64 and rounded once.
    """
    import copy

    folded = copy.deepcopy(adapter)
    assert isinstance(folded, ConvAdapter)
    point = folded.pointwise
    alpha = torch.full((point.out_channels,), folded.fixed_alpha, dtype=torch.float64, device=point.weight.device)
    if folded.alpha is not None:
        alpha = folded.alpha.flatten().double()
    assert point.bias is not None
    point.weight.copy_((point.weight.double() * alpha[:, None, None, None]).to(point.weight.dtype))
    point.bias.copy_((point.bias.double() * alpha).to(point.bias.dtype))
    folded.alpha, folded.fixed_alpha = None, 1.0
    return folded, replace(config, alpha="fixed", alpha_init=1.0)


def _on_convs(form: Form) -> Any:
    def select(sites: Iterable[Site], config: ConvAdapterConfig) -> tuple[Placement, ...]:
        """Functional convs, and attention on a grid; convs that join stages always in parallel (the paper's code)."""
        chosen: list[Placement] = []
        for site in sites:
            if site.kind == "downsample":
                chosen.append(Placement(site=site, form="parallel"))
            elif site.kind == "conv" or (site.kind == "attention" and site.grid is not None):
                chosen.append(Placement(site=site, form=form))
        return tuple(chosen)

    return select


def _on_blocks(form: Form) -> Any:
    def select(sites: Iterable[Site], config: ConvAdapterConfig) -> tuple[Placement, ...]:
        """Whole blocks with a grid to convolve on, and the convs that join stages."""
        kinds = ("block", "downsample")
        chosen = [Placement(site=site, form=form) for site in sites if site.kind in kinds and site.grid is not None]
        return tuple(chosen) if any(item.site.kind == "block" for item in chosen) else ()

    return select


def _on_stages(sites: Iterable[Site], config: ConvAdapterConfig) -> tuple[Placement, ...]:
    """Whole stages with a grid: the ablation of table 5, which the paper found to do worse for more parameters."""
    return tuple(Placement(site=site, form="parallel") for site in sites if site.kind == "stage" and site.grid)


def _scheme(name: str, summary: str, needs: str, select: Any, joins: frozenset[tuple[SiteKind, Form]]) -> Scheme:
    return Scheme(
        name=name,
        paper="arXiv 2208.07463",
        summary=summary,
        config=ConvAdapterConfig,
        needs=needs,
        joins=joins,
        select=select,
        fits=explain_misfit,
        build=_build,
        merge=merge_conv_adapter,
        simplify=fold_alpha,
    )


_CONVS = "convs with a kernel over 1 inside or between its blocks, or attention on a grid"
_BLOCKS = "blocks on a grid (a branch of convs, attention or an MLP added to a shortcut, or modules that repeat)"
_STAGES = "stages of blocks on a grid"
_FUNCTIONAL: tuple[SiteKind, ...] = ("conv", "attention")
_BESIDE_JOINTS = joining("parallel", "downsample")
SCHEMES = (
    _scheme(
        "conv-par",
        "Conv-Adapter parallel to each functional conv",
        _CONVS,
        _on_convs("parallel"),
        joining("parallel", *_FUNCTIONAL) | _BESIDE_JOINTS,
    ),
    _scheme(
        "conv-seq",
        "Conv-Adapter after each functional conv",
        _CONVS,
        _on_convs("sequential"),
        joining("sequential", *_FUNCTIONAL) | _BESIDE_JOINTS,
    ),
    _scheme(
        "res-par",
        "Conv-Adapter parallel to each residual block",
        _BLOCKS,
        _on_blocks("parallel"),
        joining("parallel", "block", "downsample"),
    ),
    _scheme(
        "res-seq",
        "Conv-Adapter after each residual block",
        _BLOCKS,
        _on_blocks("sequential"),
        joining("sequential", "block", "downsample"),
    ),
    _scheme("stage-par", "Conv-Adapter parallel to each stage", _STAGES, _on_stages, joining("parallel", "stage")),
)
