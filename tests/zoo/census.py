"""Which of timm's architectures the promise covers, told from the model on the meta device.

The rule, which gives 644 ConvNets and 288 hybrids of timm 1.0.31's 1,371 architectures:

- A conv counts if its kernel is wider than 1 and it is beyond the stem. The stem is the first conv, all that is in a
  module named ``stem`` or of a class named after a stem, a patch embedding or a downsampling, and the projection that
  an embedding ends with. A ResNet inside a hybrid's patch embedding is no stem. Nets without such a conv are out:
  ViTs, MLPs, LeViT, pool-formers.
- Attention is a module of timm's that multiplies two activations as matrices (its source says so), or is called
  attention (MobileViTv2's is linear and multiplies by element). Pools, convs with routed weights, norms fused into
  a layer, and global context, which is one vector for the whole picture, are none.
- With such a conv and no attention it is a ConvNet, with both a hybrid.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Literal

import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

Kind = Literal["convnet", "hybrid"]

_STEM_CLASS = re.compile(r"stem|patchembed|downsampl", re.IGNORECASE)
_STEM_NAME = re.compile(r"(^|\.)(stem|conv_stem|stem_conv)(\.|$)")
_MATRIX_PRODUCTS = frozenset({"matmul", "einsum", "bmm", "baddbmm", "scaled_dot_product_attention"})
_NO_ATTENTION = re.compile(r"conv\d|pool|norm|context", re.IGNORECASE)


def architectures() -> tuple[str, ...]:
    """All of timm's architectures, in its order."""
    return tuple(timm.list_models())


def family_of(name: str) -> str:
    """The timm module that an architecture is written in."""
    family: str = _model_to_module[name]
    return family


def make_on_meta(name: str, **settings: object) -> nn.Module:
    """A timm model without data, in eval mode."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **settings)
    return model.eval()


def kind_of(model: nn.Module) -> Kind | None:
    """Whether a model is a ConvNet, a hybrid, or neither."""
    if not any(True for _ in convs_beyond_stem(model)):
        return None
    return "hybrid" if any(_is_attention(type(module)) for module in model.modules()) else "convnet"


def convs_beyond_stem(model: nn.Module) -> Iterator[str]:
    """Paths of the convs wider than 1 that are not of the stem."""
    modules = dict(model.named_modules())
    wide = [path for path, module in modules.items() if _is_wide_conv(module)]
    for path in wide[1:]:
        parts = path.split(".")
        around = [type(modules[".".join(parts[:end])]).__name__ for end in range(1, len(parts) + 1)]
        projects = len(around) > 1 and around[-2].endswith("Embed")
        if not projects and not _STEM_NAME.search(path) and not any(map(_STEM_CLASS.search, around)):
            yield path


def _is_wide_conv(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", 1)
    # a conv over channels (efficient channel attention) sees no neighbourhood
    has_weight = isinstance(getattr(module, "weight", None), nn.Parameter) and not isinstance(module, nn.Conv1d)
    return has_weight and max(kernel if isinstance(kernel, tuple | list) else (kernel,)) > 1


@functools.cache
def _is_attention(kind: type) -> bool:
    name = kind.__name__
    if not kind.__module__.startswith("timm.") or _NO_ATTENTION.search(name):
        return False
    return "attention" in name.lower() or any(map(_multiplies, ast.walk(ast.parse(inspect.getsource(kind)))))


def _multiplies(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", "")) in _MATRIX_PRODUCTS
