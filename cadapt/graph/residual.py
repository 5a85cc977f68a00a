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
    nodes = between(start, end)
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
        paths = [_path(dominators[node], operand) for operand in operands]
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
                    shortcut=tuple(shortcut.nodes),
                    has_attention=branch.attends,
                    has_conv=branch.convs > 0,
                )
            )
            break
    return found
