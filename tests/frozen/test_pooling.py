"""Pooling that keeps no map, over windows that overlap, are padded, dilated or cut by the border."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cadapt.frozen.functions.pooling import avg_pool2d_lean, global_avg_pool2d_lean, max_pool2d_lean
from tests.frozen.comparing import FORMATS, assert_same, kept, map_of, whole

AVERAGES: list[tuple[Any, ...]] = [
    (2, 2, 0, False, True),
    (3, 2, 1, False, True),
    (3, 2, 1, True, False),
    ((3, 2), (1, 2), (1, 0), True, True),
    (3, None, 0, False, True),
    ((2,), (2,), (0,), False, True),
]
MAXIMA: list[tuple[Any, ...]] = [
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (3, 2, 1, 2, True),
    ((3, 2), (1, 2), (1, 0), (2, 1), True),
    (3, None, 0, 1, False),
    (9, 4, 4, 1, False),
    (17, 1, 8, 1, False),
    ((3, 7), 2, (1, 3), (1, 2), False),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", AVERAGES)
def test_averages(settings: tuple[Any, ...], format: torch.memory_format) -> None:
    x = map_of(2, 3, 9, 11, format=format)
    assert_same(lambda x: avg_pool2d_lean(x, *settings), lambda x: F.avg_pool2d(x, *settings), (x,))
    assert not kept(lambda: avg_pool2d_lean(x, *settings))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", MAXIMA)
def test_maxima(settings: tuple[Any, ...], format: torch.memory_format) -> None:
    x = map_of(2, 3, 9, 11, format=format)
    assert_same(lambda x: max_pool2d_lean(x, *settings), lambda x: F.max_pool2d(x, *settings), (x,))


def test_ties_and_infinities_fall_where_torchs_do() -> None:
    x = torch.zeros(1, 2, 5, 5)
    x[:, 1] = -float("inf")
    x[0, 0, 2, 2] = float("nan")
    x.requires_grad_()
    weights = torch.rand(1, 2, 3, 3)
    mine, other = (torch.autograd.grad(pool(x, 3, 2, 1), x, weights)[0] for pool in (max_pool2d_lean, F.max_pool2d))
    assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_strided_inputs(dtype: torch.dtype) -> None:
    base = torch.randn(2, 3, 8, 16).to(dtype).requires_grad_()
    for x in (base[..., ::2], base.transpose(2, 3)):
        for lean, plain in ((max_pool2d_lean, F.max_pool2d), (avg_pool2d_lean, F.avg_pool2d)):
            mine, other = (
                torch.autograd.grad(function(x, 2).sum(), base, retain_graph=True)[0] for function in (lean, plain)
            )
            assert torch.equal(mine, other)


def test_maxima_keep_one_byte() -> None:
    x = map_of(2, 3, 9, 11)
    assert kept(lambda: max_pool2d_lean(x, 3, 2, 1)) == [((2, 3, 5, 6), torch.uint8)]


def test_the_whole_map() -> None:
    x = map_of(2, 3, 9, 11)
    assert_same(global_avg_pool2d_lean, lambda x: F.adaptive_avg_pool2d(x, 1), (x,))
    assert not kept(lambda: global_avg_pool2d_lean(x))


def test_compiled_and_gradcheck() -> None:
    x = map_of(2, 3, 9, 11, format=torch.channels_last)
    assert_same(
        whole(lambda x: avg_pool2d_lean(max_pool2d_lean(x, 3, 2, 1), 2)),
        lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2),
        (x,),
    )
    small = map_of(1, 2, 5, 4)
    assert torch.autograd.gradcheck(lambda x: avg_pool2d_lean(x, 3, 2, 1), (small,))
    assert torch.autograd.gradcheck(lambda x: max_pool2d_lean(x, 3, 2, 1), (small,))


def test_on_meta() -> None:
    x = torch.empty(2, 3, 9, 11, device="meta", requires_grad=True)
    avg_pool2d_lean(max_pool2d_lean(x, 3, 2, 1), 2).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
