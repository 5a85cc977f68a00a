"""The share of activations that work in their linear range, against counts made by hand."""

import pytest
import torch
from torch import nn

from cadapt.merging.fitted.activity import Activity


def share(activation: nn.Module, h: torch.Tensor) -> float | None:
    activity = Activity(nn.Sequential(activation))
    with activity.watching(), torch.no_grad():
        for part in h.split(2):
            activation(part)
    activation(h)  # not watched
    return activity.linear_share()


def test_a_relu_counts_its_more_frequent_side() -> None:
    h = torch.tensor([[1.0, -1.0], [2.0, -1.0], [3.0, 1.0], [-1.0, -2.0]])[:, :, None, None]
    assert share(nn.ReLU(), h) == pytest.approx((0.75 + 0.75) / 2)
    assert share(nn.ReLU(inplace=True), h.clone()) == pytest.approx(0.75)


def test_a_gelu_is_linear_far_from_zero() -> None:
    far = torch.full((4, 3), 6.0)
    assert share(nn.GELU(), far) == 1.0
    assert share(nn.GELU(), torch.zeros(4, 3)) == 0.0


def test_no_activation_has_no_share() -> None:
    assert share(nn.Identity(), torch.ones(4, 3)) is None
