"""Compute the wide middle of an MLP again: keep what enters it, not what its first layer makes four times as wide.

An activation's gradient needs its input z = W v + b, and nobody else does. Where z has at least twice as many elements
as v, keeping v and computing z once more is a quarter of the MLP's products for most of what the MLP keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.elementwise import activation
from cadapt.frozen.functions.linear import frozen_linear
from cadapt.frozen.functions.norm import frozen_layer_norm
from cadapt.frozen.functions.relu import relu_result
from cadapt.frozen.keeping import conv2d_behind, linear_behind
from cadapt.frozen.program import Program, readers, sizes
from cadapt.frozen.stretches import enclose

_WIDENING = 2
_ARRANGING = (torch.permute, "permute", "transpose", "contiguous")


def recompute_expansions(program: Program) -> None:
    """Enclose each activation with the frozen layer that widens, and the norm, before it."""
    program.measure()
    for node in program.nodes(activation):
        layer: Any = node.args[1]
        if not _widens(layer) or len(layer.users) > 1 or not _is_dropped(node):
            continue
        inner: list[fx.Node] = [layer, node]
        source: Any = layer.args[0]
        while _is_passed_through(source):
            inner.insert(0, source)
            source = source.args[0]
        while inner[0].target in _ARRANGING:  # these cost nothing to keep
            inner.pop(0)
        enclose(program, inner)
    program.clean()


def recompute_bottlenecks(program: Program) -> None:
    """Compute what is in the middle of an adapter again, from the input that its first layer keeps anyway."""
    program.measure()
    for node in program.nodes(conv2d_behind, linear_behind):
        middle: Any = node.args[0]
        if not isinstance(middle, fx.Node) or middle.target not in (activation, relu_result):
            continue
        first = next(item for item in middle.args if isinstance(item, fx.Node))
        begins = first.target in (conv2d_behind, linear_behind) and first.args[0] is first.args[1]
        if begins and set(first.users) <= {middle, node} and set(middle.users) == {node}:
            enclose(program, [first, middle, node])
    program.clean()


def _widens(layer: Any) -> bool:
    if not isinstance(layer, fx.Node) or not layer.meta["live"] or layer.target not in (frozen_linear, frozen_conv2d):
        return False
    source = layer.args[0]
    return math.prod(sizes(layer)) >= _WIDENING * math.prod(sizes(source)) > 0


def _is_dropped(node: fx.Node) -> bool:
    """Whether nobody keeps an activation's result, nor its input in its stead."""
    return all(user.target in (frozen_linear, frozen_conv2d) for user in readers(node))


def _is_passed_through(node: Any) -> bool:
    """Whether a node is a norm of its input, or a view, that only the layer behind it reads."""
    known = isinstance(node, fx.Node) and (node.target is frozen_layer_norm or node.target in _ARRANGING)
    return bool(known and node.meta["live"] and len(node.users) == 1)
