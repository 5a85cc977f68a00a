"""Splicing: adding calls of new modules to a traced graph, and joining what they give with what was there.

Nothing of the base is moved or renamed. A parallel call reads what its site reads; a sequential one reads what its
site gives; both are added to the site's output, and whatever used that output uses the sum. A bypass is a parallel call
that is added at the end of the site's branch instead.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from cadapt.graph.anatomy import Located
from cadapt.graph.operators import may_alias, may_mutate_input
from cadapt.plan import Form


class Splicer:
    """Applies several splices to one graph, remembering by which sum an output was replaced."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph = graph
        self.model = model
        self._sums: dict[fx.Node, fx.Node] = {}
        self._calls: set[fx.Node] = set()

    def join(self, located: Located, target: str, form: Form) -> None:
        """Add a call of the module at ``target`` to a site.

        Args:
            located: the site with its nodes in this graph.
            target: the path, from the root, of the module to call.
            form: ``parallel`` (Δ of the site's input), ``sequential`` (Δ of the site's output) or ``bypass`` (Δ of the
                input, added behind the branch's layer scale).
        """
        joint = located.joint if form == "bypass" and located.joint is not None else located.output
        output = self._current(joint)
        with self.graph.inserting_after(output):
            total = self.graph.call_function(torch.add, (output,))
        total.meta = dict(output.meta)  # whoever reads it next asks for its shape
        # a sequential call needs no copy: what overwrites the output afterwards overwrites the sum in its place
        source = output if form == "sequential" else self._unspoilt(self._current(located.input))
        output.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        with self.graph.inserting_before(total):
            delta = self.graph.call_module(target, (source,))
        self._calls.add(delta)
        total.args = (output, delta)
        self._sums[output] = total

    def _unspoilt(self, source: fx.Node) -> fx.Node:
        """The source itself, or a copy of it made before an in-place operation overwrites it."""
        if not self._is_overwritten(source):
            return source
        with self.graph.inserting_after(source):
            return self.graph.call_function(torch.clone, (source,))

    def _current(self, node: fx.Node) -> fx.Node:
        while node in self._sums:
            node = self._sums[node]
        return node

    def _is_overwritten(self, source: fx.Node) -> bool:
        """Whether the base overwrites a tensor in place; adapters, which are no modules of the base, never do."""
        aliases, seen = [source], {source, *self._calls}
        while aliases:
            node = aliases.pop()
            for user in node.users:
                if user in seen or not user.all_input_nodes or user.all_input_nodes[0] is not node:
                    continue
                if may_mutate_input(user, self.model):
                    return True
                if may_alias(user, self.model):
                    seen.add(user)
                    aliases.append(user)
        return False
