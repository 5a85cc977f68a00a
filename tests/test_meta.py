"""The meta twin: same structure, no data, and the original untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

from cadapt.meta import meta_copy


class Odd(nn.Module):
    """Tensors in every place a module may keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("fleeting", torch.ones(3, dtype=torch.int64), persistent=False)
        self.plain = torch.ones(5)
        self.nested: Any = {"list": [torch.ones(6), (nn.Parameter(torch.ones(7), requires_grad=False),)]}
        self.made = self.first.weight * 2
        self.again = self.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_every_tensor_becomes_meta_and_sharing_stays() -> None:
    model = Odd()
    model.first.weight.requires_grad_(False)
    twin: Any = meta_copy(model)
    inner, (parameter,) = twin.nested["list"]
    tensors = [*twin.parameters(), *twin.buffers(), twin.plain, inner, parameter, twin.made]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert twin.second.weight is twin.first.weight
    assert twin.again is twin.plain
    assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad
    assert not twin.first.weight.requires_grad and twin.first.bias.requires_grad
    assert twin.made.is_leaf and twin.made.requires_grad
    assert twin.fleeting.dtype == torch.int64
    assert list(twin.state_dict()) == list(model.state_dict())
    assert model.plain.device.type == "cpu" and model.nested["list"][0].device.type == "cpu"


def test_original_is_untouched_and_mode_kept() -> None:
    model = timm.create_model("test_resnet").train()
    model.get_submodule("layer1").eval()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    twin = meta_copy(model)
    twin.train()(torch.empty(2, 3, 32, 32, device="meta"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(parameter.grad is None for parameter in twin.parameters())
    copied = meta_copy(model)
    assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]


def test_layout_dtype_and_meta_models() -> None:
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last).half()
    twin: Any = meta_copy(model)
    assert twin.weight.is_contiguous(memory_format=torch.channels_last)
    assert twin.weight.dtype == torch.float16
    again: Any = meta_copy(twin)
    assert again.weight is not twin.weight and again.weight.shape == twin.weight.shape


def test_generated_code() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    twin = meta_copy(traced)
    assert isinstance(twin, fx.GraphModule)
    assert twin(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 6, 6)
    assert {parameter.device.type for parameter in traced.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "levit_128s"])
def test_timm_models_run_on_meta(name: str) -> None:
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    assert meta_copy(model)(torch.empty(2, *size, device="meta")).shape == (2, model.num_classes)
