"""Opened adapters: their operations in the graph, the same results, and those that must stay one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.frozen.inline import inline_adapters
from cadapt.frozen.program import Program
from tests.frozen.programs import adapted, assert_unchanged, count, measured, pictures, running

# maps, channels last, adapters of several layers, and with modules of others inside
CASES = [
    ("plain", "conv-par"),
    ("windowed", "conv-par"),
    ("plain", "residual-seq"),
    ("layer-scaled", "lora"),
    ("plain", "tinytl"),
    ("plain", "ssf"),
    ("tokens", "convpass"),
    ("tokens", "conv-par"),
]


def adapter_calls(program: Program) -> list[nn.Module]:
    """The adapters, and modules inside adapters, that are still called."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    return [program.root.get_submodule(name) for name in targets if name.startswith(f"{ADAPTERS}.")]


def first_adapter(model: AdaptedModel) -> str:
    """The path of the first adapter the graph calls."""
    return next(str(node.target) for node in model.graph.nodes if str(node.target).startswith(f"{ADAPTERS}.conv_par"))


@pytest.mark.parametrize(("trait", "scheme"), CASES)
def test_the_same_results_from_open_adapters(trait: str, scheme: str) -> None:
    program = measured(adapted(trait, scheme, classes=5), inline_adapters)
    assert not [module for module in adapter_calls(program) if type(module).__module__.startswith("cadapt.")]
    assert_unchanged(program)


def test_adapters_that_branch_on_sizes_stay() -> None:
    program = measured(adapted("plain", "vpt", classes=5), inline_adapters)
    assert [module for module in adapter_calls(program) if type(module).__module__.startswith("cadapt.")]
    assert_unchanged(program)


def test_the_model_keeps_its_own_graph() -> None:
    model = adapted("plain", "conv-par")
    before = str(model.graph)
    inline_adapters(Program(model))
    assert str(model.graph) == before


class _Doubled(nn.Conv2d):
    """A conv in an adapter's place; its class is made to pass for one of the package's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Asking(_Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x) * 3


class _Valued(_Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_meta or x.sum() > 0 else -super().forward(x)


class _Foreign(_Doubled):
    pass


for kind in (_Doubled, _Asking, _Valued):
    kind.__module__ = "cadapt.adapters.made_here"


def with_adapter(kind: type[_Doubled]) -> AdaptedModel:
    """A tiny ResNet whose first adapter is of another kind."""
    model = adapted("plain", "conv-par")
    path = first_adapter(model)
    old = model.get_submodule(path)
    assert isinstance(old.depthwise, nn.Conv2d) and isinstance(old.pointwise, nn.Conv2d)
    like = old.depthwise
    new = kind(like.in_channels, old.pointwise.out_channels, like.kernel_size, like.stride, like.padding)  # type: ignore[arg-type]
    model.set_submodule(path, new.double())
    return model


@pytest.mark.parametrize(("kind", "stays"), [(_Doubled, False), (_Asking, True), (_Valued, True), (_Foreign, True)])
def test_which_adapters_are_opened(kind: type[_Doubled], stays: bool) -> None:
    """Not those that ask for their mode or for values, and none of other packages."""
    model = with_adapter(kind)
    for mode in (False, True):
        program = measured(model.train(mode), inline_adapters)
        assert bool(count(program, kind)) is stays
        assert_unchanged(program)


def test_hooked_adapters_and_hooked_layers_in_them_stay() -> None:
    model = adapted("plain", "conv-par")
    path = first_adapter(model)
    seen: list[str] = []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append("adapter"))
    other = next(
        str(node.target) for node in reversed(model.graph.nodes) if str(node.target).startswith(f"{ADAPTERS}.conv_par")
    )
    model.get_submodule(other).pointwise.register_forward_hook(lambda *_: seen.append("layer"))
    program = measured(model, inline_adapters)
    assert path in [node.target for node in program.graph.nodes]
    assert other not in [node.target for node in program.graph.nodes]
    seen.clear()
    with torch.no_grad():
        running(program)(pictures(model))
    assert seen == ["adapter", "layer"]
