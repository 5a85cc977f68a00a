"""Activations by name, frozen affines and gates, against the plain expressions."""

import pytest
import timm.layers.activations as timm_activations
import torch
import torch.nn.functional as F
from torch import Tensor

from cadapt.frozen.functions.elementwise import RECOMPUTABLE, activation, affine, mul_through
from tests.frozen.comparing import FORMATS, assert_same, difference, kept, map_of, whole

ONE_BIT = {"relu", "relu6"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", RECOMPUTABLE)
def test_activations(name: str, format: torch.memory_format) -> None:
    x = map_of(2, 3, 5, 7, format=format)
    assert_same(lambda x: activation(name, x * 3), lambda x: RECOMPUTABLE[name](x * 3), (x,))


@pytest.mark.parametrize("name", ["quick_gelu", "hard_mish", "hard_swish", "hard_sigmoid", "mish"])
def test_names_are_timms(name: str) -> None:
    """Timm writes these as several operations."""
    tolerance = 1e-7 if name == "hard_sigmoid" else 1e-12  # torch's kernel has its sixth in float32
    plain = getattr(timm_activations, name)
    assert_same(lambda x: activation(name, x * 3), lambda x: plain(x * 3), (map_of(4, 50),), tolerance)


@pytest.mark.parametrize("name", RECOMPUTABLE)
def test_activations_keep_one_tensor_at_most(name: str) -> None:
    x = map_of(2, 3, 4, 5)
    expected = [((15,), torch.uint8)] if name in ONE_BIT else [((2, 3, 4, 5), torch.float64)]
    assert kept(lambda: activation(name, x)) == expected


@pytest.mark.parametrize("name", ["quick_gelu", "hard_mish"])
def test_kinks_and_half_precision(name: str) -> None:
    kinks = torch.tensor([-3.0, -1, 0, 1, 3]).requires_grad_()
    assert_same(lambda x: activation(name, x), RECOMPUTABLE[name], (kinks,), 1e-6)
    half = torch.randn(50).bfloat16().requires_grad_()
    assert_same(lambda x: activation(name, x), RECOMPUTABLE[name], (half,), 2e-2)


def test_compiled_activations() -> None:
    names = sorted(set(RECOMPUTABLE) - {"relu", "relu6"})
    assert_same(
        whole(lambda x: sum(activation(name, x) for name in names)),
        lambda x: sum(RECOMPUTABLE[name](x) for name in names),
        (map_of(2, 3, 4, 5),),
    )


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_affine(format: torch.memory_format, channel_dim: int) -> None:
    scale, shift = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    shape = (6, 1, 1) if channel_dim == 1 else (6,)
    x = map_of(2, 6, 5, 6, format=format)

    def plain(x: Tensor) -> Tensor:
        return x * scale.view(shape) + shift.view(shape)

    assert_same(lambda x: affine(x, scale, shift, channel_dim), plain, (x,))
    assert kept(lambda: affine(x, scale, shift, channel_dim)) == [((6,), torch.float64)]


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_affine_in_half_precision_computes_in_single(channel_dim: int) -> None:
    scale, shift = torch.randn(6), torch.randn(6)
    shape = (6, 1, 1) if channel_dim == 1 else (6,)
    x = torch.randn(2, 6, 5, 6).bfloat16().requires_grad_()
    y = affine(x, scale, shift, channel_dim)
    exact = (x.float() * scale.view(shape) + shift.view(shape)).bfloat16()
    assert difference(y, exact) <= 2**-8
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weights)
    assert difference(grad, (weights.float() * scale.view(shape)).bfloat16()) <= 2**-8


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (2, 1, 5, 7), (6, 1, 1), (2, 6, 5, 7)])
@pytest.mark.parametrize("format", FORMATS)
def test_gates(shape: tuple[int, ...], format: torch.memory_format) -> None:
    x, gate = map_of(2, 6, 5, 7, format=format), map_of(*shape)
    assert_same(lambda x, g: mul_through(F.silu(x), g, x, F.silu), lambda x, g: F.silu(x) * g, (x, gate))
    frozen = gate.detach()
    assert_same(lambda x: mul_through(F.silu(x), frozen, x, F.silu), lambda x: F.silu(x) * frozen, (x,))


def test_gates_keep_the_source_and_the_gate() -> None:
    x, gate = map_of(2, 6, 5, 7), map_of(2, 6, 1, 1)
    y = F.silu(x)
    wide, narrow = ((2, 6, 5, 7), torch.float64), ((2, 6, 1, 1), torch.float64)
    assert sorted(kept(lambda: mul_through(y, gate, x, F.silu))) == sorted([wide, narrow])
    assert kept(lambda: mul_through(y, gate.detach(), x, F.silu)) == [narrow]


def test_gates_of_another_dtype() -> None:
    x, gate = map_of(2, 6, 5, 7, dtype=torch.float32), map_of(2, 6, 1, 1, dtype=torch.float32)
    assert_same(
        lambda x, g: mul_through(F.silu(x).bfloat16(), g, x, F.silu),
        lambda x, g: F.silu(x).bfloat16() * g,
        (x, gate),
        1e-6,
    )


def test_compiled_and_gradcheck() -> None:
    scale, shift = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    inputs = (map_of(2, 6, 5, 7), map_of(2, 6, 1, 1))
    assert_same(
        whole(lambda x, g: affine(mul_through(F.silu(x), g, x, F.silu), scale, shift, 1)),
        lambda x, g: F.silu(x) * g * scale.view(6, 1, 1) + shift.view(6, 1, 1),
        inputs,
    )
    assert torch.autograd.gradcheck(lambda x, g: mul_through(F.silu(x), g, x, F.silu), inputs)
    for name in ("quick_gelu", "hard_mish"):
        assert torch.autograd.gradcheck(lambda x, name=name: activation(name, x), inputs[:1])


def test_on_meta() -> None:
    x = torch.empty(2, 6, 5, 7, device="meta", requires_grad=True)
    vector = torch.empty(6, device="meta")
    y = affine(activation("quick_gelu", x), vector, vector, 1)
    mul_through(y, y.mean((2, 3), keepdim=True), y, torch.clone).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
