"""Where data enters and leaves a module call: the one tensor in and the one tensor out between which an adapter lies.

Most calls have one of each. A block that is given its shortcut beside its input (DLA) reads one that counts; one that
first joins what it is given (a dense layer's concatenation) is entered at the joint; cells with two inputs are entered
by the later one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from cadapt.graph.flow import sources_of
from cadapt.graph.operators import shape_of
from cadapt.graph.scopes import border
from cadapt.graph.traits import traits_of


class Crossings:
    """Finds the way through module calls of one graph.

    Args:
        graph: the graph, with recorded shapes and traits.
        dominators: the immediate dominator of each node.
        closing: the residual additions, each with the end of its shortcut.
    """

    def __init__(
        self,
        graph: fx.Graph,
        dominators: Mapping[fx.Node, fx.Node],
        closing: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.dominators = dominators
        self.closing = closing
        self.order = {node: index for index, node in enumerate(graph.nodes)}

    def find(self, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node] | None:
        """The tensor that enters a module call and the one that leaves it, or None where no single ones do."""
        inside = set(nodes)
        inputs, outputs = border(nodes)
        inputs = [node for node in inputs if shape_of(node) is not None and not self._only_shortcut(node, inside)]
        mixers = [node for node in nodes if traits_of(node).mixes]
        if not inputs or not outputs:
            return None
        shortcuts = [node for node in inputs if any(self.closing.get(user) is node for user in nodes)]
        inputs = shortcuts if len(shortcuts) == 1 else inputs
        start = inputs[0] if len(inputs) == 1 else self._entry(inputs, inside, mixers)
        end = outputs[0] if len(outputs) == 1 else self._exit(outputs, inside, mixers)
        if start is None or end is None or shape_of(end) is None or start is end:
            return None
        return start, end

    def _only_shortcut(self, node: fx.Node, inside: Collection[fx.Node]) -> bool:
        """Whether all that a call does with one of its inputs is to add it as a shortcut."""
        users = [user for user in node.users if user in inside]
        return all(self.closing.get(user) is node for user in users)

    def _entry(self, inputs: list[fx.Node], inside: Collection[fx.Node], mixers: list[fx.Node]) -> fx.Node | None:
        """The joint inside through which all goes that is convolved, else the input that was computed last."""
        if not mixers:
            return None
        joint = self._shared([source for node in mixers for source in sources_of(node)])
        while joint is not None and joint in inside and len(sources_of(joint)) == 1:
            joint = sources_of(joint)[0]
        if joint is not None and joint in inside and shape_of(joint) is not None:
            return joint
        return max(inputs, key=self.order.__getitem__)

    def _shared(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The last node that all paths to each of some nodes pass."""
        chains = [self._chain(node) for node in nodes]
        common = set(chains[0]).intersection(*chains[1:])
        return next((node for node in chains[0] if node in common), None)

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        chain = [node]
        while chain[-1] in self.dominators:
            chain.append(self.dominators[chain[-1]])
        return chain

    def _exit(self, outputs: list[fx.Node], inside: Collection[fx.Node], mixers: list[fx.Node]) -> fx.Node | None:
        """The output that the others are made from, else the last layer inside with what follows it in a line."""
        first = min(outputs, key=self.order.__getitem__)
        if not mixers or not set(mixers[:-1]) <= _ancestors(mixers[-1]):
            return None
        if mixers[-1] in {first, *_ancestors(first)} and all(first in {node, *_ancestors(node)} for node in outputs):
            return first
        end = mixers[-1]
        while end not in outputs:
            users = [user for user in end.users if user in inside]
            if len(users) != 1 or shape_of(users[0]) is None or len(sources_of(users[0])) != 1:
                break
            end = users[0]
        return end


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in sources_of(stack.pop()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
