"""Sites of single layers as the survey of a model would give them, and the comparison that tests of adapters make."""

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.site import Site


def conv_site(conv: nn.Conv2d, side: int = 13, **changes: Any) -> Site:
    with torch.no_grad():
        out = conv(torch.zeros(1, conv.in_channels, side, side))
    same = isinstance(conv, Conv2dSame) or conv.padding == "same"
    values: dict[str, Any] = dict(
        path="layer.conv",
        kind="linear" if conv.kernel_size == (1, 1) else "conv",
        in_shape=(conv.in_channels, side, side),
        out_shape=tuple(out.shape[1:]),
        grid=(side, side),
        kernel=conv.kernel_size,
        stride=conv.stride,
        padding="same" if same else conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        operator=type(conv).__name__,
    )
    return Site(**{**values, **changes})


def linear_site(layout: str, before: int = 12, after: int = 20) -> Site:
    front = {"NC": (), "NLC": (5,), "NHWC": (3, 4)}[layout]
    return Site(
        path="layer.fc",
        kind="linear",
        in_shape=(*front, before),
        out_shape=(*front, after),
        layout=layout,
        kernel=(1, 1),
        operator="Linear",
    )


def assert_near(got: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-6) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).detach().abs().max()) <= bound * float(wanted.detach().abs().max())
