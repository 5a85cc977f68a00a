"""Bake convolutions whose weight is computed at each call (weight standardisation, parametrisations) to plain ones.

BiT and NFNet normalise the same frozen weight again for every image; in ONNX that is half of all nodes. What a layer
really convolves with is caught in the act, so any kind of layer counts, whatever its class is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

RULE = "bake computed convolution weights"

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True, kw_only=True)
class Baking:
    """Paths that were baked, and "path: reason" for each layer that looked like it and was left as it is."""

    baked: tuple[str, ...]
    skipped: tuple[str, ...]


class _CaughtConvolutions(TorchFunctionMode):
    """Note the arguments of each 2-D convolution that runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is functional.conv2d:
            self.calls.append(_DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | named)
        return func(*args, **named)


def may_compute_weight(module: nn.Module) -> bool:
    """Whether a module is a convolution that may convolve with something else than its weight as it is stored."""
    if not isinstance(module, nn.Conv2d):
        return False
    return type(module).forward is not nn.Conv2d.forward or parametrize.is_parametrized(module)


def _record_calls(model: nn.Module, example: torch.Tensor) -> dict[nn.Module, torch.Size]:
    """Run the model and return the input shape of each candidate that is called as a module.

    A graph may also read a layer's weight without calling it; baking that layer would standardise twice.
    """
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[module] = inputs[0].shape

    candidates = [module for module in model.modules() if may_compute_weight(module)]
    handles = [module.register_forward_pre_hook(note) for module in candidates]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _catch(module: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    with _CaughtConvolutions() as caught:
        output = module(image)
    return output, caught.calls


def _plain(module: Any, call: dict[str, Any], padded: bool) -> nn.Conv2d:
    """Return a layer of the same arithmetic with the caught weight; ``padded``: the old one padded its input first."""
    weight, bias = call["weight"], call["bias"]
    # torch pads by another mode than zeros before it convolves, timm's convs by TensorFlow's rule
    own_mode = type(module).forward is nn.Conv2d.forward and module.padding_mode != "zeros"
    kind: Any = Conv2dSame if padded and not own_mode else nn.Conv2d
    modes = {"padding_mode": module.padding_mode} if own_mode else {}
    layer: nn.Conv2d = kind(
        weight.shape[1] * call["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=call["stride"],
        padding=module.padding if own_mode else call["padding"],
        dilation=call["dilation"],
        groups=call["groups"],
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **modes,
    )
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    return layer.eval()


@torch.no_grad()
def bake_layer(module: nn.Module, shape: torch.Size) -> nn.Conv2d | str | None:
    """Return the plain layer that computes the same, a reason why there is none, or None when nothing is computed.

    Args:
        module: a 2-D convolution in eval mode, on any device.
        shape: of an input it gets in the model, ``[batch, channels, height, width]``.
    """
    generator = torch.Generator().manual_seed(0)
    like: Any = module.weight
    first, second = (torch.randn((1, *shape[1:]), generator=generator).to(like) for _ in range(2))
    output, calls = _catch(module, first)
    other_output, other_calls = _catch(module, second)
    if len(calls) != 1 or len(other_calls) != 1:
        return f"{len(calls)} convolutions in one layer, expected 1"
    weight = calls[0]["weight"]
    if any(weight is parameter for parameter in module.parameters()):
        return None
    plain = _plain(module, calls[0], padded=calls[0]["input"].shape != first.shape)
    if weight.is_meta:  # a twin without data: there is nothing to compare
        return plain
    if not torch.equal(weight, other_calls[0]["weight"]):
        return "its weight depends on the input"
    if not torch.equal(plain(first), output) or not torch.equal(plain(second), other_output):
        return "a plain convolution with its computed weight gives another output"
    return plain


def bake_weights(model: nn.Module, example: torch.Tensor) -> Baking:
    """Replace, in place, every called convolution that computes its weight by a plain one holding the result.

    Args:
        model: a private copy, in eval mode, on the CPU.
        example: an input of the model, ``[batch, 3, height, width]``.
    """
    baked, skipped = [], []
    with torch.no_grad():
        results = {module: bake_layer(module, shape) for module, shape in _record_calls(model, example).items()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        result = results.get(module)
        if isinstance(result, str):
            skipped.append(f"{path}: {result}")
        elif result is not None:
            model.set_submodule(path, result)
            baked.append(path)
    return Baking(baked=tuple(baked), skipped=tuple(skipped))
