"""How the input flows through a graph: what depends on it, and through which node all of its paths must pass.

Immediate dominators tell where the two operands of an addition part ways, and so which addition closes a residual
block (Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm", 2001; one pass suffices without loops).
"""

from __future__ import annotations

from torch import fx

from cadapt.graph.operators import tensor_inputs


def mark_flow(graph: fx.Graph) -> None:
    """Note in ``node.meta["from_input"]`` whether a node's tensor depends on the model's input."""
    for node in graph.nodes:
        depends = node.op == "placeholder" or any(source.meta["from_input"] for source in tensor_inputs(node))
        node.meta["from_input"] = depends


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads that depend on the model's input."""
    return [source for source in tensor_inputs(node) if source.meta["from_input"]]


def immediate_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node that depends on the input, the last node before it that all paths to it pass."""
    depth: dict[fx.Node, int] = {}
    dominator: dict[fx.Node, fx.Node] = {}

    def common(first: fx.Node, second: fx.Node) -> fx.Node:
        while first is not second:
            if depth[first] < depth[second]:
                first, second = second, first
            first = dominator[first]
        return first

    for node in graph.nodes:
        if not node.meta["from_input"] or node.op == "output":
            continue
        sources = sources_of(node)
        if not sources:
            depth[node] = 0
            continue
        meeting = sources[0]
        for source in sources[1:]:
            meeting = common(meeting, source)
        dominator[node] = meeting
        depth[node] = depth[meeting] + 1
    return dominator


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes on paths from ``start``, left out, to ``end``; empty where ``end`` is ``start``."""
    found: dict[fx.Node, None] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        if node is start or node in found:
            continue
        found[node] = None
        stack.extend(sources_of(node))
    return list(found)
