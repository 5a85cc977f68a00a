"""Where data enters and leaves calls that pass several tensors: DLA's, dense, dual-path and two-input cells."""

import pytest
import torch
from torch import nn

from cadapt.graph.anatomy import Located
from cadapt.graph.sites import locate_sites
from tests.graph.helpers import traced
from tests.models import PlainBlock, TinyNet


def conv(kernel: int = 3, channels: int = 8, out_channels: int | None = None, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels or channels, kernel, padding=kernel // 2, **settings)


def blocks_of(model: nn.Module) -> dict[str, Located]:
    """The blocks of a net by their paths, with their nodes."""
    located = locate_sites(traced(model), model)
    return {item.site.path: item for item in located if item.site.kind == "block"}


class Given(nn.Module):
    """DLA's block, which is given its shortcut beside its input."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(stride=stride), conv()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        shortcut = x if shortcut is None else shortcut
        return self.act(self.conv2(self.act(self.conv1(x))) + shortcut)


class Tree(nn.Module):
    """DLA's tree: a block with a projected shortcut, a block with its own, and a root that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.MaxPool2d(2)
        self.project = nn.Sequential(conv(1), nn.BatchNorm2d(8))
        self.tree1, self.tree2 = Given(stride=2), Given()
        self.root = conv(1, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.tree1(x, self.project(self.down(x)))
        second = self.tree2(first)
        return torch.relu(self.root(torch.cat((second, first), 1)))


def test_a_block_given_its_shortcut_is_entered_by_its_first_input() -> None:
    blocks = blocks_of(TinyNet(Tree()))
    assert list(blocks) == ["blocks.0.tree1", "blocks.0.tree2"]
    first, second = blocks.values()
    assert (first.site.in_shape, first.site.out_shape, first.site.stride) == ((8, 16, 16), (8, 8, 8), (2, 2))
    assert str(first.input.target) == "stem"
    assert str(first.output.target) == "blocks.0.tree1.act"
    assert second.input is first.output


class DenseLayer(nn.Module):
    """A layer given what all layers before it gave, which it concatenates first of all."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(1, 8 + 4 * index, 8), conv(3, 8, 4)
        self.act = nn.ReLU()

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.conv2(self.act(self.conv1(torch.cat(features, 1))))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(index) for index in range(3))
        self.last = conv(1, 20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.last(torch.cat(features, 1))


def test_a_dense_layer_is_entered_where_it_concatenates() -> None:
    blocks = blocks_of(TinyNet(DenseBlock()))
    assert [item.site.in_channels for item in blocks.values()] == [8, 12, 16]
    assert [item.site.out_channels for item in blocks.values()] == [4, 4, 4]
    assert list(blocks) == [f"blocks.0.layers.{index}" for index in range(3)]
    # the joint lies inside the call: an adapter there reads all that the layer reads
    assert [item.input.name.startswith("cat") for item in blocks.values()][1:] == [True, True]


class DualPath(nn.Module):
    """DPN's block: a residual and a dense path, passed as a tuple or in one tensor."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(1, 12 + 4 * index, 8), conv(3, 8, 12)
        self.act = nn.ReLU()

    def forward(self, x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        residual, dense = x
        result = self.conv2(self.act(self.conv1(torch.cat((residual, dense), 1))))
        return residual + result[:, :8], torch.cat((dense, result[:, 8:]), 1)


class JoinedDualPath(DualPath):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(super().forward((x[:, :8], x[:, 8:])), 1)


class DualPathNet(TinyNet):
    def __init__(self, kind: type[DualPath]) -> None:
        super().__init__(kind(0), kind(1))
        self.pair = conv(1, 8, 12)
        self.last = conv(1, 20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pair(self.stem(x))
        if isinstance(self.blocks[0], JoinedDualPath):
            x = self.blocks(x)
        else:
            x = torch.cat(self.blocks((x[:, :8], x[:, 8:])), 1)
        return self.fc(self.pool(self.last(x)).flatten(1))


def test_a_dual_path_in_one_tensor_has_one_way_in_and_out() -> None:
    blocks = blocks_of(DualPathNet(JoinedDualPath))
    assert list(blocks) == ["blocks.0", "blocks.1"]
    assert [item.site.in_channels for item in blocks.values()] == [12, 16]
    assert [item.site.out_channels for item in blocks.values()] == [16, 20]


def test_a_dual_path_in_a_tuple_ends_at_its_last_layer() -> None:
    blocks = blocks_of(DualPathNet(DualPath))
    assert list(blocks) == ["blocks.0", "blocks.1"]
    for index, item in enumerate(blocks.values()):
        assert str(item.output.target) == f"blocks.{index}.conv2"


@pytest.mark.xfail(strict=True, reason="the residual half goes before the joint")
def test_a_dual_path_in_a_tuple_is_entered_where_it_joins_it() -> None:
    blocks = blocks_of(DualPathNet(DualPath))
    assert [item.site.in_channels for item in blocks.values()] == [12, 16]


class Cell(nn.Module):
    """NASNet's cell: it reads what the two cells before it gave, the older one aligned by a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.align, self.left, self.right = conv(1), conv(), conv(5)
        self.mix = conv(1, 16, 8)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
        older = self.align(self.act(older))
        left, right = self.left(self.act(x)), self.right(self.act(older))
        return self.mix(torch.cat((self.act(left), self.act(right)), 1))


class CellNet(TinyNet):
    def __init__(self) -> None:
        super().__init__(*(Cell() for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        older = x = self.stem(x)
        for cell in self.blocks:
            x, older = cell(x, older), x
        return self.fc(self.pool(x).flatten(1))


def test_a_cell_of_two_inputs_is_entered_by_the_later() -> None:
    blocks = blocks_of(CellNet())
    assert list(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    _, second, third = blocks.values()
    assert third.input is second.output


def test_the_second_cell_too_is_entered_by_its_later_input() -> None:
    first, second, _ = blocks_of(CellNet()).values()
    assert second.input is first.output


class Pair(nn.Module):
    """Gives two tensors that nothing inside joins: no adapter could stand for both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = PlainBlock(), PlainBlock()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(x)


class PairNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.pair(self.stem(x))
        return self.fc(self.pool(self.act(left) * self.act(right)).flatten(1))


def test_a_call_that_gives_two_streams_is_no_block() -> None:
    assert list(blocks_of(PairNet())) == ["pair.left", "pair.right"]


class Sized(nn.Module):
    """Asks another tensor for its size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(stride=2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        small = self.act(self.conv(x))
        return nn.functional.interpolate(small, size=(like.size(2), like.size(3)))


class SizedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sized = Sized()

    def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x + self.sized(x, like)


class SizedNet(TinyNet):
    def __init__(self) -> None:
        super().__init__(SizedBlock(), SizedBlock())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = like = self.stem(x)
        for block in self.blocks:
            x = block(x, like)
        return self.fc(self.pool(x).flatten(1))


def test_a_tensor_asked_for_its_size_is_no_input() -> None:
    blocks = blocks_of(SizedNet())
    assert list(blocks) == ["blocks.0", "blocks.1"]
    first, second = blocks.values()
    assert second.input is first.output
