"""What a node of a traced model does, told from its module or function and never from a model's own class names."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

ADDS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_NORM_FUNCTIONS = frozenset({"layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm", "fast_layer_norm"})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})

# torch's and timm's class or function names, lower case and without underscores → timm's name of the activation
_ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "leakyrelu": "leaky_relu",
    "prelu": "prelu",
    "elu": "elu",
    "celu": "celu",
    "selu": "selu",
    "gelu": "gelu",
    "gelutanh": "gelu_tanh",
    "quickgelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "tanh": "tanh",
    "hardswish": "hard_swish",
    "hardmish": "hard_mish",
    "sigmoid": "sigmoid",
    "hardsigmoid": "hard_sigmoid",
    "softmax": "softmax",
    "softplus": "softplus",
}
_ATTENTION_NAMES = _PRODUCTS | {"softmax", "scaled_dot_product_attention"}
MIXERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
GATES = frozenset({"sigmoid", "hard_sigmoid", "softmax", "tanh"})


def _key(name: str) -> str:
    return name.lower().replace("_", "")


def module_of(node: fx.Node, model: nn.Module) -> nn.Module | None:
    """The module a node calls, if it calls one."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def function_name(node: fx.Node) -> str:
    """The name of the function or method a node calls, or an empty string."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return str(node.target) if node.op == "call_method" else ""


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The recorded shape of a node's tensor, batch first; None where it gives something else."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(int(size) for size in shape)


def is_linear(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node multiplies its last dimension with a learned matrix."""
    return isinstance(module_of(node, model), nn.Linear) or function_name(node) == "linear"


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two tensors element by element that both depend on the input: no linear map."""
    if node.target not in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
        return False
    return _given_by_input(_tensor_arguments(node)) > 1


def is_closed(module: nn.Module) -> bool:
    """Whether a module that a node calls holds layers of its own: one that could not be traced through."""
    return not isinstance(module, MIXERS) and any(isinstance(child, MIXERS) for child in module.modules())


def attends(module: nn.Module) -> bool:
    """Whether a module's own code weighs tokens against tokens, for a module that was not traced through."""
    return not _ATTENTION_NAMES.isdisjoint(names_in(type(module)))


def names_in(kind: type) -> set[str]:
    """What the methods of a module type ask for by name; those it has from torch's own Module are left out."""
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    codes = [getattr(method, "__code__", None) for base in own for method in vars(base).values()]
    return {name for code in codes if code is not None for name in code.co_names}


def is_norm(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node normalises."""
    module = module_of(node, model)
    if module is not None:
        return "norm" in type(module).__name__.lower()
    return function_name(node) in _NORM_FUNCTIONS


def is_attention(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node weighs tokens against tokens: a product of two matrices that both depend on the input.

    A product that gives a single row or column is a pooling (global context), and no attention.
    """
    if function_name(node) == "scaled_dot_product_attention":
        return True
    if function_name(node) in _PRODUCTS:
        shape = shape_of(node) or (0,)
        return min(shape[-2:]) > 1 and _given_by_input(tensor_inputs(node)) > 1
    module = module_of(node, model)
    return module is not None and is_closed(module) and any(attends(child) for child in module.modules())


def activation_of(node: fx.Node, model: nn.Module) -> str | None:
    """Timm's name of the non-linearity a node applies, also one fused behind a norm; None where it applies none."""
    module = module_of(node, model)
    if module is None:
        return _ACTIVATIONS.get(_key(function_name(node)))
    fused = getattr(module, "act", None)
    if isinstance(fused, nn.Module):
        module = fused
    return _ACTIVATIONS.get(_key(type(module).__name__))


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two tensors that both depend on the input."""
    return node.target in ADDS and len(_tensor_arguments(node)) == 2


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node reads; sizes and other scalars left out."""
    return [source for source in node.all_input_nodes if shape_of(source) is not None or _holds_tensors(source)]


def _given_by_input(nodes: list[fx.Node]) -> int:
    return sum(bool(node.meta["from_input"]) for node in nodes)


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [item for item in node.args if isinstance(item, fx.Node) and shape_of(item) is not None]


def _holds_tensors(node: fx.Node) -> bool:
    meta: Any = node.meta.get("tensor_meta")
    return isinstance(meta, tuple | list) and any(hasattr(item, "shape") for item in meta)


# what gives a tensor of its own, whatever it is given; all else may hand its input on, or a view of it
_FRESH_FUNCTIONS = frozenset(
    {"add", "sub", "mul", "truediv", "div", "neg", "pow", "sqrt", "rsqrt", "mean", "sum", "cat", "concat", "stack",
     "matmul", "bmm", "einsum", "linear", "conv2d", "layer_norm", "group_norm", "batch_norm", "softmax", "sigmoid",
     "tanh", "gelu", "silu", "relu", "hardswish", "clone", "scaled_dot_product_attention", "interpolate", "max_pool2d",
     "avg_pool2d", "adaptive_avg_pool2d", "roll", "flip"}
)  # fmt: skip


def may_alias(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node's output may share memory with its first input; said of everything not known to copy."""
    if may_mutate_input(node, model):
        return True
    module = module_of(node, model)
    if module is not None:
        return not (isinstance(module, MIXERS) or is_norm(node, model) or activation_of(node, model) is not None)
    return function_name(node) not in _FRESH_FUNCTIONS


def may_mutate_input(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node overwrites its first input, or is a module that was not opened and does inside what it likes."""
    module = module_of(node, model)
    return mutates_input(node, model) or (module is not None and is_closed(module))


def mutates_input(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node overwrites its first input: an in-place module, function, method or operator."""
    module = module_of(node, model)
    if module is not None:
        return bool(getattr(module, "inplace", False)) and not is_norm(node, model)
    if node.kwargs.get("inplace") is True or node.target in (operator.iadd, operator.imul, operator.isub):
        return True
    name = function_name(node)
    if _ACTIVATIONS.get(_key(name)) and any(value is True for value in node.args[1:]):
        return True  # F.relu(x, True)
    return name.endswith("_") and not name.endswith("__")
