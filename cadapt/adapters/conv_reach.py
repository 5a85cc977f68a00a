"""The geometry of a site that is a convolution, for adapters that copy it, and whether it gives the site's output grid.

It does for every single conv; where a site is several convs, or a module that was not opened, it may not.
"""

from __future__ import annotations

from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters.conv_geometry import Geometry, reached_grid
from cadapt.site import Layout, Pair, Site


def own_geometry(site: Site) -> Geometry:
    """Kernel, stride, padding and dilation of the conv at a site, which must have a kernel."""
    assert site.kernel is not None, site.name
    return Geometry(kernel=site.kernel, stride=site.stride, padding=site.padding, dilation=site.dilation)


def make_conv(in_channels: int, out_channels: int, geometry: Geometry, *, groups: int, bias: bool) -> nn.Conv2d:
    """A conv of a geometry, initialised as torch does it."""
    # TensorFlow's rule pads by the picture's size; torch's own "same" is it for stride 1 only
    same = geometry.padding == "same"
    conv: nn.Conv2d = (Conv2dSame if same else nn.Conv2d)(
        in_channels,
        out_channels,
        geometry.kernel,
        stride=geometry.stride,
        padding=0 if same else geometry.padding,
        dilation=geometry.dilation,
        groups=groups,
        bias=bias,
    )
    return conv


def map_size(shape: tuple[int, ...], layout: Layout) -> Pair | None:
    """Height and width of a map of this shape without its batch, or None where it is no map."""
    if layout not in ("NCHW", "NHWC") or len(shape) != 3:
        return None
    return (shape[1], shape[2]) if layout == "NCHW" else (shape[0], shape[1])


def explain_reach(site: Site) -> str | None:
    """Why a conv with the kernel, stride and padding of a site does not give the site's output grid, or None."""
    size, out_size = map_size(site.in_shape, site.layout), map_size(site.out_shape, site.layout)
    if size is None or out_size is None or site.kernel is None:
        return "it is no conv from map to map"
    geometry = own_geometry(site)
    reached = reached_grid(size, geometry)
    if reached == out_size:
        return None
    kernel, stride, before, after, wanted = (
        f"{sides[0]}×{sides[1]}" for sides in (geometry.kernel, geometry.stride, size, reached, out_size)
    )
    return f"a {kernel} kernel with stride {stride} takes its {before} grid to {after}, not to {wanted}"
