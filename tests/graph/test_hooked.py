"""Adapters that do something, found and spliced by the graph, against forward hooks on the untraced toys.

A zero-initialised adapter cannot tell where its input is overwritten, or that it reads the wrong tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import cadapt
from tests.graph.test_crossing import DenseBlock, Tree
from tests.graph.test_grids import Tokens
from tests.graph.test_units import conv
from tests.models import OverwritingBlock, TinyNet, enliven, randomise

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Delta = Callable[[torch.Tensor], torch.Tensor]


def on_maps(adapter: nn.Module, activation: Delta, stride: int, padding: int) -> Delta:
    """α ⊙ PW(σ(DW(x))) written out, with an adapter's tensors."""
    tensors = dict(adapter.named_parameters())

    def delta(x: torch.Tensor) -> torch.Tensor:
        weight = tensors["depthwise.weight"]
        hidden = functional.conv2d(
            x, weight, tensors["depthwise.bias"], stride=stride, padding=padding, groups=len(weight)
        )
        mixed = functional.conv2d(activation(hidden), tensors["pointwise.weight"], tensors["pointwise.bias"])
        return tensors["alpha"] * mixed

    return delta


def on_tokens(adapter: nn.Module, activation: Delta, grid: tuple[int, int], prefix: int) -> Delta:
    """The same on tokens: those of the grid as a map, each prefix token as a picture of one pixel."""
    on_map = on_maps(adapter, activation, 1, 1)

    def delta(x: torch.Tensor) -> torch.Tensor:
        alone = [on_map(x[:, index, :, None, None]).flatten(1)[:, None] for index in range(prefix)]
        maps = on_map(x[:, prefix:].transpose(1, 2).unflatten(2, grid))
        return torch.cat([*alone, maps.flatten(2).transpose(1, 2)], 1)

    return delta


def first_given(given: tuple[Any, ...]) -> torch.Tensor:
    """What a module is given, or the list of what it is given, joined; before it may overwrite it."""
    return torch.cat(given[0], 1) if isinstance(given[0], list) else given[0].clone()


def adapted_and_hooked(
    base: nn.Module, scheme: str, make: Callable[[nn.Module], Delta], paths: list[str]
) -> tuple[cadapt.AdaptedModel, nn.Module]:
    """A base with lively adapters, and its copy with hooks that add the same at these modules."""
    model = cadapt.insert(randomise(base).eval(), scheme, img_size=32)
    group = model.adapters.get_submodule(scheme.replace("-", "_"))
    enliven(group, scale=0.3)
    assert [name for name, _ in group.named_children()] == [path.replace(".", "__") for path in paths]
    hooked = copy.deepcopy(base)
    for path in paths:
        delta, module = make(group.get_submodule(path.replace(".", "__"))), hooked.get_submodule(path)
        if scheme.endswith("seq"):
            module.register_forward_hook(lambda _, __, output, delta=delta: output + delta(output))
            continue
        kept: list[torch.Tensor] = []
        module.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(first_given(given)))
        module.register_forward_hook(lambda _, __, output, delta=delta, kept=kept: output + delta(kept.pop()))
    return model, hooked


def assert_equal(model: cadapt.AdaptedModel, hooked: nn.Module) -> None:
    """Outputs are equal, and the adapters have a part in them."""
    with torch.no_grad():
        ours = model(IMAGES)
        torch.testing.assert_close(ours, hooked(IMAGES), rtol=1e-5, atol=1e-6)
        with cadapt.disabled(model):
            assert (model(IMAGES) - ours).abs().max() > 1e-3


def assert_equal_in_training(model: cadapt.AdaptedModel, hooked: nn.Module) -> None:
    """So are the gradients of all adapters, which hold the tensors that the hooks use."""
    assert_equal(model, hooked)
    own = [tensor for name, tensor in model.adapters.named_parameters() if not name.startswith("head.")]
    mine, expected = (torch.autograd.grad(net(IMAGES).square().sum(), own) for net in (model, hooked))
    for got, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Its input is convolved and then overwritten for the shortcut: what lies parallel to it must not see that.

    A base like it runs and cannot be trained, for its conv wants its own input again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv(1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.act1(self.conv1(x))
        return self.conv2(branch) + self.act2(x)


class OverwritingByPosition(OverwritingBlock):
    """The same by a function, told to overwrite by its second argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = functional.relu(x, True)  # noqa: FBT003 - the very thing that is tested
        branch = self.act2(self.conv1(branch))
        return self.conv2(branch) + x


@pytest.mark.parametrize("scheme", ["conv-par", "conv-seq", "res-par", "res-seq"])
@pytest.mark.parametrize(
    ("block", "check"),
    [
        (OverwritingBlock, assert_equal_in_training),
        (OverwritingByPosition, assert_equal_in_training),
        (Shared, assert_equal),
    ],
)
def test_inputs_that_are_overwritten(
    block: type[nn.Module], check: Callable[[cadapt.AdaptedModel, nn.Module], None], scheme: str
) -> None:
    below = ".conv1" if scheme.startswith("conv") else ""
    model, hooked = adapted_and_hooked(
        TinyNet(block(), block()),
        scheme,
        lambda adapter: on_maps(adapter, torch.relu, 1, 1),
        [f"blocks.{index}{below}" for index in range(2)],
    )
    check(model, hooked)


class Summed(nn.Module):
    """Parallel convs with their norms, summed: the ReLU stands behind it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(conv(5, stride=stride, groups=8), nn.BatchNorm2d(8))
        self.narrow = nn.Sequential(conv(1, stride=stride), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) + self.narrow(x)


@pytest.mark.parametrize("scheme", ["conv-par", "conv-seq"])
def test_a_unit_that_is_a_sum(scheme: str) -> None:
    stride = 2 if scheme == "conv-par" else 1
    model, hooked = adapted_and_hooked(
        TinyNet(Summed(2), nn.ReLU(inplace=True), Summed(2), nn.ReLU()),
        scheme,
        lambda adapter: on_maps(adapter, torch.relu, stride, 2),
        ["blocks.0", "blocks.2"],
    )
    assert_equal_in_training(model, hooked)


def test_dense_layers_from_their_joint() -> None:
    model, hooked = adapted_and_hooked(
        TinyNet(DenseBlock()),
        "res-par",
        lambda adapter: on_maps(adapter, torch.relu, 1, 1),
        [f"blocks.0.layers.{index}" for index in range(3)],
    )
    assert_equal_in_training(model, hooked)


def test_blocks_that_are_given_their_shortcut() -> None:
    strides = iter((2, 1))
    model, hooked = adapted_and_hooked(
        TinyNet(Tree()),
        "res-par",
        lambda adapter: on_maps(adapter, torch.relu, next(strides), 1),
        ["blocks.0.tree1", "blocks.0.tree2"],
    )
    assert_equal_in_training(model, hooked)


@pytest.mark.parametrize("scheme", ["res-par", "res-seq"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_behind_prefix_tokens(prefix: int, scheme: str) -> None:
    model, hooked = adapted_and_hooked(
        Tokens(prefix),
        scheme,
        lambda adapter: on_tokens(adapter, functional.gelu, (8, 8), prefix),
        ["blocks.0", "blocks.1"],
    )
    assert_equal_in_training(model, hooked)
