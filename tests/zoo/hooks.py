"""Conv-Adapter by forward hooks on the untraced timm model: the second opinion on sites, splices and adapters.

It shares no code with cadapt: Δ(x) = α ⊙ PW(σ(DW(x))) is written out in torch's functions, and joins by hooks on the
modules that :mod:`tests.zoo.architectures` names. Only the adapters' tensors are taken from the adapted model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.zoo.architectures import Architecture

Tensors = Mapping[str, torch.Tensor]
_ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hard_swish": functional.hardswish,
}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One adapter as a formula: its tensors, and how its depth-wise conv moves over the grid.

    ``padding`` is None where the base pads by TensorFlow's rule. ``last`` says that maps are ``[B, H, W, C]``.
    """

    tensors: Tensors
    stride: int
    padding: int | None
    activation: str
    last: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return α ⊙ PW(σ(DW(x)))."""
        x = x.permute(0, 3, 1, 2) if self.last else x
        weight = self.tensors["depthwise.weight"]
        padding = self.padding
        if padding is None:
            x, padding = _pad_like_tensorflow(x, weight.shape[-1], self.stride), 0
        hidden = functional.conv2d(
            x, weight, self.tensors["depthwise.bias"], stride=self.stride, padding=padding, groups=len(weight)
        )
        hidden = _ACTIVATIONS[self.activation](hidden)
        mixed = functional.conv2d(hidden, self.tensors["pointwise.weight"], self.tensors["pointwise.bias"])
        delta = self.tensors["alpha"] * mixed
        return delta.permute(0, 2, 3, 1) if self.last else delta


def _pad_like_tensorflow(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
    return functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def expected_paths(architecture: Architecture, model: nn.Module, scheme: str) -> list[tuple[str, str]]:
    """Path and kind of everything a scheme adapts in a model: ``("layer1.0.conv2", "conv")``."""
    own = ("attention" if architecture.attention else "conv") if scheme.startswith("conv") else "block"
    pattern = architecture.convs if scheme.startswith("conv") else architecture.blocks
    below = ".attn" if own == "attention" else ""
    found = [(path + below, own) for path, module in model.named_modules() if _matches(pattern, path, module, own)]
    joining = [(path, "downsample") for path, _ in model.named_modules() if _whole(architecture.downsamples, path)]
    return found + joining


def _whole(pattern: str, path: str) -> bool:
    return bool(pattern) and re.fullmatch(pattern, path) is not None


def _matches(pattern: str, path: str, module: nn.Module, kind: str) -> bool:
    return _whole(pattern, path) and (kind != "conv" or isinstance(module, nn.Conv2d))


def hooked(architecture: Architecture, base: nn.Module, scheme: str, tensors: Mapping[str, Tensors]) -> nn.Module:
    """A copy of a base whose modules add what the adapters give, in the mode the base is in.

    Args:
        architecture: what is known of it.
        base: the timm model, untouched.
        scheme: the scheme.
        tensors: the adapters' tensors by the path they adapt.
    """
    model = copy.deepcopy(base)
    shapes = _block_strides(architecture, base)
    for path, kind in expected_paths(architecture, model, scheme):
        module = model.get_submodule(path.removesuffix(".attn"))
        sequential = scheme.endswith("seq") and not (kind == "downsample" and scheme == "conv-seq")
        delta = _delta(architecture, path, kind, module, tensors[path], sequential, shapes)
        if kind == "attention":
            _wrap_attention(module, delta, sequential)
        elif sequential:
            module.register_forward_hook(lambda _, __, output, delta=delta: output + delta(output))
        else:
            # what a block is given may be overwritten inside before its output is there
            kept: list[torch.Tensor] = []
            module.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].clone()))
            module.register_forward_hook(lambda _, __, output, delta=delta, kept=kept: output + delta(kept.pop()))
    return model


def _delta(
    architecture: Architecture,
    path: str,
    kind: str,
    module: Any,
    tensors: Tensors,
    sequential: bool,
    strides: Mapping[str, int],
) -> Delta:
    kernel = tensors["depthwise.weight"].shape[-1]
    stride, padding = 1, kernel // 2
    if not sequential and isinstance(module, nn.Conv2d):
        stride = module.stride[0]
        padding = None if "Same" in type(module).__name__ else module.padding[0]
    elif not sequential:
        stride = strides.get(path, 1)
    assert kernel == _expected_kernel(architecture, kind, module, sequential), path
    return Delta(
        tensors=tensors,
        stride=stride,
        padding=padding,
        activation=architecture.activation(path),
        last=architecture.attention,
    )


def _expected_kernel(architecture: Architecture, kind: str, module: nn.Module, sequential: bool) -> int:
    """K is the functional conv's, 7 for Swin's windows; behind an even kernel, the odd one within."""
    if architecture.attention:
        return 7
    largest = max(conv.kernel_size[0] for conv in module.modules() if isinstance(conv, nn.Conv2d))
    return largest - 1 if sequential and largest % 2 == 0 else largest


def _wrap_attention(block: Any, delta: Delta, sequential: bool) -> None:
    """Swin's window attention from norm1's map to before the drop-path is its block's method ``_attn``."""
    attend = block._attn

    def adapted(x: torch.Tensor) -> torch.Tensor:
        output = attend(x)
        return output + delta(output if sequential else x)

    block._attn = adapted


@torch.no_grad()
def _block_strides(architecture: Architecture, base: nn.Module) -> dict[str, int]:
    """By how much each block shrinks its grid, seen by running the model."""
    model, strides, grid = copy.deepcopy(base).eval(), {}, 1 if architecture.attention else 2

    def note(path: str, given: torch.Tensor, output: torch.Tensor) -> None:
        strides[path] = -(-given.shape[grid] // output.shape[grid])

    for path, module in model.named_modules():
        if _whole(architecture.blocks, path):
            module.register_forward_hook(lambda _, given, output, path=path: note(path, given[0], output))
    model(torch.zeros(1, 3, architecture.side, architecture.side))
    return strides
