"""The engine's own copy of an adapted model's graph, which the passes rewrite, and what they ask of it.

The copy reads the model's modules and parameters in place and holds tensors of its own beside them. Of each node it
knows its shape, whether it is ``moving`` (it depends on the picture, or on random numbers, and is another in each step)
and whether it is ``live`` (it depends on a tensor that trains, so that a gradient flows into it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cadapt.adapted import AdaptedModel
from cadapt.graph.modes import is_mode
from cadapt.graph.operators import function_name, mutates_input, shape_of
from cadapt.graph.trace import record_shapes

OWN = "engine"
DRAWING = ("drop", "rand", "bernoulli", "normal_", "uniform", "rrelu", "multinomial", "exponential_", "gumbel")
"""In the names of functions that draw random numbers."""
# what gives a view or a fixed arrangement of one tensor, and so may be computed once where that tensor is fixed
_ARRANGING = frozenset(
    {"reshape", "view", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "expand",
     "getitem", "t", "float", "to", "clone"}
)  # fmt: skip
_COMBINING = frozenset({"add", "sub", "mul", "truediv", "div", "neg", "cat", "sigmoid", "exp", "sqrt", "rsqrt"})


class Program:
    """A graph in the making: the model's, with nodes that the passes put in place of others.

    Args:
        model: the adapted model, on any device; it is left as it was.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(model.graph, {}))
        self.root = nn.Module()
        self.root._modules.update(model._modules)
        self.root._parameters.update(model._parameters)
        self.root._buffers.update(model._buffers)
        self.root.training = model.training
        self.own = nn.Module()
        assert OWN not in model._modules, f"the base has a module of its own named {OWN}"
        self.root.add_module(OWN, self.own)
        self._trainable = {name for name, item in model.named_parameters(remove_duplicate=False) if item.requires_grad}
        floating = (item.dtype for item in model.parameters() if item.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self._count = 0
        self._exact: dict[str, torch.Tensor] = {}

    def nodes(self, *functions: Callable[..., Any] | str) -> Iterator[fx.Node]:
        """The nodes that call one of some functions, in order, as the graph stands now."""
        return iter([node for node in self.graph.nodes if node.target in functions])

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, if it calls one."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def measure(self) -> None:
        """Note each node's shape, and whether it is moving and live, where nodes were added that lack it."""
        if all("tensor_meta" in node.meta and "live" in node.meta for node in self.graph.nodes if node.op != "output"):
            return
        record_shapes(self.graph, self.root, tuple(self.model.preprocessing.input_size))
        self.graph.owning_module = None  # the twin that was run, which has not what is added later
        for node in self.graph.nodes:
            self._mark(node)

    def note(self, node: fx.Node, like: fx.Node | None = None) -> None:
        """Note what a new node is; its shape is that of the tensor it reads, or of a node it is like."""
        self._mark(node)
        if node.op == "get_attr":
            node.meta["tensor_meta"] = _Shape(_get(self.root, str(node.target)).shape)
        elif like is not None and "tensor_meta" in like.meta:
            node.meta["tensor_meta"] = like.meta["tensor_meta"]

    def _mark(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        live = any(source.meta["live"] for source in sources)
        if node.op == "get_attr":
            live = node.target in self._trainable
        module = self.module(node)
        # what draws must neither be computed twice nor change places with what else draws
        draws = any(part in function_name(node) for part in DRAWING) if module is None else _draws(module)
        moving = node.op == "placeholder" or draws or any(source.meta["moving"] for source in sources)
        if module is not None:
            prefix = f"{node.target}."
            live = live or any(name.startswith(prefix) for name in self._trainable)
        node.meta["moving"], node.meta["live"] = moving, live

    def is_constant(self, node: Any) -> bool:
        """Whether a node is a tensor that neither the picture nor training changes, or is computed from such alone."""
        if not isinstance(node, fx.Node) or node.meta["moving"] or node.meta["live"]:
            return False
        if node.op == "get_attr":
            return not is_mode(node) and isinstance(self.value(node), torch.Tensor)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        known = node.op in ("call_function", "call_method") and name in _ARRANGING | _COMBINING
        return known and all(self.is_constant(source) for source in node.all_input_nodes)

    def value(self, node: fx.Node) -> Any:
        """What a constant node gives: the tensor itself where it is one, else computed from those."""
        if node.op == "get_attr":
            return _get(self.root, str(node.target))
        arguments = fx.map_arg(node.args, self.value)
        options = fx.map_arg(node.kwargs, self.value)
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
            assert callable(node.target)
            return node.target(*arguments, **options)

    def exact(self, node: fx.Node) -> torch.Tensor:
        """A constant's value in fp64, in which the passes compute; one of the program's own before it was rounded."""
        known = self._exact.get(str(node.target)) if node.op == "get_attr" else None
        value: torch.Tensor = self.value(node) if known is None else known
        return value.detach().double()

    def hold(self, tensor: torch.Tensor) -> fx.Node:
        """Keep a tensor as the program's own and read it by a node at the head of the graph.

        One in fp64 is rounded to the model's dtype, and remembered for :meth:`exact`.
        """
        name = f"t{self._count}"
        self._count += 1
        if tensor.dtype == torch.float64:
            self._exact[f"{OWN}.{name}"] = tensor.detach()
            tensor = tensor.to(self.dtype)
        self.own.register_buffer(name, tensor.detach())
        with self.graph.inserting_before(self.head):
            node = self.graph.get_attr(f"{OWN}.{name}")
        self.note(node)
        return node

    @property
    def head(self) -> fx.Node:
        """The first node behind the picture's."""
        placeholder = next(node for node in self.graph.nodes if node.op == "placeholder")
        following: fx.Node = placeholder.next
        return following

    def hoist(self, node: fx.Node) -> fx.Node:
        """Repeat an expression of parameters at the head of the graph, where every layer can read it."""
        head = self.head
        copies: dict[fx.Node, fx.Node] = {}

        def copy(item: fx.Node) -> fx.Node:
            if item not in copies:
                for source in item.all_input_nodes:
                    copy(source)
                with self.graph.inserting_before(head):
                    copies[item] = self.graph.node_copy(item, lambda source: copies[source])
                copies[item].meta = dict(item.meta)
            return copies[item]

        return copy(node)

    def emit(self, before: fx.Node, function: Callable[..., Any], *args: Any, like: fx.Node | None = None) -> fx.Node:
        """Call a function by a new node before another.

        Args:
            before: the node that comes next.
            function: what is called.
            *args: its arguments.
            like: a node whose result has the same shape; without it the shape stays unknown.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(function, args)
        self.note(node, like)
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let all that read a node read another, and take it out."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def clean(self) -> None:
        """Take out what nothing reads any more."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and self._is_pure(node):
                self.graph.erase_node(node)

    def _is_pure(self, node: fx.Node) -> bool:
        # a call of a module may change its buffers, an assertion is there to fail, and what overwrites a view of a
        # tensor is called for its effect
        plain = node.op in ("get_attr", "call_function", "call_method") and node.target is not torch._assert
        return plain and not (node.all_input_nodes and mutates_input(node, self.root))

    def settle(self) -> None:
        """Forget what nothing reads any more, and the unrounded values."""
        self.clean()
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name, _ in list(self.own.named_buffers()):
            if f"{OWN}.{name}" not in read:
                delattr(self.own, name)
        self._exact.clear()


class _Shape:
    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def sizes(node: Any) -> tuple[int, ...]:
    """A node's recorded shape; empty where it gives no tensor or is no node."""
    return (shape_of(node) or ()) if isinstance(node, fx.Node) else ()


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's values; those that ask for its shape or dtype only are left out."""
    return [user for user in node.users if not (user.target is getattr or user.target in ("size", "dim"))]


def is_plain_layer(node: fx.Node) -> bool:
    """Whether a conv or linear layer has all its arguments in their places, as lowering writes them."""
    places = 7 if node.target is F.conv2d else 3 if node.target is F.linear else 0
    return not node.kwargs and len(node.args) == places


def _draws(module: nn.Module) -> bool:
    """Whether a module, or one inside, drops with a rate above 0."""
    parts = (item for item in module.modules() if "drop" in type(item).__name__.lower())
    return any(getattr(item, "p", 0) or getattr(item, "drop_prob", 0) for item in parts)


def _get(root: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(root.get_submodule(path), name)
