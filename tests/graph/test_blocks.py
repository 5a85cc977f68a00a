"""What is a block on toys: residual calls, their siblings, recurring modules, conv units; and what is none."""

import pytest
import torch
from torch import nn

from cadapt.graph.sites import locate_sites
from tests.graph.helpers import of_kind, sites_of, traced
from tests.models import CLASSES, PlainBlock, TinyNet


def conv(kernel: int = 3, channels: int = 8, out_channels: int | None = None, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels or channels, kernel, padding=kernel // 2, **settings)


def block_paths(model: nn.Module) -> list[str]:
    return [site.path for site in of_kind(sites_of(model), "block")]


class Bottle(nn.Module):
    """conv → ReLU → conv, with a shortcut only where nothing changes: an inverted residual."""

    def __init__(self, channels: int = 8, out_channels: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(1, channels)
        self.act = nn.ReLU()
        self.conv2 = conv(3, channels, out_channels, stride=stride)
        self.keeps = stride == 1 and channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.act(self.conv1(x)))
        return x + y if self.keeps else y


def test_a_call_without_a_shortcut_among_such_with_one_is_a_sibling() -> None:
    model = TinyNet(Bottle(), Bottle(stride=2), Bottle())
    assert block_paths(model) == ["blocks.0", "blocks.1", "blocks.2"]
    sibling = of_kind(sites_of(model), "block")[1]
    assert (sibling.out_shape, sibling.stride, sibling.operator) == ((8, 8, 8), (2, 2), "Bottle")


def test_siblings_stand_in_the_same_kind_of_list() -> None:
    """A stage without any shortcut has siblings in the stages beside it."""
    model = TinyNet(nn.Sequential(Bottle(), Bottle()), nn.Sequential(Bottle(stride=2)))
    assert block_paths(model) == ["blocks.0.0", "blocks.0.1", "blocks.1.0"]


def test_a_sibling_may_be_of_another_class_in_the_same_list() -> None:
    """EfficientNet's first stage has blocks of another class."""
    model = TinyNet(nn.Sequential(conv(), nn.ReLU(), conv(1)), Bottle())
    assert block_paths(model) == ["blocks.0", "blocks.1"]


def test_a_conv_among_blocks_is_no_sibling() -> None:
    model = TinyNet(Bottle(), conv(stride=2), Bottle())
    assert block_paths(model) == ["blocks.0", "blocks.2"]
    assert [site.path for site in of_kind(sites_of(model), "downsample")] == ["blocks.1"]


def test_a_call_that_mixes_no_places_is_no_sibling() -> None:
    model = TinyNet(Bottle(), nn.Sequential(conv(1), nn.ReLU(), conv(1)), nn.BatchNorm2d(8), nn.MaxPool2d(2), Bottle())
    assert block_paths(model) == ["blocks.0", "blocks.4"]


def test_a_call_that_holds_blocks_is_no_sibling_of_blocks_in_its_list() -> None:
    model = TinyNet(Bottle(), nn.Sequential(Bottle(), conv(), nn.ReLU(), Bottle()))
    assert block_paths(model) == ["blocks.0", "blocks.1.0", "blocks.1.3"]


class Twice(nn.Module):
    """Two residual additions in one call, as a transformer block has: one block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = conv(), nn.GELU()
        self.fc1, self.fc2 = conv(1, 8, 16), conv(1, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.act(self.conv(x))
        return x + self.fc2(self.act(self.fc1(x)))


class Nested(nn.Module):
    """A residual addition around others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(PlainBlock(), PlainBlock())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_two_additions_in_one_call_are_one_block() -> None:
    assert block_paths(TinyNet(Twice(), Twice())) == ["blocks.0", "blocks.1"]


def test_of_nested_additions_the_outer_call_is_the_block() -> None:
    assert block_paths(TinyNet(Nested(), Nested())) == ["blocks.0", "blocks.1"]


class InlineNet(TinyNet):
    """Its residual addition stands in the root's own code, in no module call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(self.pool(x).flatten(1))


def test_the_root_is_no_block() -> None:
    model = InlineNet(*(nn.Sequential(conv(1), nn.ReLU(), conv()) for _ in range(2)))
    assert block_paths(model) == ["blocks.0", "blocks.1"]


class StemNet(TinyNet):
    """A stem of several convs, with a residual block in it."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), PlainBlock())


def test_the_stem_is_left_out() -> None:
    sites = sites_of(StemNet(PlainBlock(), PlainBlock(), PlainBlock()))
    assert {site.path for site in sites if site.path.startswith("stem") and site.kind != "layer"} == set()


# without residual additions


class Cell(nn.Module):
    """Inception's: branches of convs side by side, concatenated."""

    def __init__(self, *kernels: int) -> None:
        super().__init__()
        share = 8 // len(kernels)
        self.branches = nn.ModuleList(
            nn.Sequential(conv(1), nn.ReLU(), conv(kernel, 8, share), nn.ReLU()) for kernel in kernels
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def test_branches_of_a_cell_are_no_blocks() -> None:
    assert block_paths(TinyNet(Cell(3, 5), Cell(3, 5), Cell(3, 5))) == ["blocks.0", "blocks.1", "blocks.2"]


def plain(out_channels: int = 8, **settings: int) -> nn.Module:
    return nn.Sequential(conv(3, 8, out_channels, **settings), nn.BatchNorm2d(out_channels), nn.ReLU())


class Separable(nn.Module):
    """MobileNet's: a depth-wise conv and a point-wise one, each with its norm and activation."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.depthwise, self.pointwise = plain(groups=8, stride=stride), nn.Sequential(conv(1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(x))


def test_a_module_that_recurs_is_a_block() -> None:
    blocks = of_kind(sites_of(TinyNet(Separable(), Separable(2), Separable())), "block")
    assert [(site.path, site.operator, site.stride) for site in blocks] == [
        ("blocks.0", "Separable", (1, 1)),
        ("blocks.1", "Separable", (2, 2)),
        ("blocks.2", "Separable", (1, 1)),
    ]


class Aggregated(nn.Module):
    """VoVNet's: layers in a line, all their results concatenated and mixed; the layers recur, and so does the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Separable() for _ in range(3))
        self.mix = nn.Sequential(conv(1, 32, 8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [x]
        for layer in self.layers:
            results.append(layer(results[-1]))
        return self.mix(torch.cat(results, 1))


def test_of_layers_and_the_whole_that_mixes_them_the_whole_is_taken() -> None:
    assert block_paths(TinyNet(Aggregated(), Aggregated())) == ["blocks.0", "blocks.1"]


class Core(nn.Module):
    """Layers in a line whose results are all concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.act(self.conv1(x))
        return torch.cat((x, first, self.act(self.conv2(first))), 1)


class Cored(nn.Module):
    """Such a core, and the narrow conv that mixes what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core()
        self.mix = nn.Sequential(conv(1, 24, 8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.core(x))


def test_a_call_that_adds_narrow_layers_to_its_core_is_the_block() -> None:
    assert block_paths(TinyNet(Cored(), Cored())) == ["blocks.0", "blocks.1"]


def test_a_call_that_adds_wide_layers_to_what_recurs_inside_is_not() -> None:
    def group() -> nn.Module:
        return nn.Sequential(Separable(), Separable(), conv(), nn.ReLU())

    assert block_paths(TinyNet(group(), group())) == [f"blocks.{outer}.{inner}" for outer in (0, 1) for inner in (0, 1)]


class PlainNet(nn.Module):
    """VGG's: convs, norms and activations in one list."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate([(3, 8), (8, 8), (8, 16), (16, 16)]):
            layers += [conv(3, before, after), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index % 2 else []
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


def test_in_a_plain_net_each_conv_with_its_norm_and_activation_is_a_block() -> None:
    model = PlainNet()
    blocks = of_kind(sites_of(model), "block")
    # all but the first conv, each named by it
    assert [(site.path, site.operator) for site in blocks] == [(f"features.{index}", "Conv2d") for index in (3, 7, 10)]
    assert [site.in_shape for site in blocks] == [(8, 32, 32), (8, 16, 16), (16, 16, 16)]
    assert [site.out_shape for site in blocks] == [(8, 32, 32), (16, 16, 16), (16, 16, 16)]
    located = [item for item in locate_sites(traced(model), model) if item.site.kind == "block"]
    assert [str(item.output.target) for item in located] == [f"features.{index}" for index in (5, 9, 12)]


class Headed(nn.Module):
    """Two convs of different kinds that nothing repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), conv(5)
        self.norm, self.act = nn.BatchNorm2d(8), nn.GELU()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.second(self.first(x))))
        return self.fc(x.mean((2, 3)))


def test_a_net_of_single_convs_spares_the_first() -> None:
    (block,) = of_kind(sites_of(Headed()), "block")
    assert (block.path, block.kernel, block.activation) == ("second", (5, 5), "gelu")


class Pointwise(nn.Module):
    """Nothing but 1×1 convs and a pool, no shortcut: there is no place for an adapter that convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


@pytest.mark.parametrize("kind", ["block", "conv", "downsample"])
def test_a_net_of_narrow_convs_has_nothing(kind: str) -> None:
    assert of_kind(sites_of(Pointwise()), kind) == []
