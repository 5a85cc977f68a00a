"""Where the Conv-Adapter paper's code puts its adapters, for the families of models of the benchmark.

Written down by hand, apart from what cadapt finds, so that the competitors depend on nothing of cadapt's; a test holds
that both name the same places. PEFT's LoRA goes to the same convs where it can, else to the dense layers beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from tests.benchmarks.unavailable import Unavailable


@dataclass(frozen=True, kw_only=True)
class Family:
    """Patterns over module paths, each matching the whole of one.

    ``functional`` are the convs beside which conv-par goes; ``attention`` the blocks beside whose window attention it
    goes; ``dense`` the layers for LoRA in a block whose functional conv is depth-wise or that has none.
    """

    functional: str | None = None
    attention: str | None = None
    dense: str | None = None


_ATTENTION_LAYERS = r"\.attn\.(qkv|proj)"
# first match counts
FAMILIES = (
    (r"resnet(18|34)", Family(functional=r"layer\d\.\d+\.conv[12]")),
    (r"resnet\d+t?", Family(functional=r"layer\d\.\d+\.conv2")),
    (
        r"convnext_.*",
        Family(
            functional=r"stages\.\d\.(blocks\.\d+\.conv_dw|downsample\.1)",
            dense=r"stages\.\d\.(blocks\.\d+\.mlp\.fc[12]|downsample\.1)",
        ),
    ),
    (
        r"efficientnet_.*",
        Family(functional=r"blocks\.\d\.\d+\.conv_dw", dense=r"blocks\.\d\.\d+\.conv_pwl?"),
    ),
    (r"regnet[xy]_.*", Family(functional=r"s\d\.b\d+\.conv2\.conv", dense=r"s\d\.b\d+\.conv[13]\.conv")),
    (
        r"swin_.*",
        Family(attention=r"layers\.\d\.blocks\.\d+", dense=r"layers\.\d\.blocks\.\d+" + _ATTENTION_LAYERS),
    ),
    (r"vit_.*", Family(dense=r"blocks\.\d+" + _ATTENTION_LAYERS)),
)


def find_family(name: str) -> Family:
    """Return the places of a model by timm's name.

    Raises:
        Unavailable: none are written down.
    """
    for pattern, family in FAMILIES:
        if re.fullmatch(pattern, name):
            return family
    raise Unavailable(f"no places are written down for {name}; add its family to tests/benchmarks/places.py")


def find_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules whose whole path matches, in the model's order."""
    return {path: module for path, module in model.named_modules() if re.fullmatch(pattern, path)}


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where the one at ``path`` is."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the model's classifier, a linear layer."""
    classifier = model.get_classifier()  # type: ignore[operator]
    assert isinstance(classifier, nn.Linear), type(classifier)
    return classifier


def freeze_all_but_classifier(model: nn.Module) -> None:
    """Let the classifier alone require gradients."""
    model.requires_grad_(False)
    classifier_of(model).requires_grad_(True)
