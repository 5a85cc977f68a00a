"""Blocks: the smallest module calls, one tensor in and one out, that hold a residual addition, and their siblings.

A sibling is a call without a shortcut that stands where its neighbours have one: the same place in the same kind of
list (the stride-2 items of an EfficientNet stage). Models without residual additions have no blocks; there a conv
unit is what recurs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.operators import conv_of, shape_of
from cadapt.graph.residual import Residual
from cadapt.graph.scopes import Scope, single_border, stack_of


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: its scope, its input and output nodes, and the residual additions it holds (none for a sibling)."""

    scope: Scope
    input: fx.Node
    output: fx.Node
    residuals: tuple[Residual, ...]


def find_blocks(
    graph: fx.Graph, model: nn.Module, scopes: Mapping[str, Scope], residuals: Sequence[Residual]
) -> list[Block]:
    """Return the blocks of a graph in the order they run."""
    holders: dict[str, list[Residual]] = {}
    for residual in residuals:
        key = _holder(residual, scopes)
        if key is not None:
            holders.setdefault(key, []).append(residual)
    for key in [key for key in holders if any(_inside(scopes[key], other, scopes) for other in holders)]:
        del holders[key]
    blocks = [_block(scopes[key], tuple(items)) for key, items in holders.items()]
    blocks += _siblings(blocks, model, scopes)
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(blocks, key=lambda block: order[block.output])


def _holder(residual: Residual, scopes: Mapping[str, Scope]) -> str | None:
    for key in reversed(stack_of(residual.add)):
        scope = scopes[key]
        if set(residual.branch) <= set(scope.nodes) and single_border(scope.nodes) is not None:
            return key
    return None


def _inside(scope: Scope, other: str, scopes: Mapping[str, Scope]) -> bool:
    parent = scope.parent
    while parent is not None and parent != other:
        parent = scopes[parent].parent
    return parent is not None


def _block(scope: Scope, residuals: tuple[Residual, ...]) -> Block:
    crossing = single_border(scope.nodes)
    assert crossing is not None, scope.key
    return Block(scope=scope, input=crossing[0], output=crossing[1], residuals=residuals)


def _siblings(blocks: Sequence[Block], model: nn.Module, scopes: Mapping[str, Scope]) -> list[Block]:
    taken = {block.scope.key for block in blocks}
    patterns = {block.scope.pattern for block in blocks if "*" in block.scope.pattern}
    kinds = {(block.scope.kind, block.scope.parent) for block in blocks}
    found = []
    for key, scope in scopes.items():
        like = scope.pattern in patterns or (scope.kind, scope.parent) in kinds
        if key in taken or not like or any(_inside(scope, other, scopes) for other in taken):
            continue
        convs = [conv for node in scope.nodes if (conv := conv_of(node, model)) is not None]
        crossing = single_border(scope.nodes)
        if (
            any(max(conv.kernel_size) > 1 for conv in convs)
            and crossing is not None
            and len(shape_of(crossing[0]) or ()) == len(shape_of(crossing[1]) or ())
        ):
            found.append(_block(scope, ()))
    return found


def find_units(graph: fx.Graph, model: nn.Module) -> list[fx.Node]:
    """In a model without blocks: the convs with a kernel over 1 whose place recurs, the first conv left out."""
    convs = [node for node in graph.nodes if conv_of(node, model) is not None]
    wide = [node for node in convs[1:] if max(conv_of(node, model).kernel_size) > 1]  # type: ignore[union-attr]
    patterns = Counter(_place(node) for node in wide)
    return [node for node in wide if patterns[_place(node)] > 1]


def _place(node: fx.Node) -> str:
    return re.sub(r"\d+", "*", str(node.target))
