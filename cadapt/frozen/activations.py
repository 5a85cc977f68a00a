"""Which element-wise activation a node is, by timm's name of it; those with settings of their own are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from cadapt.frozen.program import Program
from cadapt.graph.operators import activation_of

_PLAIN = frozenset(
    {"relu", "relu6", "silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "tanh", "hard_swish", "hard_mish", "sigmoid",
     "hard_sigmoid"}
)  # fmt: skip
# what these functions and modules may be told besides the tensor: the first computes in place, the second otherwise
_IGNORED, _APPROXIMATE = "inplace", "approximate"


def find_activation(program: Program, node: fx.Node) -> str | None:
    """The name of the activation that is all a node does, or None."""
    if node.op not in ("call_module", "call_function", "call_method") or not node.args:
        return None
    name = activation_of(node, program.root)
    if name not in _PLAIN:
        return None
    module = program.module(node)
    if module is None:
        return _of_function(name, node)
    if any(True for _ in module.children()) or any(True for _ in module.parameters()) or is_hooked(module):
        return None  # a norm with an activation in it, or a learned one
    return _approximated(name, vars(module))


def _of_function(name: str, node: fx.Node) -> str | None:
    if len(node.args) > 1 and not isinstance(node.args[1], bool):
        return None
    if set(node.kwargs) - {_IGNORED, _APPROXIMATE}:
        return None
    return _approximated(name, node.kwargs)


def _approximated(name: str, settings: Mapping[str, Any]) -> str:
    return "gelu_tanh" if name == "gelu" and settings.get(_APPROXIMATE) == "tanh" else name


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through a module, forward or backward."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
