"""Memory of a step: against what autograd saves on real tensors, and against sums by hand."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cadapt.costing import count_activations, measure_step
from cadapt.errors import CadaptError
from cadapt.frozen import Memory, prepare
from cadapt.meta import meta_copy
from cadapt.plan import Plan
from tests.contract.cases import adapt, planned
from tests.models import BASES, input_side, make_images

SCHEMES = ("full", "conv-par", "lora")
# Of norms. In fp32 a frozen batch norm keeps unused statistics on meta, and none on a CPU: two numbers a channel.
# In bf16 layer and group norms' statistics are fp32 on a CPU, and bf16 on its fake tensors.
TOLERANCES = {"fp32": 0.02, "bf16": 0.05}


def saved_by_autograd(model: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes of the distinct storages that a real forward pass keeps, told apart by address, but the model's own."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), hooks:
        output = model(images)
    assert output.requires_grad
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("case", [(2, "fp32"), (5, "bf16")])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("trait", BASES)
def test_activations_are_what_autograd_saves(trait: str, scheme: str, case: tuple[int, str]) -> None:
    batch, precision = case
    if not isinstance(planned(trait, scheme), Plan):
        pytest.skip(f"{scheme} does not fit {trait}")
    model = adapt(trait, scheme, classes=7)[2].train()
    side = input_side(trait)
    saved = saved_by_autograd(model, make_images(trait, batch), precision)
    counted = count_activations(model, (3, side, side), batch=batch, precision=precision)
    assert counted == pytest.approx(saved, rel=TOLERANCES[precision])


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 2, bias=False))


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(
    "case", [("conv-par", 5, "fp32", "low"), ("full", 2, "bf16", "low"), ("lora", 2, "fp32", "min")]
)
@pytest.mark.parametrize("trait", BASES)
def test_what_the_engine_keeps_is_foretold_from_a_twin(
    trait: str, case: tuple[str, int, Literal["fp32", "bf16"], Memory]
) -> None:
    scheme, batch, precision, memory = case
    if not isinstance(planned(trait, scheme), Plan):
        pytest.skip(f"{scheme} does not fit {trait}")
    side = input_side(trait)
    model = adapt(trait, scheme, classes=7)[2].train()
    twin = prepare(meta_copy(model), memory=memory, precision=precision)
    counted = count_activations(twin, (3, side, side), batch=batch, precision=precision, channels_last=True)
    engine = prepare(model, memory=memory, precision=precision)
    saved = saved_by_autograd(engine, make_images(trait, batch), precision)
    assert counted == pytest.approx(saved, rel=TOLERANCES[precision])
    step = measure_step(twin, (3, side, side), batch=batch, precision=precision, channels_last=True)
    assert step.activations == counted < step.highest


def test_a_step_by_hand() -> None:
    model, batch = layers(), 16
    step = measure_step(model, (3, 4, 4), batch=batch)
    images, hidden = (4 * batch * width for width in (48, 32))
    first, second = 4 * 48 * 32, 4 * 32 * 2
    # the ReLU keeps its result, which is the second layer's input
    assert step.activations == images + hidden
    assert step.gradients == first + second
    # the first layer's weight gradient is made from the images and the gradient of its result; the ReLU's is gone
    scalars = 16  # the loss
    assert step.highest == pytest.approx(images + hidden + first + second, abs=scalars)


def test_gradients_of_batches_before_are_there_throughout() -> None:
    model = layers()
    first, second = 4 * 48 * 32, 4 * 32 * 2
    once, twice = (measure_step(model, (3, 4, 4), batch=16, accumulate=number) for number in (1, 2))
    assert once.activations == twice.activations
    # at the highest the second layer's is done already, and its batch's share added to it
    assert twice.highest == once.highest + first
    assert all(parameter.grad is None for parameter in model.parameters())
    assert second < first


def test_autocast_halves_what_a_layer_keeps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    size, batch = (3, 10, 10), 4
    weights = 8 * 3 * 9 + 8 * 8 * 9
    elements = batch * 100 * (3 + 8)
    assert count_activations(model, size, batch=batch) == 4 * elements
    # the weights are cast, too; the first conv's serves no gradient but is kept all the same
    assert count_activations(model, size, batch=batch, precision="bf16") == 2 * (elements + weights)


@pytest.mark.parametrize("trait", ["plain", "windowed", "layer-scaled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_are_affine_in_the_batch(trait: str, precision: str) -> None:
    model = adapt(trait, "conv-par", classes=7)[2]
    size = (3, input_side(trait), input_side(trait))
    two, four, eight = (count_activations(model, size, batch=batch, precision=precision) for batch in (2, 4, 8))
    assert eight - four == 2 * (four - two)
    assert 0 < two < four


def test_dropout_on_a_gpu_keeps_a_byte_where_a_cpu_keeps_a_float() -> None:
    # needs no GPU: forward passes of fake tensors ask no driver
    model = nn.Dropout(0.5)
    scaled = nn.Sequential(nn.Conv2d(3, 4, 1), model)
    kept = {device: count_activations(scaled, (3, 8, 8), batch=2, device=device) for device in ("cpu", "cuda")}
    assert kept["cpu"] - kept["cuda"] == 3 * 2 * 4 * 64


def test_the_model_is_as_before() -> None:
    model = adapt("plain", "full", classes=7)[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    measure_step(model, (3, 64, 64), batch=2, precision="bf16")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


class Lost(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("no gradient of this")


class Losing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Lost.apply(self.conv(x))
        return result


def test_a_backward_that_fails_is_told() -> None:
    assert count_activations(Losing(), (3, 4, 4)) > 0
    with pytest.raises(CadaptError, match="cannot count Losing for an input of 1×3×4×4: .*no gradient of this"):
        measure_step(Losing(), (3, 4, 4))
