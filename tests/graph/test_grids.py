"""The grids of tokens and maps, told from shapes alone: prefix tokens, pooled tokens, windows and heads."""

from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from cadapt.graph.flow import mark_flow
from cadapt.graph.grids import Grid, Grids
from cadapt.site import Layout
from tests.graph.helpers import of_kind, sites_of
from tests.models import CLASSES

Shape = tuple[int, ...]


def grid_of(*shapes: Shape, layout: Layout = "NLC", picture: Shape = (2, 3, 32, 32), at: int = -1) -> Grid | None:
    """The grid of one tensor in a line of tensors of these shapes behind a picture."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in shapes:
        nodes.append(graph.call_function(torch.relu, (nodes[-1],)))
    graph.output(nodes[-1])
    for node, shape in zip(nodes, (picture, *shapes), strict=True):
        node.meta["tensor_meta"] = SimpleNamespace(shape=shape)
    mark_flow(graph)
    return Grids(graph).find(nodes[at], layout)


@pytest.mark.parametrize("prefix", [0, 1, 2, 8])
def test_tokens_lie_as_the_map_they_come_from(prefix: int) -> None:
    assert grid_of((2, 24, 8, 8), (2, prefix + 64, 24)) == Grid(size=(8, 8), prefix=prefix)


def test_more_prefix_tokens_than_a_few_are_none() -> None:
    assert grid_of((2, 24, 8, 8), (2, 64 + 9, 24)) is None


def test_fewer_tokens_than_places_do_not_lie_on_the_map() -> None:
    assert grid_of((2, 24, 8, 8), (2, 50, 24)) is None


def test_a_map_channels_last_is_read_as_well() -> None:
    assert grid_of((2, 8, 8, 24), (2, 64, 24)) == Grid(size=(8, 8))


def test_a_picture_that_is_not_square_has_such_grids() -> None:
    assert grid_of((2, 24, 4, 8), (2, 33, 24), picture=(2, 3, 32, 64)) == Grid(size=(4, 8), prefix=1)
    assert grid_of((2, 24, 4, 8), layout="NCHW", picture=(2, 3, 32, 64)) == Grid(size=(4, 8))
    # the same number of places the other way round
    assert grid_of((2, 24, 8, 4), layout="NCHW", picture=(2, 3, 32, 64)) is None


def test_pooled_tokens_lie_on_a_map_of_another_width() -> None:
    """Nothing has their channels on their grid: what has their number of places will do, before or behind them."""
    assert grid_of((2, 24, 8, 8), (2, 12, 4, 4), (2, 17, 48)) == Grid(size=(4, 4), prefix=1)
    assert grid_of((2, 24, 8, 8), (2, 16, 48), (2, 12, 4, 4), at=2) == Grid(size=(4, 4))


def test_the_map_of_their_own_width_goes_before_a_nearer_one() -> None:
    assert grid_of((2, 24, 8, 8), (2, 12, 8, 8), (2, 65, 24)) == Grid(size=(8, 8), prefix=1)
    # 65 tokens might be 1 + 64, or 0 + 65 of a map that nobody has
    assert grid_of((2, 24, 8, 8), (2, 48, 8, 8), (2, 65, 48)) == Grid(size=(8, 8), prefix=1)


def test_windows_in_the_batch_lie_on_no_grid() -> None:
    """Their tokens are a part of the picture, whatever map has as many places."""
    assert grid_of((2, 24, 8, 8), (8, 16, 24)) is None
    assert grid_of((2, 24, 4, 4), (8, 16, 24)) is None


def test_heads_of_channels_look_like_a_map_and_are_none() -> None:
    """[B, heads, L, dim]: L×dim has not the picture's proportions."""
    assert grid_of((2, 4, 64, 6), layout="NCHW") is None
    assert grid_of((2, 24, 8, 8), (2, 4, 64, 6), (2, 64, 24)) == Grid(size=(8, 8))


def test_vectors_lie_on_no_grid() -> None:
    assert grid_of((2, 24), layout="NC") is None


def test_a_map_is_its_own_grid_in_either_layout() -> None:
    assert grid_of((2, 24, 8, 8), layout="NCHW") == Grid(size=(8, 8))
    assert grid_of((2, 8, 8, 24), layout="NHWC") == Grid(size=(8, 8))
    # proportions may be off by one, as where padding rounds one side up
    assert grid_of((2, 24, 7, 8), layout="NCHW") == Grid(size=(7, 8))


class Mixer(nn.Module):
    """x + MLP(x) on tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Tokens(nn.Module):
    """A strided conv, its map as tokens behind some prefix tokens, blocks, the mean."""

    def __init__(self, prefix: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, width))
        self.blocks = nn.Sequential(Mixer(width), Mixer(width))
        self.fc = nn.Linear(width, CLASSES)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.prefix.expand(x.shape[0], -1, -1), tokens), 1)
        return self.fc(self.blocks(tokens).mean(1))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_blocks_of_tokens_know_their_grid(prefix: int) -> None:
    blocks = of_kind(sites_of(Tokens(prefix)), "block")
    assert [site.path for site in blocks] == ["blocks.0", "blocks.1"]
    for site in blocks:
        assert (site.layout, site.in_shape, site.out_shape) == ("NLC", (64 + prefix, 8), (64 + prefix, 8))
        assert (site.grid, site.out_grid, site.prefix_tokens) == ((8, 8), (8, 8), prefix)
        assert site.kernel is None


class Windowed(Tokens):
    """The tokens of each window of 4×4 in the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.stem(x).unflatten(2, (2, 4)).unflatten(4, (2, 4))
        windows = maps.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        return self.fc(self.blocks(windows).unflatten(0, (-1, 4)).mean((1, 2)))


def test_blocks_of_windows_lie_on_no_grid() -> None:
    blocks = of_kind(sites_of(Windowed(0)), "block")
    assert [site.path for site in blocks[:2]] == ["blocks.0", "blocks.1"]
    assert {(site.grid, site.out_grid, site.prefix_tokens) for site in blocks} == {(None, None, 0)}


class Window(nn.Module):
    """From a map to windows, through blocks, and back: the whole lies on the map's grid, its blocks on none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Mixer(24), Mixer(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        x = self.blocks(x)
        return x.unflatten(1, (4, 4)).unflatten(0, (-1, 2, 2)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class WindowNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.windows = nn.Sequential(Window(), Window())
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.windows(self.stem(x)).mean((2, 3)))


def test_around_blocks_of_windows_the_call_from_grid_to_grid_is_a_block() -> None:
    on_grid = [site for site in of_kind(sites_of(WindowNet()), "block") if site.grid is not None]
    assert [(site.path, site.layout, site.grid) for site in on_grid] == [
        ("windows.0", "NCHW", (8, 8)),
        ("windows.1", "NCHW", (8, 8)),
    ]


class ChannelsLast(nn.Module):
    """A block that keeps its maps as [B, H, W, C] and mixes channels by linear layers."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = Mixer(8)
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.fc = nn.Linear(8, CLASSES)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.last:
            return self.fc(self.block(x.permute(0, 2, 3, 1)).mean((1, 2)))
        return self.fc((x + self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(("last", "layout"), [(True, "NHWC"), (False, "NCHW")])
def test_layouts_are_told_from_what_mixes_channels(last: bool, layout: str) -> None:
    (block,) = of_kind(sites_of(ChannelsLast(last)), "block")
    assert (block.layout, block.in_channels, block.grid) == (layout, 8, (8, 8))
