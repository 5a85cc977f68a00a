"""The geometry of a place in a graph: kernels, windows, grids and layouts, read from modules and recorded shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import fx, nn

from cadapt.graph.blocks import Block
from cadapt.graph.convs import Conv, conv_of, widest
from cadapt.graph.operators import (
    GATES,
    activation_of,
    function_name,
    is_linear,
    is_norm,
    module_of,
    shape_of,
)
from cadapt.graph.residual import Residual
from cadapt.graph.traits import traits_of
from cadapt.graph.units import Unit
from cadapt.site import Layout, Pair


def odd(kernel: Pair) -> Pair:
    """The largest odd kernel within: only that keeps a block's grid with padding on both sides."""
    return kernel[0] - 1 + kernel[0] % 2, kernel[1] - 1 + kernel[1] % 2


def functional_conv(block: Block, units: Iterable[Unit]) -> Conv | None:
    """The block's functional conv: the widest of its conv units."""
    nodes = set(block.scope.nodes)
    convs = [unit.conv for unit in units if set(unit.nodes) <= nodes]
    return widest(convs) if convs else None


def window_of(residual: Residual, grid: Pair | None, usual: int = 0) -> Pair | None:
    """The side of a windowed attention's window, made odd: from how many tokens attend to each other.

    Windows are folded into the batch, or stand in a dimension of their own. Attention over a whole grid is a window
    only where the grid is no larger than ``usual``, the side of the model's windows elsewhere.
    """
    if grid is None:
        return None
    batch = (shape_of(residual.add) or (0,))[0]
    for node in residual.branch:
        shape = shape_of(node)
        if shape is None or len(shape) < 3 or not traits_of(node).attends:
            continue
        queries, side = shape[-2], math.isqrt(shape[-2])
        folded = (len(shape) > 4 or shape[0] > batch) and queries < grid[0] * grid[1]
        whole = (side, side) == grid and side <= usual
        if side > 1 and side * side == queries and (folded or whole):
            return odd((side, side))
    return None


def layout_of(start: fx.Node, nodes: Sequence[fx.Node], model: nn.Module) -> Layout:
    """Tell channels-first from channels-last by the first module that mixes or normalises channels."""
    shape = shape_of(start) or ()
    if len(shape) == 3:
        return "NLC"
    if _mixes_last(start, model):
        return "NHWC"
    inside, frontier, seen = set(nodes), [start], set()
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user not in inside or user in seen:
                continue
            seen.add(user)
            maps = len(shape_of(user) or ()) == 4  # windows and tokens laid out of a map say nothing of it
            if maps and _mixes_last(user, model):
                return "NHWC"
            moved = _moves_channels(user)
            if moved == "first":
                return "NHWC"
            to_last = moved == "last"
            if conv_of(user, model) is not None or is_norm(user, model) or to_last:
                return "NCHW"
            frontier.append(user)
    return "NCHW"


def _moves_channels(node: fx.Node) -> Literal["first", "last"] | None:
    """Whether a node turns maps channels first to channels last or back, in whatever spelling."""
    if function_name(node) not in ("permute", "movedim", "moveaxis", "transpose", "swapaxes"):
        return None
    if len(shape_of(node) or ()) != 4:
        return None
    probe = torch.empty((2, 3, 5, 7), device="meta")
    settings = [item for item in node.args[1:] if not isinstance(item, fx.Node)]
    turned = getattr(probe, function_name(node))(*settings, **dict(node.kwargs))
    if tuple(turned.shape) == (2, 5, 7, 3):
        return "last"
    return "first" if tuple(turned.shape) == (2, 7, 3, 5) else None


def _mixes_last(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node mixes or normalises the last dimension."""
    if is_linear(node, model) or function_name(node) in ("layer_norm", "rms_norm"):
        return True
    return isinstance(module_of(node, model), nn.LayerNorm | nn.RMSNorm)


def usual_activation(nodes: Iterable[fx.Node], model: nn.Module) -> str | None:
    """The most frequent non-linearity on what depends on the input; gates and softmax are none."""
    names = Counter(activation_of(node, model) for node in nodes if node.meta.get("from_input", True))
    usual = [(count, name) for name, count in names.items() if name is not None and name not in GATES]
    return max(usual, key=lambda item: item[0])[1] if usual else None
