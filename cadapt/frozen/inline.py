"""Open the adapters: their own operations take the place of the one call, so that the passes can see them.

An adapter whose code does not trace, that asks for its mode or has hooks, stays one call; autograd then treats it as it
always did.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from cadapt.adapted import ADAPTERS
from cadapt.frozen.activations import is_hooked
from cadapt.frozen.program import Program
from cadapt.graph.modes import reads_training


class _AdapterTracer(fx.Tracer):
    """Opens cadapt's own modules and plain containers; all others are leaves."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module call becomes one node."""
        own = type(m).__module__.startswith("cadapt.") and not reads_training(type(m))
        return is_hooked(m) or not (own or type(m) is nn.Sequential)


def inline_adapters(program: Program) -> None:
    """Replace each call of an adapter or head that can be opened by what it does."""
    for node in list(program.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(f"{ADAPTERS}."):
            module = program.root.get_submodule(str(node.target))
            if _AdapterTracer().is_leaf_module(module, ""):
                continue
            graph = _trace(module)
            if graph is not None:
                _insert(program, node, graph)


def _trace(module: nn.Module) -> fx.Graph | None:
    try:
        return _AdapterTracer().trace(module)
    except (fx.proxy.TraceError, TypeError):
        # its code asks for the values or sizes of what it is given
        return None


def _insert(program: Program, node: fx.Node, graph: fx.Graph) -> None:
    values: dict[fx.Node, Any] = {}
    arguments = list(node.args)
    for inner in graph.nodes:
        if inner.op == "placeholder":
            values[inner] = arguments.pop(0)
        elif inner.op == "output":
            program.replace(node, values[inner.args[0]])
        else:
            with program.graph.inserting_before(node):
                copied = program.graph.node_copy(inner, lambda item: values[item])
            if inner.op in ("get_attr", "call_module"):
                copied.target = f"{node.target}.{inner.target}"
            values[inner] = copied
