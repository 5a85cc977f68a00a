"""Residual additions: which additions in a graph join a shortcut with a branch that computes something.

For an addition, the immediate dominator is the tensor both operands come from. An operand whose path holds no conv,
linear or attention is an identity shortcut; one with at most two convs and no non-linearity, beside a branch that
has one, is a projection shortcut. Sums of parallel linear branches (re-parameterised convs) and merges of streams
are neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from cadapt.graph.flow import between, immediate_dominators, sources_of
from cadapt.graph.operators import activation_of, conv_of, is_add, is_attention, is_linear, shape_of

_MOST_PROJECTION_CONVS = 2


@dataclass(frozen=True, kw_only=True)
class Residual:
    """An addition that closes a residual branch: where it starts, its end, and the branch's nodes.

    ``branch_end`` is the operand of ``add`` that the branch gives; ``shortcut_end`` the other one.
    """

    add: fx.Node
    start: fx.Node
    branch_end: fx.Node
    shortcut_end: fx.Node
    branch: tuple[fx.Node, ...]
    has_attention: bool
    has_conv: bool


@dataclass(frozen=True, kw_only=True)
class _Path:
    end: fx.Node
    nodes: list[fx.Node]
    convs: int
    mixers: int
    attends: bool
    bends: bool


def _path(start: fx.Node, end: fx.Node, model: nn.Module) -> _Path:
    nodes = between(start, end)
    convs = sum(conv_of(node, model) is not None for node in nodes)
    linears = sum(is_linear(node, model) for node in nodes)
    attends = any(is_attention(node, model) for node in nodes)
    # a gate (sigmoid) counts: squeeze-and-excite bends a branch as much as a ReLU
    bends = attends or any(activation_of(node, model) is not None for node in nodes)
    return _Path(end=end, nodes=nodes, convs=convs, mixers=convs + linears, attends=attends, bends=bends)


def _is_shortcut(path: _Path, other: _Path) -> bool:
    if other.mixers == 0:
        return False
    if path.mixers == 0 and not path.attends:
        return True
    return path.mixers <= _MOST_PROJECTION_CONVS and not path.bends and other.bends


def find_residuals(graph: fx.Graph, model: nn.Module) -> list[Residual]:
    """Return the residual additions of a graph with recorded shapes and flow, in order."""
    dominators = immediate_dominators(graph)
    found = []
    for node in graph.nodes:
        if not is_add(node) or node not in dominators:
            continue
        operands = sources_of(node)
        if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
            continue
        paths = [_path(dominators[node], operand, model) for operand in operands]
        for shortcut, branch in (paths, paths[::-1]):
            if not _is_shortcut(shortcut, branch):
                continue
            found.append(
                Residual(
                    add=node,
                    start=dominators[node],
                    branch_end=branch.end,
                    shortcut_end=shortcut.end,
                    branch=tuple(branch.nodes),
                    has_attention=branch.attends,
                    has_conv=branch.convs > 0,
                )
            )
            break
    return found
