"""Cost: exact counts of small nets, the paper's figures, and kept bytes against a real run on the CPU."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cadapt.costing import Convention, cost
from cadapt.errors import CadaptError, UsageError


def kept_on_cpu(model: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that a real forward pass keeps for backward, told apart by their address."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total = sum(size for address, size in sizes.items() if address not in own)
    output.sum().backward()
    return total


def test_macs_of_layers_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 10·10 positions · 8 · 3·9
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),  # 5·5 · 8 · 9
        nn.Flatten(),
        nn.Linear(200, 7),
    )
    layers = 100 * 8 * 27 + 25 * 8 * 9 + 200 * 7
    assert cost(model, (3, 10, 10)).macs == layers
    # conv bias 800, batch norm 2·800, ReLU 800; the linear bias is not counted
    assert cost(model, (3, 10, 10), convention="paper").macs == layers + 4 * 800


def test_attention_counts_both_products() -> None:
    model = timm.create_model("test_vit", num_classes=0)
    tokens, width, depth = 101, 64, 6
    linear = tokens * width * (3 + 1) * width + 2 * tokens * width * model.blocks[0].mlp.fc1.out_features
    attention = 2 * tokens * tokens * width
    patches = 100 * 3 * 16 * 16 * width
    assert cost(model, (3, 160, 160), training=False).macs == patches + depth * (linear + attention)


@pytest.mark.parametrize(
    ("name", "convention", "gmacs"),
    [
        ("resnet50", "macs", 4.0892),
        ("resnetv2_50x1_bit", "paper", 4.1162),
        ("convnext_base", "macs", 15.3547),
        ("convnext_base", "paper", 15.3601),
        ("vit_base_patch16_224", "macs", 17.5638),
    ],
)
def test_known_models(name: str, convention: Convention, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert cost(model, convention=convention, training=False).macs / 1e9 == pytest.approx(gmacs, abs=5e-5)


class Adapter(nn.Module):
    """Conv-Adapter written out: α ⊙ PW(σ(DW(x))) at γ = 1."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, activation: nn.Module, size: int) -> None:
        super().__init__()
        padding = kernel // 2 if kernel % 2 else 0
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels)
        self.activation = activation
        self.pointwise = nn.Conv2d(channels, out, 1)
        self.alpha = nn.Parameter(torch.ones(1, out, 1, 1))
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.alpha * self.pointwise(self.activation(self.depthwise(x)))
        return result


def resnet50_adapters(scheme: str) -> list[Adapter]:
    adapters, before, size = [], 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        middle, out = 64 * 2**stage, 256 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            first, last = {"conv": (middle, middle), "res-par": (before, out), "res-seq": (out, out)}[scheme]
            strided = scheme != "res-seq"
            entry = size if strided or stride == 1 else size // stride
            adapters.append(Adapter(first, last, 3, stride if strided else 1, nn.ReLU(), entry))
            before, size = out, size // stride
    return adapters


def convnext_adapters(scheme: str) -> list[Adapter]:
    adapters, size = [], 56
    for stage, depth in enumerate((3, 3, 27, 3)):
        channels = 128 * 2**stage
        if stage:
            parts = (channels // 2, channels, 2, 2) if scheme == "par" else (channels, channels, 1, 1)
            adapters.append(Adapter(*parts, nn.GELU(), size if scheme == "par" else size // 2))
            size //= 2
        adapters += [Adapter(channels, channels, 7, 1, nn.GELU(), size) for _ in range(depth)]
    return adapters


@pytest.mark.parametrize(
    ("adapters", "parameters", "increment", "base", "printed"),
    [
        (resnet50_adapters("conv"), 1_302_784, "0.2221", 4.1162, "4.34"),
        (resnet50_adapters("res-par"), 17_479_296, "2.8817", 4.1162, "7.00"),
        (resnet50_adapters("res-seq"), 20_300_800, "3.3546", 4.1162, "7.47"),
        (convnext_adapters("par"), 12_104_064, "2.1660", 15.3601, "17.53"),
        (convnext_adapters("seq"), None, "2.2429", 15.3601, "17.60"),
    ],
    ids=["conv-par", "res-par", "res-seq", "convnext-par", "convnext-seq"],
)
def test_paper_figures(
    adapters: list[Adapter], parameters: int | None, increment: str, base: float, printed: str
) -> None:
    costs = [cost(item, item.input_shape, training=False, convention="paper") for item in adapters]
    gmacs = sum(item.macs for item in costs) / 1e9
    assert f"{gmacs:.4f}" == increment
    assert f"{base + gmacs:.2f}" == printed
    assert parameters is None or sum(item.parameters for item in costs) == parameters


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("frozen", [False, True])
def test_kept_bytes_equal_a_real_run(name: str, frozen: bool) -> None:
    model = timm.create_model(name, num_classes=5).train()
    if frozen:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    size = model.pretrained_cfg["input_size"]
    counted = cost(model, size, batch=3)
    assert counted.activation_bytes == kept_on_cpu(model, torch.randn(3, *size)) > 0
    assert counted.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_resnet50_keeps_what_was_measured() -> None:
    model = timm.create_model("resnet50").train()
    counted = cost(model, batch=8).activation_bytes
    assert counted == kept_on_cpu(model, torch.randn(8, 3, 224, 224))
    assert counted / 2**20 == pytest.approx(656, abs=1)


def test_kept_bytes_follow_what_the_output_needs() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x).exp()
            return self.used(x)

    images = 2 * 3 * 5 * 5 * 4
    assert cost(Idle(), (3, 5, 5), batch=2).activation_bytes == images
    assert cost(Idle().requires_grad_(False), (3, 5, 5), batch=2).activation_bytes == 0
    assert cost(Idle(), (3, 5, 5), batch=2, training=False).activation_bytes == 0


def test_model_and_random_numbers_are_untouched() -> None:
    model = timm.create_model("test_resnet", num_classes=5, drop_path_rate=0.5).train()
    model.get_submodule("layer1").eval().requires_grad_(False)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    cost(model, (3, 32, 32), batch=2)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == modes


def test_view_of_a_parameter_as_input_of_a_module() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(self.token.expand(x.shape[0], -1))
            return result

    assert cost(Token(), (3, 8, 8)).macs == 8


def test_json() -> None:
    record = cost(nn.Conv2d(3, 8, 3), [3, 8, 8], batch=2).to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["parameters"] == 224 and record["input_size"] == [3, 8, 8]


class Reader(nn.Module):
    """A model whose forward needs values."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] if float(x.relu().sum()) > 0 else x


def test_failures_name_the_operator() -> None:
    with pytest.raises(
        CadaptError, match="cannot count Reader for an input of 1×3×4×4: .* at aten::_local_scalar_dense"
    ):
        cost(Reader(), (3, 4, 4))
    with pytest.raises(CadaptError, match="cannot count Conv2d .* at aten::convolution"):
        cost(nn.Conv2d(4, 4, 3), (3, 8, 8))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    with pytest.raises(CadaptError, match="more than 1 value per channel"):
        cost(pooled, (3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "papper"}, "unknown counting convention 'papper'"),
        ({"batch": 0}, "batch is 0"),
        ({"input_size": (224, 224)}, "expected channels, height and width"),
    ],
)
def test_senseless_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cost(nn.Identity(), **options)
