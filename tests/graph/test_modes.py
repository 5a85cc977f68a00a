"""One graph for both modes: what follows a module's mode does so bit for bit, and what cannot stays closed."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import cadapt
from cadapt.graph.modes import is_mode, reads_training
from cadapt.graph.trace import trace
from tests.graph.helpers import of_kind, sites_of
from tests.models import PlainBlock, TinyNet

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


class Dropping(nn.Module):
    """A residual block with a functional dropout that is told the mode."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.by_name = by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.conv1(x))
        y = functional.dropout(y, 0.5, training=self.training) if self.by_name else self._drop(y)
        return x + self.conv2(y)

    def _drop(self, y: torch.Tensor) -> torch.Tensor:
        return functional.dropout(y, 0.5, self.training)


class RootDropping(TinyNet):
    """A functional dropout in the root's own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.blocks(self.stem(x))).flatten(1)
        return self.fc(functional.dropout(x, 0.5, self.training))


class Attending(nn.Module):
    """A residual block of attention whose dropout is a number: 0 in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        return x + self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


NETS: dict[str, Callable[[], nn.Module]] = {
    "named flag": lambda: TinyNet(Dropping(by_name=True), PlainBlock()),
    "flag by place": lambda: TinyNet(PlainBlock(), Dropping(by_name=False)),
    "at the root": lambda: RootDropping(PlainBlock()),
    "attention": lambda: TinyNet(Attending(), Attending()),
}


def seeded(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        result: torch.Tensor = model(IMAGES)
    return result


@pytest.mark.parametrize("kind", NETS)
def test_a_trace_drops_as_the_model_does(kind: str) -> None:
    model = NETS[kind]()
    traced = fx.GraphModule(model, trace(model))
    for training in (True, False, True):
        model.train(training)
        traced.train(training)
        assert torch.equal(seeded(traced), seeded(model)), f"training={training}"
    assert not torch.equal(seeded(traced.train()), seeded(traced.eval()))


@pytest.mark.parametrize("kind", NETS)
def test_the_module_is_opened(kind: str) -> None:
    model = NETS[kind]()
    graph = trace(model)
    called = {model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    assert not any(isinstance(module, Dropping | Attending) for module in called)
    assert any(is_mode(node) for node in graph.nodes)
    assert of_kind(sites_of(model), "block")


@pytest.mark.parametrize("outer", [True, False])
def test_a_dropout_follows_the_mode_of_its_own_module(outer: bool) -> None:
    """Frozen parts are put in eval mode while the rest trains."""
    base = TinyNet(PlainBlock(), Dropping(by_name=True))
    adapted = cadapt.insert(base, img_size=32)
    for net in (base, adapted):
        net.train(outer)
        net.get_submodule("blocks.1").train(not outer)
    first = seeded(adapted)
    assert torch.equal(first, seeded(base))
    torch.manual_seed(8)
    with torch.no_grad():
        assert torch.equal(adapted(IMAGES), first) is outer


@pytest.mark.parametrize("kind", NETS)
def test_an_adapted_model_drops_in_train_mode_as_its_base_does(kind: str) -> None:
    base = NETS[kind]().eval()
    scheme = "res-par" if kind == "attention" else "conv-par"
    adapted = cadapt.insert(base, scheme=scheme, img_size=32)
    assert torch.equal(seeded(adapted), seeded(base))
    assert torch.equal(seeded(adapted.train()), seeded(base.train()))
    assert not torch.equal(seeded(adapted), seeded(adapted.eval()))


class Parting(nn.Module):
    """Another conv for each mode: no one graph does both."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.trained = conv(), conv()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.trained(x) if self.training else self.fixed(x))


class Reading(nn.Module):
    """Holds a module that parts, and does not ask for its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Parting()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.inner(x))


def test_a_module_whose_graph_differs_by_mode_is_closed_and_a_conv_unit() -> None:
    model = TinyNet(Parting(), PlainBlock())
    assert [str(node.target) for node in trace(model).nodes if node.op == "call_module"][:2] == ["stem", "blocks.0"]
    sites = of_kind(sites_of(model), "conv")
    assert [(site.path, site.kernel, site.operator) for site in sites] == [
        ("blocks.0", (3, 3), "Parting"),
        ("blocks.1.conv2", (3, 3), "Conv2d"),
    ]


def test_only_the_module_that_parts_is_closed() -> None:
    model = TinyNet(Reading())
    targets = [str(node.target) for node in trace(model).nodes if node.op == "call_module"]
    assert targets == ["stem", "blocks.0.inner", "blocks.0.conv", "pool", "fc"]
    assert [site.path for site in of_kind(sites_of(model), "block")] == ["blocks.0"]


class PartingNumber(nn.Module):
    """A number that is not 0 in eval mode: it cannot be made from the flag by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.leaky_relu(self.conv(x), 0.2 if self.training else 0.1)


def test_other_constants_that_differ_by_mode_close_the_module() -> None:
    model = TinyNet(PartingNumber())
    assert [str(node.target) for node in trace(model).nodes if node.op == "call_module"][:2] == ["stem", "blocks.0"]
    traced = fx.GraphModule(model, trace(model))
    for training in (True, False):
        assert torch.equal(seeded(traced.train(training)), seeded(model.train(training)))


class RootParting(TinyNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(x.mean((2, 3))) if self.training else self.fc(self.pool(x).flatten(1)).softmax(1)


def test_a_root_that_parts_is_refused_with_the_reason() -> None:
    with pytest.raises(cadapt.CadaptError, match="cannot trace RootParting: its graph in train mode"):
        trace(RootParting(PlainBlock()))


class Sub(Dropping):
    """Inherits the code that asks for its mode."""


def test_who_asks_for_its_mode() -> None:
    assert reads_training(Dropping)
    # by a method that forward calls, and by one it has from its parent
    assert reads_training(Sub)
    assert reads_training(nn.Dropout)
    assert not reads_training(PlainBlock)
    assert not reads_training(nn.Conv2d)
