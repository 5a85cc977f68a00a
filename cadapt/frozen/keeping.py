"""Choose, for every operation a gradient passes through, the form that keeps the least for backward.

A layer whose weight is frozen needs no input for its gradient. An activation keeps one bit per element where it is a
ReLU, else its input; a layer that trains behind such an activation keeps that same input and computes the activation
again, so that the two keep one tensor together. Norms keep their input, pooling what says where a maximum lay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cadapt.frozen.functions.conv import conv2d_through, frozen_conv2d
from cadapt.frozen.functions.elementwise import RECOMPUTABLE, activation, mul_through
from cadapt.frozen.functions.elementwise import affine as lean_affine
from cadapt.frozen.functions.linear import frozen_linear, linear_through
from cadapt.frozen.functions.norm import frozen_group_norm, frozen_layer_norm
from cadapt.frozen.functions.pooling import avg_pool2d_lean, max_pool2d_lean
from cadapt.frozen.functions.relu import relu_bits, relu_result
from cadapt.frozen.lowering import activate, affine
from cadapt.frozen.overwriting import may_overwrite
from cadapt.frozen.program import Program, is_plain_layer, sizes

# these keep their result, which no one can compute more cheaply from less
_KEEP_RESULT = frozenset({"relu", "relu6", "sigmoid", "tanh"})
_VIEWS = frozenset({"permute", "transpose", "flatten", "reshape", "view", "unflatten", "contiguous"})


def choose_kept(program: Program) -> None:
    """Put the lean form of each operation in its place."""
    for node in list(program.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and not node.kwargs:
            rule(program, node)


_ITSELF = "itself"


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


_SOURCES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {**RECOMPUTABLE, _ITSELF: _itself}


# a graph calls these with the activation's name, for a function cannot be written into its code
def conv2d_behind(y: torch.Tensor, source: torch.Tensor, name: str, *layer: Any) -> torch.Tensor:
    """Compute a conv that trains, of y = σ(source) for that activation, or of y itself; keeps the source."""
    result: torch.Tensor = conv2d_through(y, source, _SOURCES[name], *layer)
    return result


def linear_behind(y: torch.Tensor, source: torch.Tensor, name: str, *layer: Any) -> torch.Tensor:
    """Compute a linear layer that trains, of y = σ(source); keeps the source."""
    result: torch.Tensor = linear_through(y, source, _SOURCES[name], *layer)
    return result


def mul_behind(y: torch.Tensor, gate: torch.Tensor, source: torch.Tensor, name: str) -> torch.Tensor:
    """Compute y ⊙ gate, of y = σ(source); keeps the source and the gate."""
    result: torch.Tensor = mul_through(y, gate, source, _SOURCES[name])
    return result


def _call(node: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    node.target, node.args, node.kwargs = function, args, {}


def _is_frozen(node: Any) -> bool:
    """Whether a tensor argument, if there is one, neither trains nor depends on the picture."""
    return not isinstance(node, fx.Node) or not (node.meta["live"] or node.meta["moving"])


def _is_live(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta["live"])


def recomputed_from(node: Any) -> tuple[fx.Node, str] | None:
    """What takes a tensor's place: the input that the activation which gave it keeps anyway, and its name."""
    if not _is_live(node) or node.target is not activation:
        return None
    name, source = node.args
    return None if name in _KEEP_RESULT else (source, name)


def _keep_of_conv(program: Program, node: fx.Node) -> None:
    if not node.meta["live"] or not is_plain_layer(node):
        return
    x, weight = node.args[:2]
    if isinstance(weight, fx.Node) and weight.meta["moving"]:
        return
    if _is_frozen(weight):
        _call(node, frozen_conv2d, *node.args)
    else:
        found = recomputed_from(x) or (x, _ITSELF)
        _call(node, conv2d_behind, x, *found, *node.args[1:])


def _keep_of_linear(program: Program, node: fx.Node) -> None:
    if not node.meta["live"] or not is_plain_layer(node):
        return
    x, weight, bias = node.args
    if isinstance(weight, fx.Node) and weight.meta["moving"]:
        return
    if _is_frozen(weight):
        _call(node, frozen_linear, x, weight, bias)
    else:
        found = recomputed_from(x) or (x, _ITSELF)
        _call(node, linear_behind, x, *found, weight, bias)


def _keep_of_activation(program: Program, node: fx.Node) -> None:
    x, name = node.args
    inplace = may_overwrite(program, x)
    if not node.meta["live"]:
        if name == "relu":
            _call(node, F.relu, x, inplace)
    elif name == "relu":
        _call(node, relu_result if _result_is_kept(node) else relu_bits, x, inplace)
    else:
        _call(node, activation, name, x)


def _result_is_kept(node: fx.Node) -> bool:
    """Whether another keeps a tensor for its own gradient, or may."""
    return any(_keeps(user, node) for user in node.users)


def _keeps(user: fx.Node, source: fx.Node) -> bool:
    if not user.meta["live"]:
        return False
    if user.target in (F.conv2d, F.linear):
        return not all(_is_frozen(item) for item in user.args[1:2])
    if user.target in (torch.add, torch.cat, frozen_conv2d, frozen_linear, F.avg_pool2d, F.max_pool2d, affine, "mean"):
        return False
    if user.target is torch.mul:
        return any(_is_live(item) for item in user.args if item is not source)
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    if name in _VIEWS:
        return _result_is_kept(user)
    return user.op != "output"


def _keep_of_affine(program: Program, node: fx.Node) -> None:
    x, scale, shift = node.args
    assert isinstance(scale, fx.Node) and isinstance(shift, fx.Node)
    if not _is_frozen(shift):
        zeros = program.hold(torch.zeros_like(program.value(scale)))
        scaled = program.emit(node, lean_affine, x, scale, zeros, 1, like=node)
        offset = program.emit(node, torch.reshape, shift, (-1, 1, 1))
        _call(node, torch.add, scaled, offset)
    else:
        _call(node, lean_affine, x, scale, shift, 1)


def _keep_of_product(program: Program, node: fx.Node) -> None:
    for wide, gate in (node.args, node.args[::-1]):
        found = recomputed_from(wide)
        if found is not None and _is_live(gate) and _broadcasts(sizes(gate), sizes(wide)):
            _call(node, mul_behind, wide, gate, *found)
            return


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return len(small) == len(large) == 4 and small[:2] == large[:2] and small[2:] == (1, 1)


def _keep_of_norm(program: Program, node: fx.Node) -> None:
    if _is_live(node.args[0]) and all(_is_frozen(item) for item in node.args[2:4]):
        _call(node, frozen_layer_norm if node.target is F.layer_norm else frozen_group_norm, *node.args)


def _keep_of_pool(program: Program, node: fx.Node) -> None:
    if node.meta["live"] and len(node.args) == 6:
        _call(node, avg_pool2d_lean if node.target is F.avg_pool2d else max_pool2d_lean, *node.args)


_RULES: dict[Any, Callable[[Program, fx.Node], None]] = {
    F.conv2d: _keep_of_conv,
    F.linear: _keep_of_linear,
    activate: _keep_of_activation,
    affine: _keep_of_affine,
    torch.mul: _keep_of_product,
    F.layer_norm: _keep_of_norm,
    F.group_norm: _keep_of_norm,
    F.avg_pool2d: _keep_of_pool,
    F.max_pool2d: _keep_of_pool,
}
