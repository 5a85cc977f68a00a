"""The sites of known architectures: how many, and some of them exactly, as their papers and sources have them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cadapt.graph.sites import find_sites
from cadapt.site import Site
from tests.graph.helpers import of_kind, sites_of, timm_sites, traced
from tests.models import PlainBlock, ReusedNet, TinyNet, make_model

NUMBERS = {
    # conv, block, downsample, stage, attention, mlp
    "resnet50": (16, 16, 0, 4, 0, 0),
    "resnet18": (16, 8, 0, 4, 0, 0),
    "resnetv2_50x1_bit": (16, 16, 0, 4, 0, 0),
    "resnet50_clip": (16, 16, 0, 4, 0, 0),
    "resnext50_32x4d": (16, 16, 0, 4, 0, 0),
    "convnext_tiny": (18, 18, 3, 4, 0, 0),
    "efficientnet_b0": (16, 16, 0, 7, 0, 0),
    "tf_efficientnet_b0": (16, 16, 0, 7, 0, 0),
    "mobilenetv3_large_100": (15, 15, 0, 6, 0, 0),
    "regnety_004": (16, 16, 0, 4, 0, 0),
    "dm_nfnet_f0": (24, 12, 0, 4, 0, 0),
    "densenet121": (58, 58, 0, 4, 0, 0),
    "vgg16_bn": (12, 12, 0, 5, 0, 0),
    "swin_tiny_patch4_window7_224": (0, 12, 0, 4, 12, 12),
    "vit_tiny_patch16_224": (0, 12, 0, 1, 12, 12),
}
KINDS = ("conv", "block", "downsample", "stage", "attention", "mlp")

RESNET50_BLOCK = Site(
    path="layer2.0", kind="block", in_shape=(256, 56, 56), out_shape=(512, 28, 28), grid=(56, 56), kernel=(3, 3),
    stride=(2, 2), padding=(1, 1), activation="relu", operator="Bottleneck", stage=1,
)  # fmt: skip
RESNET50_CONV = Site(
    path="layer2.0.conv2", kind="conv", in_shape=(128, 56, 56), out_shape=(128, 28, 28), grid=(56, 56), kernel=(3, 3),
    stride=(2, 2), padding=(1, 1), activation="relu", operator="Conv2d", stage=1,
)  # fmt: skip
EXACT = [
    ("resnet50", RESNET50_BLOCK),
    ("resnet50", RESNET50_CONV),
    ("resnet18", replace(RESNET50_CONV, path="layer2.0.conv1", in_shape=(64, 56, 56))),
    ("resnetv2_50x1_bit", replace(RESNET50_CONV, path="stages.1.blocks.0.conv2", operator="StdConv2d")),
    # before the anti-alias pool that halves the grid: stride 1
    (
        "resnet50_clip",
        replace(RESNET50_CONV, path="stages.1.0.conv2_kxk.conv", out_shape=(128, 56, 56), stride=(1, 1)),
    ),
    (
        "resnext50_32x4d",
        replace(RESNET50_CONV, in_shape=(256, 56, 56), out_shape=(256, 28, 28), groups=32),
    ),
    (
        "convnext_tiny",
        Site(
            path="stages.1.downsample.1", kind="downsample", in_shape=(96, 56, 56), out_shape=(192, 28, 28),
            grid=(56, 56), kernel=(2, 2), stride=(2, 2), activation="gelu", operator="Conv2d", stage=1,
        ),
    ),
    (
        "convnext_tiny",
        Site(
            path="stages.3.blocks.2", kind="block", in_shape=(768, 7, 7), out_shape=(768, 7, 7), grid=(7, 7),
            kernel=(7, 7), padding=(3, 3), groups=768, activation="gelu", operator="ConvNeXtBlock", stage=3,
        ),
    ),
    # no shortcut of its own: a sibling of the block behind it
    (
        "efficientnet_b0",
        Site(
            path="blocks.2.0", kind="block", in_shape=(24, 56, 56), out_shape=(40, 28, 28), grid=(56, 56),
            kernel=(5, 5), stride=(2, 2), padding=(2, 2), groups=144, activation="silu",
            operator="InvertedResidual", stage=2,
        ),
    ),
    (
        "tf_efficientnet_b0",
        Site(
            path="blocks.2.0.conv_dw", kind="conv", in_shape=(144, 56, 56), out_shape=(144, 28, 28), grid=(56, 56),
            kernel=(5, 5), stride=(2, 2), padding="same", groups=144, activation="silu", operator="Conv2dSame", stage=2,
        ),
    ),
    (
        "densenet121",
        Site(
            path="features.denseblock4.denselayer16.conv2", kind="conv", in_shape=(128, 7, 7), out_shape=(32, 7, 7),
            grid=(7, 7), kernel=(3, 3), padding=(1, 1), activation="relu", operator="Conv2d", stage=3,
        ),
    ),
    # a dense layer is entered where it concatenates what the layers before it gave
    (
        "densenet121",
        Site(
            path="features.denseblock4.denselayer16", kind="block", in_shape=(992, 7, 7), out_shape=(32, 7, 7),
            grid=(7, 7), kernel=(3, 3), padding=(1, 1), activation="relu", operator="DenseLayer", stage=3,
        ),
    ),
    # the conv of a plain net with its norm and activation
    (
        "vgg16_bn",
        Site(
            path="features.7", kind="block", in_shape=(64, 112, 112), out_shape=(128, 112, 112), grid=(112, 112),
            kernel=(3, 3), padding=(1, 1), activation="relu", operator="Conv2d", stage=1,
        ),
    ),
    # five parallel convs and an identity, summed
    (
        "mobileone_s0",
        Site(
            path="stages.1.2", kind="conv", in_shape=(128, 28, 28), out_shape=(128, 28, 28), grid=(28, 28),
            kernel=(3, 3), padding=(1, 1), groups=128, activation="relu", operator="MobileOneBlock", stage=1,
        ),
    ),
    # mixed kernels over chunks of the channels, TensorFlow's padding
    (
        "tf_mixnet_s",
        Site(
            path="blocks.2.0.conv_dw", kind="conv", in_shape=(144, 56, 56), out_shape=(144, 28, 28), grid=(56, 56),
            kernel=(7, 7), stride=(2, 2), padding="same", groups=48, activation="silu", operator="MixedConv2d", stage=2,
        ),
    ),
    # the block is given its shortcut beside its input
    (
        "dla34",
        Site(
            path="level3.tree1.tree1", kind="block", in_shape=(64, 56, 56), out_shape=(128, 28, 28), grid=(56, 56),
            kernel=(3, 3), stride=(2, 2), padding=(1, 1), activation="relu", operator="DlaBasic", stage=1,
        ),
    ),
    # a reduction without padding: 25 places become 12
    (
        "inception_v3",
        Site(
            path="Mixed_6a", kind="block", in_shape=(288, 25, 25), out_shape=(768, 12, 12), grid=(25, 25),
            kernel=(3, 3), stride=(2, 2), activation="relu", operator="InceptionB", stage=1,
        ),
    ),
    # tokens, with the class token before them
    (
        "pit_s_224",
        Site(
            path="transformers.1.blocks.0", kind="block", in_shape=(197, 288), out_shape=(197, 288), layout="NLC",
            grid=(14, 14), out_grid=(14, 14), prefix_tokens=1, activation="gelu", operator="Block", stage=1,
        ),
    ),
    (
        "swin_tiny_patch4_window7_224",
        Site(
            path="layers.1.blocks.1.attn", kind="attention", in_shape=(28, 28, 192), out_shape=(28, 28, 192),
            layout="NHWC", grid=(28, 28), kernel=(7, 7), padding=(3, 3), activation="gelu", stage=1,
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_sites(name: str) -> None:
    sites = timm_sites(name)
    assert tuple(len(of_kind(sites, kind)) for kind in KINDS) == NUMBERS[name]


@pytest.mark.parametrize(("name", "expected"), [pytest.param(*case, id=f"{case[0]}:{case[1].path}") for case in EXACT])
def test_exact_sites(name: str, expected: Site) -> None:
    found = {(site.kind, site.name): site for site in timm_sites(name)}
    assert found[expected.kind, expected.name] == expected


def test_efficientnet_has_blocks_without_shortcuts() -> None:
    blocks = of_kind(timm_sites("efficientnet_b0"), "block")
    plain = [site for site in blocks if site.in_shape == site.out_shape]
    assert len(blocks) - len(plain) == 7


def test_mobilenet_changes_its_activation() -> None:
    convs = of_kind(timm_sites("mobilenetv3_large_100"), "conv")
    assert {site.activation for site in convs} == {"relu", "hard_swish"}
    assert all(
        site.activation == ("relu" if site.stage is not None and site.stage < 3 else "hard_swish") for site in convs
    )


def test_vgg_spares_its_first_conv_only() -> None:
    paths = [site.path for site in of_kind(timm_sites("vgg16_bn"), "conv")]
    assert "features.0" not in paths
    assert paths[0] == "features.3"
    assert paths[-1] == "features.40"


def test_swin_is_seen_channels_last() -> None:
    sites = timm_sites("swin_tiny_patch4_window7_224")
    for site in (*of_kind(sites, "attention"), *of_kind(sites, "block")):
        assert site.layout == "NHWC"
        assert site.kernel == (7, 7)
        assert site.in_channels == site.out_channels == 96 * 2 ** (site.stage or 0)


def test_vit_has_tokens_and_no_grid() -> None:
    for site in timm_sites("vit_tiny_patch16_224"):
        if site.kind in ("input", "layer"):
            continue
        assert site.layout == "NLC"
        assert site.kind == "linear" or site.kernel is None


@pytest.mark.parametrize("trait", ["plain", "windowed", "layer-scaled", "reused"])
def test_two_traces_give_equal_sites(trait: str) -> None:
    model = make_model(trait)
    first, second = sites_of(model, 64), sites_of(model, 64)
    assert first == second
    # and the mode and values of the model do not matter
    assert sites_of(make_model(trait, seed=5).train(), 64) == first


def test_sites_survive_json() -> None:
    for site in timm_sites("tf_efficientnet_b0"):
        assert Site.from_json(site.to_json()) == site


def test_names_of_sites_are_unique() -> None:
    for name in NUMBERS:
        keys = [(site.kind, site.name, site.stage) for site in timm_sites(name)]
        assert len(keys) == len(set(keys)), name


def test_a_reused_module_has_a_site_for_each_call() -> None:
    sites = sites_of(ReusedNet())
    assert [site.name for site in of_kind(sites, "block")] == ["blocks.0", "blocks.0@1"]
    assert [site.name for site in of_kind(sites, "conv")] == ["blocks.0.conv2", "blocks.0.conv2@1"]


class ChannelsLast(nn.Module):
    """A block that keeps its maps as [B, H, W, C] and mixes channels by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Permuted(TinyNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.blocks(self.stem(x).permute(0, 2, 3, 1))
        return self.fc(maps.mean((1, 2)))


@pytest.mark.parametrize(("net", "layout"), [(Permuted(ChannelsLast()), "NHWC"), (TinyNet(PlainBlock()), "NCHW")])
def test_layouts_are_told_from_what_mixes_channels(net: nn.Module, layout: str) -> None:
    (block,) = of_kind(sites_of(net, side=16), "block")
    assert block.layout == layout
    assert block.in_channels == 8
    assert block.grid == (8, 8)


def test_convs_outside_blocks_are_left_alone() -> None:
    paths = {site.path for site in timm_sites("resnet50") if site.kind != "layer"}
    assert "conv1" not in paths
    assert "layer2.0.downsample.0" not in {site.path for site in of_kind(timm_sites("resnet50"), "conv")}


def test_finding_sites_does_not_run_or_change_the_model() -> None:
    model = make_model("plain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    find_sites(traced(model, 64), model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
