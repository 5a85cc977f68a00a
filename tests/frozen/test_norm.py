"""Frozen norms against torch's; the way of devices whose autocast runs norms in float32 is taken on the CPU by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadapt.frozen.functions import norm
from cadapt.frozen.functions.norm import frozen_group_norm, frozen_layer_norm
from tests.frozen.comparing import FORMATS, assert_same, kept, map_of, whole

EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return frozen_layer_norm(x, (6,), weight, bias, EPS)


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return frozen_group_norm(x, 3, weight, bias, EPS)


def vectors(dtype: torch.dtype, affine: bool) -> tuple[Tensor | None, Tensor | None]:
    return (torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype)) if affine else (None, None)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_as_torchs(format: torch.memory_format, affine: bool) -> None:
    weight, bias = vectors(torch.float64, affine)
    x = map_of(2, 6, 5, 6, format=format)
    assert_same(lambda x: layer_norm(x, weight, bias), lambda x: F.layer_norm(x, (6,), weight, bias, EPS), (x,))
    assert_same(lambda x: group_norm(x, weight, bias), lambda x: F.group_norm(x, 3, weight, bias, EPS), (x,))


def test_a_frozen_affine_gets_no_gradient() -> None:
    weight, bias = map_of(6), map_of(6)
    x = map_of(2, 6, 5, 6)
    (layer_norm(x, weight, bias) + group_norm(x, weight, bias)).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_in_float32_of_a_half_precision_input(
    format: torch.memory_format, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "casts_up", lambda x: True)
    weight, bias = vectors(torch.float32, affine)
    x = torch.randn(2, 6, 5, 6).bfloat16().contiguous(memory_format=format).requires_grad_()
    cases = (
        (layer_norm, lambda x: F.layer_norm(x.float(), (6,), weight, bias, EPS)),
        (group_norm, lambda x: F.group_norm(x.float(), 3, weight, bias, EPS)),
    )
    for lean, plain in cases:
        ours, reference = lean(x, weight, bias), plain(x)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, reference, atol=1e-5)
        weights = torch.randn_like(reference)
        mine, other = (torch.autograd.grad(y, x, weights)[0] for y in (ours, reference))
        assert mine.dtype == torch.bfloat16
        assert torch.allclose(mine.float(), other.float(), atol=1e-2)


def test_keeps_the_input_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, 5, 6).bfloat16().requires_grad_()
    weight, bias = vectors(torch.float32, True)
    for wide in (False, True):
        monkeypatch.setattr(norm, "casts_up", lambda x, wide=wide: wide)
        for function in (layer_norm, group_norm):
            maps = [dtype for shape, dtype in kept(lambda: function(x, weight, bias)) if shape == (2, 6, 5, 6)]  # noqa: B023
            assert maps == [torch.bfloat16]


def test_casts_up_only_where_autocast_does() -> None:
    half = torch.randn(2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert not norm.casts_up(half)
        assert not norm.casts_up(half.to("meta"))
        assert F.layer_norm(half, (2,)).dtype == torch.bfloat16


def test_compiled_and_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = vectors(torch.float32, True)
    monkeypatch.setattr(norm, "casts_up", lambda x: True)
    x = map_of(2, 6, 5, 6, dtype=torch.float32)
    assert_same(
        whole(lambda x: layer_norm(group_norm(x, weight, bias), weight, bias)),
        lambda x: F.layer_norm(F.group_norm(x, 3, weight, bias, EPS), (6,), weight, bias, EPS),
        (x,),
        2e-6,
    )
    shadow = torch.empty(2, 6, 5, 6, device="meta", dtype=torch.bfloat16, requires_grad=True)
    group_norm(layer_norm(shadow, None, None), None, None).sum().backward()
    assert shadow.grad is not None and shadow.grad.shape == shadow.shape
