"""Rows of the regression: times the layer's own weight they are its output, at every place drawn."""

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from cadapt.merging.fitted.rows import draw_places, grid_of, pick, rows_of

CONVS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(6, 8, (3, 5), dilation=(2, 1), padding=2),
    "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "depth-wise": nn.Conv2d(6, 6, 5, padding=2, groups=6, stride=2),
    "same": Conv2dSame(6, 8, 4, stride=3),
    "reflect": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", bias=False),
    "one": nn.Conv2d(6, 8, 1),
}


@pytest.mark.parametrize("kind", CONVS)
def test_rows_of_a_conv(kind: str) -> None:
    conv: Any = CONVS[kind].double()
    source = torch.randn(3, 6, 11, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = conv(source)
    places = draw_places(grid_of(output, channels_first=True), 7, torch.Generator().manual_seed(1))
    rows = rows_of(conv, source, places)
    assert rows.shape == (
        conv.groups,
        21 if output.shape[2] * output.shape[3] > 7 else len(places.picture),
        rows.shape[2],
    )
    weight = conv.weight.detach().reshape(conv.groups, -1, rows.shape[2])
    got = (rows @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
    if conv.bias is not None:
        got = got + conv.bias.detach()
    torch.testing.assert_close(got, pick(output, places, channels_first=True), atol=1e-12, rtol=0)


def test_rows_of_a_linear_layer() -> None:
    layer = nn.Linear(6, 8).double()
    source = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    output = layer(source).detach()
    places = draw_places(grid_of(output, channels_first=False), 9, torch.Generator().manual_seed(1))
    rows = rows_of(layer, source, places)
    got = rows[0] @ layer.weight.detach().T + layer.bias.detach()
    torch.testing.assert_close(got, pick(output, places, channels_first=False), atol=1e-12, rtol=0)


def test_places_are_drawn_once_each() -> None:
    places = draw_places((2, 3, 3), 100, torch.Generator().manual_seed(0))
    cells = {(int(p), int(r), int(c)) for p, r, c in zip(places.picture, *places.where, strict=True)}
    assert len(cells) == len(places.picture) == 18
