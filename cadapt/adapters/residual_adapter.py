"""Residual adapters: one 1×1 convolution beside or behind the base's convolutions.

Rebuffi et al., "Efficient parametrization of multi-domain deep neural networks", CVPR 2018, arXiv 1803.10082: the
parallel adapter y = norm(f(x) + A x) and the serial one y = norm(f(x) + A f(x)), section 3. The 1×1 conv with a bias
beside every conv of every block is the variant that Conv-Adapter compares itself with (arXiv 2208.07463, table 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cadapt.adapters.conv_geometry import Geometry
from cadapt.adapters.conv_merge import find_plain_conv, fold_behind, fold_beside
from cadapt.adapters.conv_reach import explain_reach, map_size, own_geometry, under_centre
from cadapt.adapters.scheme import Fold, NoSettings, Placement, Refusal, Scheme, joining
from cadapt.adapters.tokens import from_map, to_map
from cadapt.plan import Form
from cadapt.site import Layout, Site, SiteKind

_ONE_PIXEL = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))


class ResidualAdapter(nn.Module):
    """A x of arXiv 1803.10082, section 3, with A a 1×1 conv that starts at zero.

    Maps ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``, or channels last where ``layout`` says so. ``geometry`` is that
    of the conv it stands beside: it gives the same H' and W', and A reads the pixel under the conv's centre tap, the
    upper left one of the middle where the kernel is even. For the odd kernels with padding on both sides that
    networks are made of, output i so reads pixel i·stride; without padding it reads the centre crop. Behind a conv
    the geometry is that of one pixel. Parameters: C_in·C_out, and C_out with a bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, geometry: Geometry, bias: bool, layout: Layout = "NCHW"
    ) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, stride=geometry.stride, bias=bias)
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)
        self.geometry, self.layout = geometry, layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return A x; shapes as the class says."""
        map_BCHW, rest = to_map(x, self.layout, None, 0)
        return from_map(self.pointwise(under_centre(map_BCHW, self.geometry)), rest, self.layout)


def _geometry(site: Site, form: Form) -> Geometry:
    return _ONE_PIXEL if form == "sequential" else own_geometry(site)


def _fits(site: Site, form: Form, config: NoSettings) -> str | None:
    if form == "sequential":
        return None if map_size(site.out_shape, site.layout) else "its output is no map"
    return explain_reach(site)


def _build(bias: bool) -> Any:
    def build(site: Site, form: Form, config: NoSettings) -> ResidualAdapter:
        channels = site.out_channels if form == "sequential" else site.in_channels
        geometry = _geometry(site, form)
        return ResidualAdapter(channels, site.out_channels, geometry=geometry, bias=bias, layout=site.layout)

    return build


def _merge(site: Site, form: Form, adapter: nn.Module, layer: nn.Module | None) -> Fold:
    """Beside a conv A joins the centre tap of its kernel; behind one it gives (I + A) W."""
    conv = find_plain_conv(site, layer)
    if isinstance(conv, Refusal):
        return conv
    assert isinstance(adapter, ResidualAdapter)
    mix = adapter.pointwise.weight.detach().double()
    bias = None if adapter.pointwise.bias is None else adapter.pointwise.bias.detach().double()
    return fold_behind(conv, mix[:, :, 0, 0], bias) if form == "sequential" else fold_beside(conv, mix, bias)


def _on_wide_convs(form: Form) -> Any:
    def select(sites: Iterable[Site], config: NoSettings) -> tuple[Placement, ...]:
        """Every conv with a kernel over 1, in blocks and between stages."""
        return tuple(Placement(site=site, form=form) for site in sites if site.kind in ("conv", "downsample"))

    return select


def _on_all_convs(sites: Iterable[Site], config: NoSettings) -> tuple[Placement, ...]:
    """Every conv, also those with a kernel of 1; among the linear layers these are the ones that read maps."""
    kinds = ("conv", "downsample")
    chosen = [site for site in sites if site.kind in kinds or (site.kind == "linear" and site.layout == "NCHW")]
    return tuple(Placement(site=site, form="parallel") for site in chosen)


def _scheme(
    name: str, summary: str, select: Any, *, joins: frozenset[tuple[SiteKind, Form]], needs: str, paper: str, bias: bool
) -> Scheme:
    return Scheme(
        name=name,
        paper=paper,
        summary=summary,
        joins=joins,
        needs=needs,
        select=select,
        fits=_fits,
        build=_build(bias),
        merge=_merge,
    )


_REBUFFI, _ABLATION = "arXiv 1803.10082", "arXiv 2208.07463, table 5"
_WIDE = "convs with a kernel over 1 inside or between its blocks"
_ALL = "convs inside or between its blocks"
SCHEMES = (
    _scheme(
        "residual-par",
        "1×1 conv parallel to each conv",
        _on_wide_convs("parallel"),
        joins=joining("parallel", "conv", "downsample"),
        needs=_WIDE,
        paper=_REBUFFI,
        bias=False,
    ),
    _scheme(
        "residual-seq",
        "1×1 conv after each conv",
        _on_wide_convs("sequential"),
        joins=joining("sequential", "conv", "downsample"),
        needs=_WIDE,
        paper=_REBUFFI,
        bias=False,
    ),
    _scheme(
        "all-conv-par",
        "1×1 conv with a bias parallel to every conv, 1×1 ones too",
        _on_all_convs,
        joins=joining("parallel", "conv", "downsample", "linear"),
        needs=_ALL,
        paper=_ABLATION,
        bias=True,
    ),
)
