"""The paper's table: parameters of the four schemes to the digit, MACs to the printed digits (arXiv 2208.07463).

Everything is on the meta device, so that the models of their real size cost no memory and no time.
"""

import functools

import pytest
import timm
import torch

from cadapt.adapters import get_scheme
from cadapt.backbone import Backbone, describe_model
from cadapt.costing import cost
from cadapt.planning import Survey, plan_insertions, survey
from cadapt.surgery import operate

GAMMAS = (1, 2, 4, 8)
SCHEMES = ("conv-par", "conv-seq", "res-par", "res-seq")
RESNET_PARAMETERS = {
    "conv-par": (1_302_784, 672_160, 356_848, 199_192),
    "conv-seq": (1_302_784, 672_160, 356_848, 199_192),
    "res-par": (17_479_296, 8_813_792, 4_481_040, 2_314_664),
    "res-seq": (20_300_800, 10_233_472, 5_199_808, 2_682_976),
}
CONVNEXT_PARAMETERS = (12_104_064, 6_515_840, 3_721_728, 2_324_672)
# at γ = 1: the printed total, and the increment that gives it, in units of 10⁹ and 10⁻⁴ · 10⁹
PRINTED_GMACS = {
    "resnetv2_50x1_bit": {
        None: 4.12,
        "conv-par": (4.34, 0.2221),
        "conv-seq": (4.34, 0.2221),
        "res-par": (7.00, 2.8817),
        "res-seq": (7.47, 3.3546),
    },
    "convnext_base": {
        None: 15.36,
        "conv-par": (17.53, 2.1660),
        "conv-seq": (17.53, 2.1660),
        "res-par": (17.53, 2.1660),
        "res-seq": (17.60, 2.2429),
    },
}


@functools.cache
def meta_base(name: str) -> tuple[Backbone, Survey]:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    backbone = describe_model(model, 224)
    return backbone, survey(backbone)


def adapter_parameters(name: str, scheme: str, gamma: int) -> int:
    """Parameters of all adapters that the scheme plans on a base, built one by one."""
    backbone, sites = meta_base(name)
    plan = plan_insertions(backbone, scheme, {"gamma": gamma}, surveyed=sites)
    method = get_scheme(scheme)
    total = 0
    for item in plan.insertions:
        with torch.device("meta"):
            adapter = method.build(item.site, item.form, method.configure(item.config))
        total += sum(parameter.numel() for parameter in adapter.parameters())
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50x1_bit"])
def test_resnet50_parameters(name: str, scheme: str) -> None:
    assert tuple(adapter_parameters(name, scheme, gamma) for gamma in GAMMAS) == RESNET_PARAMETERS[scheme]


@pytest.mark.parametrize("scheme", ["conv-par", "conv-seq", "res-par"])
def test_convnext_base_parameters(scheme: str) -> None:
    # depth-wise convs and their blocks have the same channels: these three schemes cost the same
    counted = tuple(adapter_parameters("convnext_base", scheme, gamma) for gamma in GAMMAS)
    assert counted == CONVNEXT_PARAMETERS


@pytest.mark.parametrize("gamma", GAMMAS)
def test_convnext_base_res_seq_parameters_follow_the_formula(gamma: int) -> None:
    def size(channels: int, kernel: int) -> int:
        width = channels // gamma
        return channels * kernel**2 + width + width * channels + 2 * channels

    blocks = sum(
        count * size(channels, 7) for count, channels in zip((3, 3, 27, 3), (128, 256, 512, 1024), strict=True)
    )
    joints = sum(size(channels, 1) for channels in (256, 512, 1024))
    assert adapter_parameters("convnext_base", "res-seq", gamma) == blocks + joints


@functools.cache
def base_macs(name: str) -> int:
    return cost(meta_base(name)[0].model, training=False, convention="paper").macs


@pytest.mark.parametrize("name", list(PRINTED_GMACS))
def test_gmacs_of_the_bases(name: str) -> None:
    assert round(base_macs(name) / 1e9, 2) == PRINTED_GMACS[name][None]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", list(PRINTED_GMACS))
def test_gmacs_of_the_schemes(name: str, scheme: str) -> None:
    backbone, sites = meta_base(name)
    model = operate(backbone, plan_insertions(backbone, scheme, {"gamma": 1}, surveyed=sites), sites)
    total = cost(model, training=False, convention="paper").macs
    printed = PRINTED_GMACS[name][scheme]
    assert isinstance(printed, tuple)
    assert round(total / 1e9, 2) == printed[0]
    assert round((total - base_macs(name)) / 1e9, 4) == printed[1]
    assert total - base_macs(name) == _increment(name, scheme)
    counted = sum(parameter.numel() for parameter in model.adapters.parameters())
    assert counted == adapter_parameters(name, scheme, 1)


def _increment(name: str, scheme: str) -> int:
    """The increment by arithmetic over the architecture alone: per adapter, its outputs times what each costs."""

    def adapter(channels_in: int, channels_out: int, kernel: int, side: int, relu: bool) -> int:
        depth = channels_in * (kernel**2 + 1 + relu)  # γ = 1: one channel in, taps, a bias, and a ReLU counts one
        return side**2 * (depth + channels_in * channels_out + channels_out)

    total = 0
    if name == "resnetv2_50x1_bit":
        for stage, blocks in enumerate((3, 4, 6, 3)):
            middle, out, side = 64 << stage, 256 << stage, 56 >> stage
            first_in = 64 if stage == 0 else out // 2
            for block in range(blocks):
                channels_in = {"conv-par": middle, "conv-seq": middle, "res-seq": out}.get(
                    scheme, first_in if block == 0 else out
                )
                total += adapter(channels_in, middle if scheme.startswith("conv") else out, 3, side, relu=True)
        return total
    for stage, blocks in enumerate((3, 3, 27, 3)):
        channels, side = 128 << stage, 56 >> stage
        total += blocks * adapter(channels, channels, 7, side, relu=False)
        if stage > 0 and scheme == "res-seq":
            total += adapter(channels, channels, 1, side, relu=False)
        elif stage > 0:
            total += adapter(channels // 2, channels, 2, side, relu=False)
    return total
