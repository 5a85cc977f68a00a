"""Graphs laid out flat: the same code again, and no depth that pickle could not follow."""

import pickle

import torch
from torch import fx, nn

import cadapt
from cadapt.graph.flatten import flatten, unflatten
from tests.models import make_images, make_model, surveyed


def test_a_graph_comes_back_as_it_was() -> None:
    graph = surveyed("windowed")[1].graph
    again = unflatten(pickle.loads(pickle.dumps(flatten(graph))))
    assert again.python_code("self").src == graph.python_code("self").src
    metas = [(node.name, node.meta["tensor_meta"].shape) for node in again.nodes if node.op == "call_module"]
    assert metas == [(node.name, node.meta["tensor_meta"].shape) for node in graph.nodes if node.op == "call_module"]


def test_slices_and_keywords_keep_their_nodes() -> None:
    class Sliced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = x.shape[1] // 2
            return torch.cat([x[:, :size], x[:, size:]], dim=1).clamp(min=0)

    graph = fx.symbolic_trace(Sliced()).graph
    model = fx.GraphModule(Sliced(), unflatten(flatten(graph)))
    x = torch.randn(2, 6)
    assert torch.equal(model(x), x.clamp(min=0))


def test_a_deep_adapted_model_is_pickled() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(600)))
            self.fc = nn.Linear(3, 2)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.layers(x).mean((2, 3)))

    model = cadapt.insert(Deep().eval(), "bias", img_size=8)
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(x), model(x))


def test_a_pickled_model_can_still_be_switched_off() -> None:
    base = make_model("plain")
    model = cadapt.insert(base, "lora+norm", img_size=64)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in again.adapters.parameters():
            parameter.add_(0.1)
        images = make_images("plain")
        with cadapt.disabled(again):
            assert torch.equal(again(images), base(images))
