"""Linear layers that keep no input, in two to four dimensions and under autocast, large enough for oneDNN and not."""

import pytest
import torch
import torch.nn.functional as F

from cadapt.frozen.functions import products
from cadapt.frozen.functions.linear import frozen_linear, linear_through
from tests.frozen.comparing import SINGLE, assert_same, kept, map_of, whole

SHAPES = [(6, 8), (2, 6, 8), (2, 3, 4, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 0)
    x, weight, bias = map_of(*shape, dtype=dtype), map_of(5, 8, dtype=dtype), map_of(5, dtype=dtype)
    frozen, tolerance = weight.detach(), SINGLE if dtype == torch.float32 else 1e-12
    assert_same(lambda x, b: frozen_linear(x, frozen, b), lambda x, b: F.linear(x, frozen, b), (x, bias), tolerance)
    assert_same(
        lambda x, w, b: linear_through(F.gelu(x), x, F.gelu, w, b),
        lambda x, w, b: F.linear(F.gelu(x), w, b),
        (x, weight, bias),
        tolerance,
    )
    assert_same(lambda x: frozen_linear(x, frozen, None), lambda x: F.linear(x, frozen), (x,), tolerance)


def test_products_by_onednn_and_by_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(40, 24), torch.randn(16, 24), torch.randn(16)
    for item in (x, x.flip(0), x.t().contiguous().t(), x[::2]):
        expected = F.linear(item.double(), weight.double(), bias.double())
        for smallest in (0, 10**9):
            monkeypatch.setattr(products, "SMALL", smallest)
            ours = products.linear(item, weight, bias).double()
            assert float((ours - expected).abs().max() / expected.abs().max()) < SINGLE
    assert products.takes_onednn(x) == torch.backends.mkldnn.is_available()
    assert not products.takes_onednn(x.double())
    assert not products.takes_onednn(x.to("meta"))


def test_strided_inputs_and_expanded_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 0)
    base, weight = torch.randn(4, 6, 16).requires_grad_(), torch.randn(5, 8)
    for x in (base[..., ::2], base[:, ::2, :8], base.transpose(0, 1)[..., 8:]):
        mine, other = (
            torch.autograd.grad(function(x, weight, None).mean(), base, retain_graph=True)[0]
            for function in (frozen_linear, F.linear)
        )
        assert torch.allclose(mine, other, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_casts_as_for_torchs_own(shape: tuple[int, ...]) -> None:
    x, weight, bias = (map_of(*size, dtype=torch.float32) for size in (shape, (5, 8), (5,)))
    assert_same(
        lambda x, w, b: linear_through(x * 2, x, lambda item: item * 2, w, b),
        lambda x, w, b: F.linear(x * 2, w, b),
        (x, weight, bias),
        tolerance=1e-2,
        autocast=True,
    )
    half = weight.detach().bfloat16()
    assert_same(lambda x: frozen_linear(x, half, None), lambda x: F.linear(x, half), (x,), 1e-2, autocast=True)


def test_keeps_the_weight_and_no_input() -> None:
    x, weight, bias = map_of(2, 3, 8), torch.randn(5, 8, dtype=torch.float64), map_of(5)
    y = F.gelu(x)
    assert kept(lambda: frozen_linear(y, weight, bias)) == [((5, 8), torch.float64)]
    behind = kept(lambda: linear_through(y, x, F.gelu, weight.requires_grad_(), bias))
    assert behind == [((2, 3, 8), torch.float64), ((5, 8), torch.float64)]


def test_gradcheck() -> None:
    inputs = (map_of(2, 3, 8), map_of(5, 8), map_of(5))
    assert torch.autograd.gradcheck(lambda x, w, b: linear_through(x * x, x, torch.square, w, b), inputs)


def test_compiled() -> None:
    inputs = (map_of(2, 3, 8), map_of(5, 8), map_of(5))
    eye = torch.eye(8, dtype=torch.float64)
    assert_same(
        whole(lambda x, w, b: linear_through(frozen_linear(x, eye, None), x, torch.clone, w, b)), F.linear, inputs
    )


def test_on_meta() -> None:
    x, weight = (torch.empty(*size, device="meta", requires_grad=True) for size in ((2, 3, 8), (5, 8)))
    linear_through(x * 2, x, lambda item: item * 2, weight, None).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
