"""Conv units on toys: what is one linear map is one unit, under a name of its own; what sees no map is none."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from tests.graph.helpers import of_kind, sites_of
from tests.models import TinyNet

Pair = tuple[int, int]


def conv(kernel: int = 3, channels: int = 8, out_channels: int | None = None, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels or channels, kernel, padding=kernel // 2, **settings)


def units(*blocks: nn.Module) -> list[tuple[str, Pair | None, str]]:
    """Path, kernel and operator of the conv sites of a net of these blocks."""
    return [(site.path, site.kernel, site.operator) for site in of_kind(sites_of(TinyNet(*blocks)), "conv")]


class Branches(nn.Module):
    """Parallel branches from one input, summed or concatenated, and a ReLU behind them."""

    def __init__(self, *branches: nn.Module, concatenate: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.concatenate = concatenate
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [branch(x) for branch in self.branches]
        if self.concatenate:
            return self.act(torch.cat(results, 1))
        total = results[0]
        for result in results[1:]:
            total = total + result
        return self.act(total)


def normed(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(8))


SUMS: dict[str, Callable[[], nn.Module]] = {
    "two convs": lambda: Branches(conv(), conv(1)),
    "batch norms are linear": lambda: Branches(normed(conv()), normed(conv(1)), nn.BatchNorm2d(8)),
    "an identity": lambda: Branches(conv(), nn.Identity()),
    "nested sums are one": lambda: Branches(conv(), conv(), conv(), conv(1), nn.BatchNorm2d(8)),
    "convs in a line": lambda: Branches(nn.Sequential(conv(1), conv()), conv(1)),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_linear_branches_is_one_unit(name: str) -> None:
    assert units(SUMS[name](), SUMS[name]()) == [("blocks.0", (3, 3), "Branches"), ("blocks.1", (3, 3), "Branches")]


def test_a_sum_has_the_geometry_of_its_widest_conv() -> None:
    branches = Branches(conv(5, stride=2, groups=8), conv(3, stride=2), conv(1, stride=2))
    (site,) = of_kind(sites_of(TinyNet(branches)), "conv")
    assert (site.kernel, site.stride, site.padding, site.groups) == ((5, 5), (2, 2), (2, 2), 8)
    assert (site.in_shape, site.out_shape, site.activation) == ((8, 16, 16), (8, 8, 8), "relu")


@pytest.mark.parametrize("between", [lambda: LayerNorm2d(8), nn.ReLU, lambda: nn.GroupNorm(2, 8)])
def test_a_sum_of_branches_that_bend_is_no_unit(between: Callable[[], nn.Module]) -> None:
    """Its wide conv is one by itself, the narrow one is none."""
    block = Branches(nn.Sequential(conv(), between()), nn.Sequential(conv(1), between()))
    assert units(block) == [("blocks.0.branches.0.0", (3, 3), "Conv2d")]


class TwoSums(nn.Module):
    """Two sums of convs in one call, with a ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide1, self.narrow1 = conv(), conv(1)
        self.narrow2, self.wide2 = conv(1), conv(5)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.wide1(x) + self.narrow1(x))
        return self.act(self.wide2(x) + self.narrow2(x))


def test_two_units_in_one_call_have_names_of_their_own() -> None:
    assert units(TwoSums()) == [("blocks.0.wide1", (3, 3), "add"), ("blocks.0.wide2", (5, 5), "add")]


class SharedConv(nn.Module):
    """Two sums that share their widest conv."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.first, self.second = conv(5), conv(1), conv(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        return torch.relu(shared + self.first(x)) * torch.relu(shared + self.second(x))


def test_units_that_share_a_conv_have_names_of_their_own() -> None:
    paths = [path for path, _, _ in units(SharedConv())]
    assert len(paths) == len(set(paths))


class Chunked(nn.Module):
    """Convs over chunks of the channels, put together again; a chunk may pass as it is."""

    def __init__(self, *layers: nn.Module, split: bool = True, dim: int = 1, act: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.split, self.dim = split, dim
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = len(self.layers)
        size = 8 // count
        parts = torch.split(x, [size] * count, 1) if self.split else x.chunk(count, 1)
        return self.act(torch.cat([self.layers[index](parts[index]) for index in range(count)], self.dim))


@pytest.mark.parametrize("split", [True, False])
def test_mixed_kernels_over_chunks_are_one_unit(split: bool) -> None:
    block = Chunked(conv(3, 4, groups=4), conv(5, 4, groups=4), split=split)
    assert units(block) == [("blocks.0", (5, 5), "Chunked")]


def test_a_chunk_that_passes_belongs_to_the_unit() -> None:
    """InceptionNeXt's: some channels as they are, a square and two bands."""
    bands = [nn.Conv2d(2, 2, (1, 11), padding=(0, 5)), nn.Conv2d(2, 2, (11, 1), padding=(5, 0))]
    (site,) = of_kind(sites_of(TinyNet(Chunked(nn.Identity(), conv(3, 2), *bands))), "conv")
    assert (site.path, site.kernel, site.padding) == ("blocks.0", (3, 3), (1, 1))
    assert site.in_shape == site.out_shape == (8, 16, 16)


def test_concatenated_convs_of_one_input_are_one_unit() -> None:
    """The channels may grow where each part comes from a conv."""
    block = Branches(conv(3, 8, 12), conv(1, 8, 4), concatenate=True)
    (site,) = of_kind(sites_of(TinyNet(nn.Sequential(block, conv(1, 16, 8)))), "conv")
    assert (site.path, site.out_channels) == ("blocks.0.0", 16)


class Ghost(nn.Module):
    """GhostNet's module: a 1×1 conv, and cheap features of it concatenated to it."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = conv(1, 8, 4)
        self.cheap = conv(3, 4, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), 1)


def test_a_ghost_module_is_no_unit_its_cheap_conv_is() -> None:
    assert units(nn.Sequential(Ghost(), nn.ReLU())) == [("blocks.0.0.cheap", (3, 3), "Conv2d")]


class ChannelsLast(nn.Module):
    """Convs of two halves whose results are concatenated along the last dimension, turned to channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8, 4), conv(5, 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x).permute(0, 2, 3, 1), self.right(x).permute(0, 2, 3, 1)
        return torch.relu(torch.cat((left, right), -1)).permute(0, 3, 1, 2)


def test_parts_joined_channels_last_are_units_by_themselves() -> None:
    assert units(ChannelsLast()) == [("blocks.0.left", (3, 3), "Conv2d"), ("blocks.0.right", (5, 5), "Conv2d")]


class Closed(nn.Module):
    """Branches on its input's size, which no trace follows: it stays one node."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = conv(1)
        self.wide = conv(5, stride=2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(x) if x.shape[-1] > 1 else x
        return self.act(self.wide(x))


def test_a_module_that_stays_closed_is_one_unit() -> None:
    (site,) = of_kind(sites_of(TinyNet(Closed())), "conv")
    assert (site.path, site.operator) == ("blocks.0", "Closed")
    assert (site.kernel, site.stride, site.padding) == ((5, 5), (2, 2), (2, 2))


class ClosedAttention(Closed):
    """Attends where no trace sees it, with a conv for its positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(x) if x.shape[-1] > 1 else x
        tokens = self.act(self.narrow(x)).flatten(2)
        return x + (tokens.transpose(1, 2) @ tokens).softmax(-1).mean() * self.wide(x).mean()


class Excite(nn.Module):
    """3×3 convs to a 1×1 map, on it, and on it again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.act = nn.ReLU()
        self.whole = nn.Conv2d(8, 8, 16)
        self.excite = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        return x * torch.sigmoid(self.excite(self.act(self.whole(x))))


class OnWeights(nn.Module):
    """A conv over a table of weights, whose result shifts the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 8, 16, 16))
        self.smooth = conv()
        self.conv = conv()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x + self.smooth(self.table)))


class Attention(nn.Module):
    """Attention over places with a conv that makes its queries and one on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = conv(), conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, query = x.flatten(2), self.query(x).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ tokens, -1)
        return self.out((tokens @ weights.transpose(1, 2)).unflatten(2, (16, 16)))


class AttentionBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.conv = conv()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.act(self.conv(x))


@pytest.mark.parametrize(
    "block",
    [Excite, OnWeights, lambda: AttentionBlock(Attention()), lambda: AttentionBlock(ClosedAttention())],
    ids=["1×1 maps", "weights", "attention", "closed attention"],
)
def test_convs_that_see_no_map_are_left_alone(block: Callable[[], nn.Module]) -> None:
    assert units(block()) == [("blocks.0.conv", (3, 3), "Conv2d")]


class Projecting(nn.Module):
    """A block whose shortcut pools, projects by a wide conv and normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(stride=2)
        self.act = nn.ReLU()
        self.conv2 = conv()
        self.shortcut = nn.Sequential(conv(stride=2), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))) + self.shortcut(x))


def test_the_conv_of_a_projection_is_no_functional_conv() -> None:
    assert [path for path, _, _ in units(Projecting())] == ["blocks.0.conv1", "blocks.0.conv2"]
