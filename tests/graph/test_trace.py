"""Traces stay true to the model: same outputs in both modes, same names, nothing left behind, refusals that say why."""

import pytest
import timm
import torch
from torch import fx, nn

from cadapt.errors import CadaptError
from cadapt.graph.trace import record_shapes, trace
from tests.models import BASES, TinyNet, make_images, make_model


@pytest.mark.parametrize("trait", list(BASES))
def test_a_trace_computes_what_the_model_does(trait: str) -> None:
    model, images = make_model(trait), make_images(trait)
    traced = fx.GraphModule(model, trace(model))
    for training in (False, True):
        # batch norms move their statistics in train mode: a copy of the state each time
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            torch.manual_seed(0)
            expected = model.train(training)(images)
            model.load_state_dict(state)
            torch.manual_seed(0)
            got = traced.train(training)(images)
            model.load_state_dict(state)
        assert torch.equal(got, expected), f"training={training}"


def test_targets_are_the_models_own_paths() -> None:
    model = make_model("plain")
    paths = {name for name, _ in model.named_modules()}
    assert {str(node.target) for node in trace(model).nodes if node.op == "call_module"} <= paths


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_and_attributes_are_left_alone(training: bool) -> None:
    model = make_model("windowed").train(training)
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    trace(model)
    assert all(module.training is training for module in model.modules())
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before


class ModeDependent(nn.Module):
    """Adds a conv in train mode only: its two traces part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if self.training else x


def test_a_block_that_asks_for_its_mode_stays_whole() -> None:
    model = TinyNet(ModeDependent())
    targets = [str(node.target) for node in trace(model).nodes if node.op == "call_module"]
    assert "blocks.0" in targets
    assert "blocks.0.conv" not in targets


class DataDependent(nn.Module):
    """Branches on values, which no symbolic trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if bool(x.sum() > 0) else x


def test_a_block_that_does_not_trace_stays_whole() -> None:
    targets = [str(node.target) for node in trace(TinyNet(DataDependent())).nodes if node.op == "call_module"]
    assert "blocks.0" in targets


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3))) if bool(x.sum() > 0) else x.mean((2, 3))


def test_a_model_that_does_not_trace_is_refused_by_name() -> None:
    with pytest.raises(CadaptError) as caught:
        trace(Untraceable())
    assert "cannot trace Untraceable" in caught.value.message
    assert "\n" not in caught.value.message


def test_an_input_the_model_refuses_is_told() -> None:
    model = make_model("windowed")
    graph = trace(model)
    with pytest.raises(CadaptError) as caught:
        record_shapes(graph, model, (3, 48, 48))
    assert "3×48×48" in caught.value.message


class Optional(TinyNet):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        y = super().forward(x)
        return y * scale if mask is None else y * mask


def test_arguments_beyond_the_image_keep_their_defaults() -> None:
    graph = trace(Optional())
    assert [node.op for node in graph.nodes].count("placeholder") == 1
    model = Optional()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(fx.GraphModule(model, trace(model))(x), model(x))


def test_a_trace_asks_nothing_of_later_ones() -> None:
    """Functions that timm wraps mark their nodes; the code of such a graph would mark them for all tracers to come."""
    model = timm.create_model("test_maxvit").eval()
    graph = trace(model)
    assert any(getattr(node.target, "__name__", "") == "window_reverse" for node in graph.nodes)
    assert "wrap(" not in graph.python_code("self").src
