"""Residual additions: which additions in a graph join a shortcut with a branch that computes something.

For an addition, the immediate dominator is the tensor both operands come from. Beside a branch with layers and a
non-linearity, an operand whose path holds no conv, linear or attention is an identity shortcut, and one with at most
two convs and no non-linearity is a projection shortcut. Sums of parallel linear branches (re-parameterised convs) and
merges of streams are neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from cadapt.graph.flow import between, sources_of
from cadapt.graph.operators import is_add, shape_of
from cadapt.graph.traits import traits_of

_MOST_PROJECTION_CONVS = 2


@dataclass(frozen=True, kw_only=True)
class Residual:
    """An addition that closes a residual branch: where it starts, its end, and the branch's nodes.

    ``branch_end`` is the operand of ``add`` that the branch gives; ``shortcut_end`` the other one, at the end of the
    nodes of ``shortcut`` (none for an identity).
    """

    add: fx.Node
    start: fx.Node
    branch_end: fx.Node
    shortcut_end: fx.Node
    branch: tuple[fx.Node, ...]
    shortcut: tuple[fx.Node, ...]
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


def _path(start: fx.Node, end: fx.Node) -> _Path:
    return _described(end, between(start, end))


def _described(end: fx.Node, nodes: list[fx.Node]) -> _Path:
    traits = [traits_of(node) for node in nodes]
    return _Path(
        end=end,
        nodes=nodes,
        convs=sum(item.conv is not None for item in traits),
        mixers=sum(item.mixes for item in traits),
        attends=any(item.attends for item in traits),
        bends=any(item.bends for item in traits),
    )


def _is_shortcut(path: _Path, other: _Path) -> bool:
    if other.mixers == 0 or not other.bends:
        return False
    if path.mixers == 0 and not path.attends:
        return True
    return path.mixers <= _MOST_PROJECTION_CONVS and not path.bends


def find_residuals(nodes: Iterable[fx.Node], dominators: Mapping[fx.Node, fx.Node]) -> list[Residual]:
    """Return the residual additions among the nodes of a graph with recorded shapes and traits, in order."""
    found = []
    for node in nodes:
        if not is_add(node) or node not in dominators:
            continue
        operands = sources_of(node)
        if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
            continue
        start = dominators[node]
        paths = [_path(start, operand) for operand in operands]
        for shortcut, branch in (paths, paths[::-1]):
            if shortcut.end is not start and shortcut.end in branch.nodes:
                # x + f(x, y) with y from further back: the branch begins at x all the same
                branch = _beyond(shortcut.end, branch)
                shortcut = _path(shortcut.end, shortcut.end)
            if _is_shortcut(shortcut, branch):
                found.append(_residual(node, start if shortcut.nodes else shortcut.end, shortcut, branch))
                break
    return found


def _beyond(start: fx.Node, path: _Path) -> _Path:
    """What of a path depends on one of its nodes."""
    reached = {start}
    inside = set(path.nodes)
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user in inside and user not in reached:
                reached.add(user)
                stack.append(user)
    return _described(path.end, [node for node in path.nodes if node in reached and node is not start])


def _residual(add: fx.Node, start: fx.Node, shortcut: _Path, branch: _Path) -> Residual:
    return Residual(
        add=add,
        start=start,
        branch_end=branch.end,
        shortcut_end=shortcut.end,
        branch=tuple(branch.nodes),
        shortcut=tuple(shortcut.nodes),
        has_attention=branch.attends,
        has_conv=branch.convs > 0,
    )
