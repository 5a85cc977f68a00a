"""ReLUs that keep one bit per element: bit for bit what torch's give, in every dtype and order of memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadapt.frozen.functions import bits
from cadapt.frozen.functions.relu import hardtanh_bits, relu6_bits, relu_bits, relu_result
from tests.frozen.comparing import assert_same, kept, map_of, whole

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PAIRS = ((relu_bits, F.relu), (relu6_bits, F.relu6), (hardtanh_bits, F.hardtanh))


def orders(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(3, 9, 7, 6, dtype=dtype) * 4
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "with gaps": torch.randn(3, 9, 7, 9, dtype=dtype)[..., 2:8],
        "101 elements": x.flatten()[:101],
        "no dimension": x[0, 0, 0, 0],
        "empty": x[:0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", orders(torch.float32))
@pytest.mark.parametrize("inplace", [False, True])
def test_exact(order: str, dtype: torch.dtype, inplace: bool) -> None:
    x = orders(dtype)[order].requires_grad_()
    for lean, plain in PAIRS:
        ours, reference = lean(x * 1, inplace=inplace), plain(x * 1)
        weights = torch.randn_like(reference)
        assert torch.equal(ours, reference)
        assert ours.stride() == reference.stride()
        mine, other = (torch.autograd.grad(y, x, weights)[0] for y in (ours, reference))
        assert torch.equal(mine, other)


def test_in_place_overwrites() -> None:
    source = map_of(2, 3) * 1
    assert relu_bits(source, inplace=True).data_ptr() == source.data_ptr()
    assert relu_bits(source, inplace=False).data_ptr() != source.data_ptr()
    frozen = torch.randn(3)
    assert relu_bits(frozen, inplace=True) is frozen


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_no_nan_comes_of_an_infinite_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), 1, -1, float("inf"), 0.0, -0.0], dtype=dtype).requires_grad_()
    weights = torch.tensor([1, 2, float("inf"), 3, 4, float("nan")], dtype=dtype)
    mine, other = (torch.autograd.grad(function(x), x, weights)[0] for function in (relu_bits, F.relu))
    assert torch.equal(mine, other)


def test_expanded_and_transposed_gradients() -> None:
    x = map_of(2, 3, 4, 5)
    for reduce in (Tensor.mean, lambda y: (y.transpose(1, 3).contiguous() * 3).sum()):
        mine, other = (torch.autograd.grad(reduce(function(x)), x)[0] for function in (relu_bits, F.relu))
        assert torch.equal(mine, other)


def test_keeps_one_bit_per_element() -> None:
    x = map_of(2, 3, 4, 5)
    assert kept(lambda: relu_bits(x)) == [((15,), torch.uint8)]
    assert kept(lambda: relu6_bits(x)) == [((15,), torch.uint8)]
    assert kept(lambda: relu_bits(x.flatten()[:9])) == [((2,), torch.uint8)]
    assert kept(lambda: relu_result(x)) == [((2, 3, 4, 5), torch.float64)]
    assert not kept(lambda: relu_bits(x.detach()))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_pieces(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "PIECE", 64)
    monkeypatch.setattr(bits, "PARALLEL", 128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = map_of(3, 5, 7, 11)
    assert_same(relu_bits, F.relu, (x,), 0)


@pytest.mark.parametrize("shape", [(3, 5, 7), (16, 4), (1,), (0, 3), (4, 3, 5, 2)])
def test_packed_by_words_as_by_numpy(shape: tuple[int, ...]) -> None:
    """What other devices do, run on the CPU."""
    x, grad = torch.randn(shape), torch.randn(shape)
    count, strides = x.numel(), list(grad.stride())
    packed = bits.positive_bits(x)
    # whatever fills the last byte is cut off again
    for ours, reference in (
        (bits._positive_bits_words(x), packed),
        (bits._inside_bits_words(x, -1, 1), bits.inside_bits(x, -1, 1)),
    ):
        pairs = [np.unpackbits(item.numpy(), count=count).tolist() for item in (ours, reference)]
        assert ours.shape == reference.shape
        assert pairs[0] == pairs[1]
    expected = torch.ops.aten.threshold_backward(grad, x, 0)
    assert torch.equal(bits._masked_gradient_words(grad, packed, strides), expected)


def test_every_byte_is_unpacked() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    ours = bits._masked_gradient_words(torch.ones(2048), packed, [1])
    assert ours.tolist() == np.unpackbits(packed.numpy()).tolist()


def test_bits_stand_in_the_order_of_numpy() -> None:
    x = torch.tensor([1.0, -1, 2, 0, -3, 4, 5, -6, 7])
    assert bits.inside_bits(x, 0, 10).tolist() == [0b10100110, 0b10000000]
    assert bits.positive_bits(x)[0] == 0b10100110


def test_operators_are_registered_soundly() -> None:
    x, strides = torch.randn(3, 5), [5, 1]
    packed = bits.positive_bits(x)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cadapt.positive_bits, (x,), test_utils=tests)
    torch.library.opcheck(torch.ops.cadapt.inside_bits, (x, 0.0, 6.0), test_utils=tests)
    torch.library.opcheck(torch.ops.cadapt.masked_gradient, (x, packed, strides), test_utils=tests)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    x = map_of(2, 3, 4, 5, format=torch.channels_last)
    assert_same(whole(lambda x: relu_bits(x * 2, inplace) * 3), lambda x: F.relu(x * 2) * 3, (x,), 0)


def test_on_meta() -> None:
    x = torch.empty(2, 3, 4, 5, device="meta", requires_grad=True)
    assert kept(lambda: relu_bits(x)) == [((15,), torch.uint8)]
    relu_bits(x * 1, inplace=True).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
