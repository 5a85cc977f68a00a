"""Which additions close a residual branch, on toys: identities, projections, branches that read a second tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from cadapt.graph.flow import immediate_dominators
from cadapt.graph.residual import Residual, find_residuals
from cadapt.graph.sites import locate_sites
from cadapt.graph.traits import mark_traits
from tests.graph.helpers import of_kind, sites_of, traced
from tests.models import PlainBlock, TinyNet

Layer = Callable[[], nn.Module]


def conv(kernel: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, **settings)


def residuals_of(model: nn.Module) -> list[Residual]:
    graph = traced(model)
    mark_traits(graph, model)
    return find_residuals(graph.nodes, immediate_dominators(graph))


def names(nodes: tuple[fx.Node, ...]) -> set[str]:
    """The modules called by some nodes, by their last names."""
    return {str(node.target).rpartition(".")[2] for node in nodes if node.op == "call_module"}


class Sum(nn.Module):
    """One branch plus another, whichever way round."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def branch() -> nn.Module:
    return nn.Sequential(conv(1), nn.ReLU(), conv())


SHORTCUTS: dict[str, Layer] = {
    "identity": nn.Identity,
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
    "norm": lambda: nn.BatchNorm2d(8),
    "projection": lambda: nn.Sequential(conv(1), nn.BatchNorm2d(8)),
    "pooled projection": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(1), nn.BatchNorm2d(8)),
    "two convs": lambda: nn.Sequential(conv(), conv(1), nn.BatchNorm2d(8)),
}
BRANCHES: dict[str, Layer] = {
    "linear": lambda: nn.Sequential(conv(1), conv()),
    "no layers": nn.ReLU,
    "nothing learned": lambda: nn.BatchNorm2d(8),
}
STREAMS: dict[str, Layer] = {
    "computes": branch,
    "one conv that bends": lambda: nn.Sequential(conv(1), nn.ReLU()),
    "three convs": lambda: nn.Sequential(conv(1), conv(), conv(1)),
}


@pytest.mark.parametrize("branch_first", [True, False])
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_a_shortcut_beside_a_branch_that_computes(kind: str, branch_first: bool) -> None:
    parts = (branch(), SHORTCUTS[kind]()) if branch_first else (SHORTCUTS[kind](), branch())
    (found,) = residuals_of(TinyNet(Sum(*parts)))
    assert str(found.start.target) == "stem"
    inside = "first" if branch_first else "second"
    assert {str(node.target).split(".")[2] for node in found.branch} == {inside}
    assert found.branch_end is found.branch[0]
    assert len(found.branch) == 3
    assert found.has_conv
    assert not found.has_attention
    assert (found.shortcut_end is found.start) == (not found.shortcut)


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_that_is_linear_or_learns_nothing_is_none(kind: str) -> None:
    assert residuals_of(TinyNet(Sum(BRANCHES[kind](), nn.Identity()))) == []


@pytest.mark.parametrize("kind", STREAMS)
def test_two_streams_that_compute_are_merged_and_no_block(kind: str) -> None:
    assert residuals_of(TinyNet(Sum(branch(), STREAMS[kind]()))) == []


def test_a_sum_over_places_is_no_shortcut() -> None:
    """[B, C, H, W] + [B, C, 1, 1] adds a context; the shapes differ."""
    context = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.ReLU(), conv(1))
    assert residuals_of(TinyNet(Sum(context, nn.Identity()))) == []


class Scaled(nn.Module):
    """x + γ f(x), x * gate(x) inside: products with parameters do not bend, with one's own gate they do."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.conv, self.gate = conv(), conv(1)
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.conv(x)
        if self.gated:
            result = result * self.gate(x)
        return x + self.gamma * result


@pytest.mark.parametrize("gated", [True, False])
def test_a_product_bends_where_both_factors_depend_on_the_input(gated: bool) -> None:
    assert len(residuals_of(TinyNet(Scaled(gated)))) == gated


class Querying(nn.Module):
    """x + f(x, query): the branch reads a second tensor from further back."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = conv(1), conv(1)
        self.act = nn.ReLU()
        self.out = conv()

    def forward(self, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.act(self.own(x) + self.other(query)))


class QueryingNet(TinyNet):
    """Stem → a plain block → blocks that are all given the stem's result as well."""

    def __init__(self) -> None:
        super().__init__(Querying(), Querying())
        self.first = PlainBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.stem(x)
        x = self.first(query)
        for block in self.blocks:
            x = block(x, query)
        return self.fc(self.pool(x).flatten(1))


def test_a_branch_may_read_a_second_tensor() -> None:
    found = [residual for residual in residuals_of(QueryingNet()) if not residual.shortcut]
    assert len(found) == 3
    for residual in found[1:]:
        # the branch begins at its shortcut, and what is made of the second tensor alone is no part of it
        assert residual.start is residual.shortcut_end
        assert names(residual.branch) == {"own", "act", "out"}


@pytest.mark.xfail(strict=True, reason="the sum inside the branch makes it the conv of a projection")
def test_a_wide_conv_of_the_second_tensor_is_a_functional_one() -> None:
    model = QueryingNet()
    model.blocks[1].other = conv()
    assert "blocks.1.other" in [site.path for site in of_kind(sites_of(model), "conv")]


def test_a_block_with_a_second_tensor_is_entered_by_the_first() -> None:
    model = QueryingNet()
    located = [item for item in locate_sites(traced(model), model) if item.site.kind == "block"]
    assert [item.site.path for item in located] == ["first", "blocks.0", "blocks.1"]
    assert [item.input for item in located[1:]] == [item.output for item in located[:-1]]


class Projecting(nn.Module):
    """A block whose shortcut pools, projects and normalises, as ResNet-D does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(stride=2)
        self.act = nn.ReLU()
        self.conv2 = conv()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv(1), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))) + self.shortcut(x))


def test_a_projection_with_a_pool_is_a_shortcut() -> None:
    (block,) = of_kind(sites_of(TinyNet(Projecting())), "block")
    assert (block.path, block.in_shape, block.out_shape) == ("blocks.0", (8, 16, 16), (8, 8, 8))
    assert block.stride == (2, 2)


class Merging(nn.Module):
    """Two streams that both compute, summed: neither is a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(conv(), nn.ReLU(), conv(1), nn.ReLU())
        self.right = nn.Sequential(conv(5), nn.ReLU(), conv(1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


def test_a_merge_of_streams_is_one_block() -> None:
    blocks = of_kind(sites_of(TinyNet(Merging(), Merging())), "block")
    assert [site.path for site in blocks] == ["blocks.0", "blocks.1"]


def test_among_residual_blocks_a_merge_of_streams_is_a_sibling() -> None:
    blocks = of_kind(sites_of(TinyNet(PlainBlock(), Merging())), "block")
    assert [site.path for site in blocks] == ["blocks.0", "blocks.1"]
