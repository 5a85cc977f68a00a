"""Tracing a timm model to a torch.fx graph that stays true to it in train and in eval mode.

A plain symbolic trace bakes ``self.training`` into the graph and loses whatever branches on it. The tracer here
keeps as leaves every convolution, batch norm and dropout, and what timm itself registers as untraceable. Modules that
hold convolutions or linear layers are opened as long as their code lets it: one that does not trace, or gives another
graph in train mode than in eval mode, is closed and the model traced again.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from cadapt.errors import CadaptError
from cadapt.graph.convs import is_conv
from cadapt.graph.modes import is_mode, reads_training, unite_modes
from cadapt.graph.operators import MIXERS, is_closed, mutates_input
from cadapt.meta import meta_copy

_ALWAYS_LEAVES = (*MIXERS, nn.modules.batchnorm._BatchNorm)


def _is_container(module: nn.Module) -> bool:
    """Whether a module holds layers worth seeing; a convolution that holds nothing but itself does not."""
    return not isinstance(module, _ALWAYS_LEAVES) and is_closed(module)


class LeafTracer(fx.Tracer):
    """A tracer that knows which modules must stay whole.

    ``closed`` holds the types of containers that were seen not to trace: they are leaves as well. ``opened`` is the
    stack of containers being traced, innermost last, which says whom to close on a failure.
    """

    # buffers are read where they are used, as parameters are: a baked copy would not follow the model to its device
    proxy_buffer_attributes = True

    def __init__(self, closed: frozenset[type]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.closed = closed
        self.opened: list[type] = []
        self._registered = tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module call becomes one node."""
        whole = isinstance(m, (*_ALWAYS_LEAVES, torch.jit.ScriptModule)) or is_conv(m)
        if whole or type(m) in self.closed:
            return True
        special = isinstance(m, self._registered) or reads_training(type(m))
        if special and not _is_container(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call, remembering the container types that would be closed if it cannot be traced through."""
        if type(m) in self.closed or not _is_container(m):
            return super().call_module(m, forward, args, kwargs)
        self.opened.append(type(m))
        result = super().call_module(m, forward, args, kwargs)
        self.opened.pop()
        return result


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    """Arguments of forward beyond the image keep their default values: they are settings, not inputs."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[2:]
    values = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    return values or None


@dataclass(frozen=True)
class _Attempt:
    graph: fx.Graph | None = None
    culprit: type | None = None
    error: Exception | None = None


def _attempt(model: nn.Module, closed: frozenset[type], training: bool) -> _Attempt:
    tracer = LeafTracer(closed)
    twin = meta_copy(model).train(training)
    try:
        return _Attempt(graph=tracer.trace(twin, concrete_args=_defaults(model)))
    except Exception as error:  # whatever a model's code raises on a proxy: the caller closes the culprit or tells
        return _Attempt(culprit=tracer.opened[-1] if tracer.opened else None, error=error)


def trace(model: nn.Module) -> fx.Graph:
    """Trace a model's forward to a graph whose targets are the model's own module paths, for train and eval mode.

    The model itself is left alone: what is traced is a copy without data, since some models cache what they
    computed.

    Raises:
        CadaptError: the model's code cannot be traced, with the module and the reason.
    """
    name = type(model).__name__
    closed: frozenset[type] = frozenset()
    while True:
        attempts = [_attempt(model, closed, training) for training in (False, True)]
        failed = next((attempt for attempt in attempts if attempt.graph is None), None)
        if failed is None:
            graph, other = attempts[0].graph, attempts[1].graph
            assert graph is not None and other is not None
            culprit = unite_modes(graph, other)
            if culprit is None:
                _drop_default_arguments(graph)
                _forget_wrapping(graph)
                _thread_mutations(graph, model)
                _require_no_constants(graph, model)
                return graph
            reason = "its graph in train mode is another than in eval mode"
        else:
            culprit = failed.culprit
            reason = f"{type(failed.error).__name__}: {failed.error}"
        if culprit is None or culprit in closed or culprit is type(model):
            raise CadaptError(f"cannot trace {name}: {reason}") from (failed.error if failed else None)
        closed |= {culprit}


def _thread_mutations(graph: fx.Graph, model: nn.Module) -> None:
    """Let whatever reads a tensor after it was overwritten read what overwrote it: the same memory, now in the graph.

    A call for its effect alone (``y.add_(x)`` and then ``y``) would otherwise not be seen by who follows the edges.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.all_input_nodes and mutates_input(node, model):
            overwritten = node.all_input_nodes[0]
            later = [user for user in overwritten.users if order[user] > order[node]]
            for user in later:
                user.replace_input_with(overwritten, node)


def _require_no_constants(graph: fx.Graph, model: nn.Module) -> None:
    """A tensor that is neither parameter nor buffer has no place in the state, and none in a copy of the model."""
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    named |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in named and not is_mode(node):
            raise CadaptError(
                f"cannot trace {type(model).__name__}: it computes with a tensor that is neither parameter nor buffer "
                f"('{node.target}', first used by '{next(iter(node.users)).name}')"
            )


def _drop_default_arguments(graph: fx.Graph) -> None:
    """Take out the placeholders that concrete arguments leave in a graph, and the guards on their values."""
    for node in reversed(graph.nodes):
        if _is_guard(node):
            compared = node.all_input_nodes
            graph.erase_node(node)
            for source in compared:
                if source.target is operator.eq and not source.users:
                    graph.erase_node(source)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[1:]:
        if not node.users:
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())


def _forget_wrapping(graph: fx.Graph) -> None:
    """Let the graph's code not ask later tracers to wrap what it calls.

    Such a request stays for the life of the process. A node made in the likeness of another would ask for a function
    that is not there by that name, and no model could be traced any more.
    """
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)


def _is_guard(node: fx.Node) -> bool:
    if getattr(node.target, "__name__", "") == "_assert_is_none":
        return True
    return node.target is torch._assert and "has been specialized" in str(node.args[1])


def record_shapes(graph: fx.Graph, model: nn.Module, input_size: tuple[int, ...], batch: int = 2) -> None:
    """Note each node's output in ``node.meta["tensor_meta"]``, by running the graph without data.

    Args:
        graph: a trace of ``model``.
        model: the model, on any device; it is not run itself.
        input_size: channels, height and width.
        batch: pictures in the batch.

    Raises:
        CadaptError: the model refuses that input size.
    """
    twin = meta_copy(model)
    floating = (item.dtype for item in model.parameters() if item.is_floating_point())
    example = torch.empty((batch, *input_size), device="meta", dtype=next(floating, torch.float32))
    runner = _ShapeRecorder(fx.GraphModule(twin, graph))
    try:
        with torch.no_grad():
            runner.run(example)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "×".join(str(value) for value in input_size)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CadaptError(
            f"the model does not run on {size} input, at '{runner.at}': {reason}", hint="try another --img-size"
        ) from error


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes what each node gave; ``at`` is the node it was at, for the message when one fails."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.at = ""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its tensor's shape."""
        self.at = str(n.target) if n.op == "call_module" else n.name
        result = super().run_node(n)
        n.meta["tensor_meta"] = _noted(result)
        return result


@dataclass(frozen=True)
class _Noted:
    shape: torch.Size


def _noted(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return _Noted(result.shape)
    return tuple(_noted(item) for item in result) if isinstance(result, tuple | list) else None
