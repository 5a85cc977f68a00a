"""Strides and padding fitted to the sizes that a component goes between, against torch's own convolution."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cadapt.graph.convs import Conv, fit_axis, fit_grid, is_conv, read_conv, widest


def size_behind(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """What torch's conv makes of a row of that many places."""
    conv = nn.Conv2d(1, 1, (1, kernel), (1, stride), (0, padding), (1, dilation), device="meta")
    return int(conv(torch.empty(1, 1, 1, size, device="meta")).shape[3])


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    data=st.data(),
)
def test_a_fit_gives_the_size_that_torch_gives(
    size: int, kernel: int, stride: int, dilation: int, data: st.DataObject
) -> None:
    padding = data.draw(st.integers(0, dilation * (kernel // 2)))
    assume(size + 2 * padding > dilation * (kernel - 1))
    out_size = size_behind(size, kernel, stride, padding, dilation)
    found = fit_axis(size, out_size, kernel, dilation)
    if found is None:
        # an even kernel that starts outside so small a row that as many places come out as went in
        assert kernel % 2 == 0
        assert stride > 1
        assert out_size >= size
        return
    assert 0 <= found[1] <= dilation * (kernel // 2)
    assert size_behind(size, kernel, *found, dilation) == out_size


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_half_padding_is_found_again(kernel: int, dilation: int) -> None:
    padding = dilation * (kernel // 2)
    sizes = [(1, range(3, 33)), (2, range(3, 33)), (3, range(12, 33, 3)), (4, range(16, 65, 4))]
    for stride, size in ((stride, size) for stride, several in sizes for size in several):
        out_size = size_behind(size, kernel, stride, padding, dilation)
        assert fit_axis(size, out_size, kernel, dilation) == (stride, padding), (size, stride)


@pytest.mark.parametrize(("size", "out_size", "expected"), [(25, 12, (2, 0)), (17, 8, (2, 0)), (8, 6, (1, 0))])
def test_reductions_without_padding_are_found(size: int, out_size: int, expected: tuple[int, int]) -> None:
    assert fit_axis(size, out_size, 3, 1) == expected


def test_a_larger_grid_than_the_input_fits_nothing() -> None:
    assert fit_axis(14, 28, 3, 1) is None


def make_conv(**changes: object) -> Conv:
    usual = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    return Conv(**{**usual, **changes})  # type: ignore[arg-type]


def test_a_band_becomes_a_square_of_its_length() -> None:
    band = make_conv(kernel=(1, 7), padding=(0, 3))
    assert fit_grid(band, (14, 14), (14, 14)) == make_conv(kernel=(7, 7), padding=(3, 3))


def test_axes_are_fitted_apart() -> None:
    assert fit_grid(make_conv(), (14, 20), (14, 10)) == make_conv(stride=(1, 2))


def test_a_dilated_conv_is_padded_by_its_reach() -> None:
    dilated = make_conv(dilation=(2, 2), padding=(2, 2), groups=4)
    assert fit_grid(dilated, (14, 14), (14, 14)) == dilated


def test_tensorflows_rule_stays_where_it_matters() -> None:
    same = make_conv(padding="same")
    assert fit_grid(same, (15, 15), (8, 8)) == make_conv(stride=(2, 2), padding="same")
    # with stride 1 it is padding by half of the kernel
    assert fit_grid(same, (15, 15), (15, 15)) == make_conv()


def test_where_nothing_fits_the_stride_is_the_ratio_of_the_sizes() -> None:
    assert fit_grid(make_conv(), (14, 14), (28, 28)) == make_conv()
    assert fit_grid(make_conv(kernel=(2, 2)), (1, 1), (2, 2)).stride == (1, 1)


def test_a_square_kernel_goes_before_a_longer_band() -> None:
    square, band, point = make_conv(), make_conv(kernel=(1, 11)), make_conv(kernel=(1, 1))
    assert widest([point, band, square]) is square
    assert widest([point, band]) is band


class Handmade(nn.Module):
    """No subclass of torch's, but with the settings and the weight of a conv."""

    def __init__(self, sides: int) -> None:
        super().__init__()
        self.kernel_size = (3,) * sides
        self.stride = self.padding = self.dilation = (1,) * sides
        self.groups = 1
        self.weight = nn.Parameter(torch.zeros(8, 8, *self.kernel_size))


def test_what_counts_as_a_conv() -> None:
    assert is_conv(nn.Conv2d(2, 2, 1))
    assert is_conv(Handmade(2))
    assert not is_conv(Handmade(1))
    # a pool has such settings and learns nothing
    assert not is_conv(nn.MaxPool2d(3))
    assert not is_conv(nn.Linear(2, 2))


def test_geometry_is_read_in_pairs() -> None:
    conv = nn.Conv2d(4, 4, (3, 5), stride=2, padding=(1, 2), groups=2)
    assert read_conv(conv) == make_conv(kernel=(3, 5), stride=(2, 2), padding=(1, 2), groups=2)
    assert read_conv(nn.Conv2d(4, 4, 3, padding="same")).padding == "same"
