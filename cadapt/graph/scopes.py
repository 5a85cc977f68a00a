"""Module calls in a flat graph: which nodes ran inside which call, and what tensors crossed its border."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from cadapt.graph.operators import tensor_inputs


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One call of one module: its path, which call of the module it is, its type, and its nodes in order."""

    path: str
    call: int
    kind: type
    nodes: tuple[fx.Node, ...]
    parent: str | None

    @property
    def key(self) -> str:
        """The scope's name in ``nn_module_stack``."""
        return self.path if self.call == 0 else f"{self.path}@{self.call}"

    @property
    def pattern(self) -> str:
        """The path with its numbers starred: items of one list have the same pattern."""
        return re.sub(r"\d+", "*", self.path)


@dataclass
class _Draft:
    path: str
    kind: type
    parent: str | None
    nodes: list[fx.Node] = field(default_factory=list)


def stack_of(node: fx.Node) -> dict[str, tuple[str, type]]:
    """The module calls a node ran in, outermost first, the root left out."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: value for key, value in stack.items() if value[0]}


def find_scopes(graph: fx.Graph) -> dict[str, Scope]:
    """Return every module call of a graph by its key, in the order of first use."""
    drafts: dict[str, _Draft] = {}
    for node in graph.nodes:
        parent: str | None = None
        for key, (path, kind) in stack_of(node).items():
            drafts.setdefault(key, _Draft(path, kind, parent)).nodes.append(node)
            parent = key
    return {
        key: Scope(
            path=draft.path,
            call=int(key.rpartition("@")[2]) if "@" in key else 0,
            kind=draft.kind,
            nodes=tuple(draft.nodes),
            parent=draft.parent,
        )
        for key, draft in drafts.items()
    }


def border(nodes: tuple[fx.Node, ...]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors that go into a set of nodes, and those of its own that are used outside.

    Parameters read inside are no input. A value that is only asked for its size is not counted.
    """
    inside = set(nodes)
    inputs = {source: None for node in nodes for source in tensor_inputs(node) if source not in inside}
    outputs = {
        node: None
        for node in nodes
        if any(user not in inside and (user.op == "output" or node in tensor_inputs(user)) for user in node.users)
        and not all(_only_sizes(user) for user in node.users if user not in inside)
    }
    return [node for node in inputs if node.op != "get_attr" and not _only_parameters(node)], list(outputs)


def inside_of(scopes: Mapping[str, Scope], key: str, other: str) -> bool:
    """Whether one module call ran inside another."""
    parent = scopes[key].parent
    while parent is not None and parent != other:
        parent = scopes[parent].parent
    return parent is not None


def _only_sizes(user: fx.Node) -> bool:
    return user.target is getattr or (user.op == "call_method" and user.target in ("size", "dim"))


def _only_parameters(node: fx.Node) -> bool:
    return not node.meta.get("from_input", True)


def plain_path(key: str) -> str:
    """The module path of a scope's key, without its call."""
    return key.partition("@")[0]


def called_around(graph: fx.Graph, path: str) -> str:
    """The path of the module that a graph calls to run another: itself, or one around it that was not traced through.

    Empty where the graph calls neither.
    """
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    while path and path not in called:
        path = path.rpartition(".")[0]
    return path
