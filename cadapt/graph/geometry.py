"""The geometry of a place in a graph: kernels, windows, grids and layouts, read from modules and recorded shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from cadapt.graph.blocks import Block
from cadapt.graph.operators import (
    GATES,
    activation_of,
    conv_of,
    function_name,
    is_attention,
    is_linear,
    is_norm,
    module_of,
    shape_of,
)
from cadapt.graph.residual import Residual
from cadapt.site import Layout, Pair


def pair(value: Any) -> Pair:
    """A module's setting for height and width, given as one number or two."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _odd(kernel: Pair) -> Pair:
    """The largest odd kernel within: only that keeps a block's grid with padding on both sides."""
    return kernel[0] - 1 + kernel[0] % 2, kernel[1] - 1 + kernel[1] % 2


def grid_of(shape: tuple[int, ...], layout: Layout) -> Pair | None:
    """Height and width of a shape without its batch, or None where it has no grid."""
    if layout == "NCHW" and len(shape) == 3:
        return shape[1], shape[2]
    return (shape[0], shape[1]) if layout == "NHWC" and len(shape) == 3 else None


def functional_geometry(block: Block, model: nn.Module) -> tuple[Pair | None, Pair, int]:
    """Kernel, dilation and groups of the block's functional conv, or its attention window as a kernel."""
    convs = [conv for node in block.scope.nodes if (conv := conv_of(node, model)) and max(conv.kernel_size) > 1]
    if convs:
        widest = max(convs, key=lambda conv: max(conv.kernel_size))
        return _odd(pair(widest.kernel_size)), pair(widest.dilation), widest.groups
    shape = shape_of(block.input)
    grid = grid_of(shape[1:], "NHWC") if shape and len(shape) == 4 else None
    for residual in block.residuals:
        window = window_of(residual, model, grid)
        if window is not None:
            return window, (1, 1), 1
    return None, (1, 1), 1


def window_of(residual: Residual, model: nn.Module, grid: Pair | None) -> Pair | None:
    """The side of a windowed attention's window, made odd: from how many tokens attend to each other."""
    if grid is None or not residual.has_attention:
        return None
    for node in residual.branch:
        if is_attention(node, model):
            shape = shape_of(node) or (0,)
            queries = shape[-2]
            side = math.isqrt(queries)
            if side > 1 and side * side == queries:
                return _odd((side, side))
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
            if _mixes_last(user, model):
                return "NHWC"
            to_last = function_name(user) == "permute" and user.args[1:] == (0, 2, 3, 1)
            if conv_of(user, model) is not None or is_norm(user, model) or to_last:
                return "NCHW"
            frontier.append(user)
    return "NCHW"


def _mixes_last(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node mixes or normalises the last dimension."""
    if is_linear(node, model) or function_name(node) in ("layer_norm", "rms_norm"):
        return True
    return isinstance(module_of(node, model), nn.LayerNorm | nn.RMSNorm)


def usual_activation(nodes: Iterable[fx.Node], model: nn.Module) -> str | None:
    """The most frequent non-linearity; gates and softmax are none."""
    names = Counter(activation_of(node, model) for node in nodes)
    usual = [(count, name) for name, count in names.items() if name is not None and name not in GATES]
    return max(usual, key=lambda item: item[0])[1] if usual else None
