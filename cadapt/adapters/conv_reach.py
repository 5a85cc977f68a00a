"""The geometry of a site that is a convolution, for adapters that copy it, and whether it gives the site's output grid.

It does for every single conv; where a site is several convs, or a module that was not opened, it may not.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters.conv_geometry import Geometry, explain_padding, reached_grid
from cadapt.site import Layout, Pair, Site


def own_geometry(site: Site) -> Geometry:
    """Kernel, stride, padding and dilation of the conv at a site, which must have a kernel."""
    assert site.kernel is not None, site.name
    return Geometry(
        kernel=site.kernel,
        stride=site.stride,
        padding=site.padding,
        dilation=site.dilation,
        padding_mode=site.padding_mode,
    )


def make_conv(in_channels: int, out_channels: int, geometry: Geometry, *, groups: int, bias: bool) -> nn.Conv2d:
    """A conv of a geometry, initialised as torch does it."""
    # TensorFlow's rule pads by the picture's size; torch's own "same" is it for stride 1 only, and by any mode
    same = geometry.padding == "same" and geometry.padding_mode == "zeros"
    kind: Any = Conv2dSame if same else nn.Conv2d
    modes = {} if same else {"padding_mode": geometry.padding_mode}
    conv: nn.Conv2d = kind(
        in_channels,
        out_channels,
        geometry.kernel,
        stride=geometry.stride,
        padding=0 if same else geometry.padding,
        dilation=geometry.dilation,
        groups=groups,
        bias=bias,
        **modes,
    )
    return conv


def pads(conv: nn.Conv2d) -> bool:
    """Whether a conv reads anything beyond the edge of its map, by its own padding."""
    if isinstance(conv.padding, str):
        return conv.padding == "same" and max(conv.kernel_size) > 1
    return max(conv.padding) > 0


def pads_by_mode(adapter: nn.Module) -> bool:
    """Whether what an adapter computes depends on its site's padding mode, where that is another than zeros."""
    for module in adapter.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros" and pads(module):
            return True
        geometry = getattr(module, "geometry", None)
        if not isinstance(geometry, Geometry) or geometry.padding_mode == "zeros":
            continue
        # torch's convs, which alone have modes, pad alike whatever the size of the map
        if min(side for axis in (0, 1) for side in _margins(1, geometry, axis)) < 0:
            return True
    return False


def under_centre(x_BCHW: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The map without the pixels that a conv's centre tap never meets, and with those of the padding that it does."""
    height, width = x_BCHW.shape[2:]
    top, bottom = _margins(height, geometry, axis=0)
    left, right = _margins(width, geometry, axis=1)
    missing = [max(-side, 0) for side in (left, right, top, bottom)]
    if any(missing):
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x_BCHW = nn.functional.pad(x_BCHW, missing, mode=mode)
    if max(top, bottom, left, right) > 0:
        # slices and not a negative pad, which not every runtime of exported models knows
        rows, columns = x_BCHW.shape[2] - max(bottom, 0), x_BCHW.shape[3] - max(right, 0)
        x_BCHW = x_BCHW[:, :, max(top, 0) : rows, max(left, 0) : columns]
    return x_BCHW


def _margins(size: int, geometry: Geometry, axis: int) -> Pair:
    """How many pixels in front and behind a conv's centre tap never meets; negative where it meets padding."""
    kernel, dilation = geometry.kernel[axis], geometry.dilation[axis]
    if geometry.padding == "same":
        # TensorFlow's rule: what is needed for ceil(size / stride) outputs, the odd pixel behind
        stride = geometry.stride[axis]
        needed = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        padding = (needed // 2, needed - needed // 2)
    else:
        padding = (geometry.padding[axis], geometry.padding[axis])
    return dilation * ((kernel - 1) // 2) - padding[0], dilation * (kernel // 2) - padding[1]


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
        return explain_padding(size, geometry)
    kernel, stride, before, after, wanted = (
        f"{sides[0]}×{sides[1]}" for sides in (geometry.kernel, geometry.stride, size, reached, out_size)
    )
    return f"a {kernel} kernel with stride {stride} takes its {before} grid to {after}, not to {wanted}"
