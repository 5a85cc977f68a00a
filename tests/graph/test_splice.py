"""Splices against models written out by hand: order of several splices, in-place neighbours, shared modules."""

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from cadapt.graph.anatomy import Located
from cadapt.graph.operators import mutates_input
from cadapt.graph.sites import locate_sites
from cadapt.graph.splice import Splicer
from cadapt.plan import Form
from tests.graph.helpers import traced
from tests.models import OverwritingBlock, PlainBlock, TinyNet


def sites_in_copy(model: nn.Module, kind: str) -> tuple[fx.Graph, list[Located]]:
    """A graph that no module owns, and the sites of a kind with their nodes in it."""
    original = traced(model)
    located = [item for item in locate_sites(original, model) if item.site.kind == kind]
    graph, values = fx.Graph(), {}
    graph.output(graph.graph_copy(original, values))
    return graph, [replace(item, input=values[item.input], output=values[item.output]) for item in located]


def splice(model: nn.Module, kind: str, form: Form, adapters: list[nn.Module]) -> nn.Module:
    """The model with an adapter at each site of a kind, in order."""
    graph, located = sites_in_copy(model, kind)
    assert len(located) == len(adapters)
    splicer = Splicer(graph, model)
    root = nn.Module()
    root._modules.update(model._modules)
    for index, (item, adapter) in enumerate(zip(located, adapters, strict=True)):
        root.add_module(f"delta{index}", adapter)
        splicer.join(item, f"delta{index}", form)
    graph.lint()
    return fx.GraphModule(root, graph)


def deltas(count: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(8, 8, kernel, padding=kernel // 2) for _ in range(count)]


def run_blocks(model: TinyNet, x: torch.Tensor, call: object) -> torch.Tensor:
    x = model.stem(x)
    for index, block in enumerate(model.blocks):
        x = call(index, block, x)  # type: ignore[operator]
    return model.fc(model.pool(x).flatten(1))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_same_training(
    spliced: nn.Module, images: torch.Tensor, expected: torch.Tensor, own: list[nn.Module]
) -> None:
    """Outputs and gradients of the adapters are those of the model written out by hand."""
    weights = [parameter for adapter in own for parameter in adapter.parameters()]
    got = spliced(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(got.square().sum(), weights)
    theirs = torch.autograd.grad(expected.square().sum(), weights)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [PlainBlock, OverwritingBlock])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_blocks_one_after_another(block: type[nn.Module], form: Form, images: torch.Tensor) -> None:
    model, own = TinyNet(block(), block()), deltas(2)

    def call(index: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # the block may overwrite what it is given, the adapter must not see it
        y = module(x.clone())
        return y + own[index](x if form == "parallel" else y)

    assert_same_training(splice(model, "block", form, own), images, run_blocks(model, images, call), own)


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_convs_whose_output_is_overwritten(form: Form, images: torch.Tensor) -> None:
    model, own = TinyNet(OverwritingBlock(), OverwritingBlock()), deltas(2)

    def call(index: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        y = module.conv1(x)
        return module.conv2(torch.relu(y + own[index](x if form == "parallel" else y))) + x

    assert_same_training(splice(model, "conv", form, own), images, run_blocks(model, images, call), own)


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_a_shared_block_gets_an_adapter_for_each_call(form: Form, images: torch.Tensor) -> None:
    block = PlainBlock()
    model, own = TinyNet(block, block), deltas(2)

    def call(index: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = module(x)
        return y + own[index](x if form == "parallel" else y)

    assert_same_training(splice(model, "block", form, own), images, run_blocks(model, images, call), own)


def test_two_adapters_at_one_site_add_up(images: torch.Tensor) -> None:
    model, own = TinyNet(PlainBlock()), deltas(2)
    graph, (item,) = sites_in_copy(model, "block")
    splicer = Splicer(graph, model)
    for index in range(2):
        model.add_module(f"delta{index}", own[index])
        splicer.join(item, f"delta{index}", "parallel" if index == 0 else "sequential")
    graph.lint()

    def call(index: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = module(x) + own[0](x)
        return y + own[1](y)

    assert_same_training(fx.GraphModule(model, graph), images, run_blocks(model, images, call), own)


def test_nothing_of_the_base_is_called_twice_or_dropped(images: torch.Tensor) -> None:
    model = TinyNet(OverwritingBlock(), PlainBlock())
    before = [node.target for node in traced(model).nodes if node.op == "call_module"]
    spliced = splice(model, "block", "parallel", deltas(2))
    after = [node.target for node in spliced.graph.nodes if node.op == "call_module"]
    assert [target for target in after if "delta" not in str(target)] == before


def test_in_place_operations_are_known() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud = nn.ReLU(inplace=True)
            self.quiet = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.quiet(x)
            x = self.loud(x)
            x = nn.functional.relu(x, inplace=True)
            x = torch.relu_(x)
            x = x.add_(1)
            return x + 1

    model = Mixed()
    nodes = [node for node in fx.symbolic_trace(model).graph.nodes if node.op not in ("placeholder", "output")]
    assert [mutates_input(node, model) for node in nodes] == [False, True, True, True, True, False]
