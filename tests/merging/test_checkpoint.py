"""The checkpoint under timm's keys: strictly loaded into a fresh timm model it computes what the adapted one did."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import cadapt
from cadapt.adapted import AdaptedModel
from cadapt.backbone import describe_model
from cadapt.errors import CadaptError
from cadapt.merging import checkpoint_bytes, load_merged, merge, timm_state_dict
from cadapt.planning import plan_insertions, with_head
from cadapt.surgery import operate
from tests.merging.cases import CLASSES, linear, toy, trained
from tests.models import enliven, make_images, randomise, surveyed


def headed(scheme: str, **head: Any) -> AdaptedModel:
    backbone, sites = surveyed("plain")
    settings = {"activation": "identity"} if scheme == "conv-par" else {}
    plan = with_head(plan_insertions(backbone, scheme, settings, surveyed=sites), backbone, CLASSES, **head)
    model = operate(backbone, plan, sites)
    enliven(model.adapters, scale=0.2)
    if scheme == "full":
        enliven(model.layer1, scale=0.01)
    return model


@pytest.mark.parametrize("scheme", ["conv-par", "linear", "full"])
@pytest.mark.parametrize("head", [{}, {"dropout": 0.2}])
def test_a_fresh_timm_model_loads_it_strictly_and_agrees(scheme: str, head: dict[str, Any]) -> None:
    model = headed(scheme, **head)
    merged, report = merge(model)
    assert report.timm_loadable
    assert report.timm_reason == ""
    fresh = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    fresh.load_state_dict(timm_state_dict(merged), strict=True)
    images = make_images("plain", batch=3)
    with torch.no_grad():
        wanted, got = model.eval()(images), fresh(images)
    assert torch.allclose(wanted, got, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_the_checkpoint_is_the_base_that_the_merged_plan_names() -> None:
    merged, _ = merge(headed("conv-par"))
    fresh = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    fresh.load_state_dict(timm_state_dict(merged))
    assert describe_model(fresh).base.sha256 == merged.plan.base.sha256


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: trained("plain", "res-par"), "4 adapters did not fold"),
        (lambda: headed("linear", norm=True), "norm before its classifier"),
        (lambda: linear(toy(nn.Conv2d(8, 8, 3, padding=1))), "no architecture named 'TinyNet'"),
    ],
)
def test_what_timm_has_no_place_for_is_refused(model: Any, words: str) -> None:
    merged, report = merge(model())
    assert not report.timm_loadable
    assert words in report.timm_reason
    with pytest.raises(CadaptError, match="no timm checkpoint"):
        timm_state_dict(merged)


def test_a_bias_that_timm_has_not_is_refused() -> None:
    base = timm.create_model("densenet121", growth_rate=8, block_config=(2, 2), num_classes=3).eval()
    backbone = describe_model(base, 64)
    plan = with_head(plan_insertions(backbone, "conv-par", {"activation": "identity"}), backbone, CLASSES)
    model = operate(backbone, plan)
    enliven(model.adapters)
    merged, report = merge(model)
    assert report.merged == report.total
    assert not report.timm_loadable
    assert "timm model" in report.timm_reason
    with pytest.raises(CadaptError, match="densenet121"):
        timm_state_dict(merged)


def reflecting(base: nn.Module) -> None:
    for module in base.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode, module._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def dilated(base: Any) -> None:
    base.layer2[0].conv1.dilation = base.layer2[0].conv1.padding = (2, 2)


@pytest.mark.parametrize(("change", "said"), [(reflecting, "padding_mode reflect"), (dilated, "padding \\(2, 2\\)")])
def test_convs_of_other_settings_than_timm_s_are_noted_and_read_back(change: Any, said: str, tmp_path: Path) -> None:
    base = randomise(timm.create_model("test_resnet")).eval()
    change(base)
    model = cadapt.insert(base, scheme="residual-par", num_classes=3)
    enliven(model.adapters)
    merged, report = merge(model)
    assert not report.timm_loadable and re.search(said, report.timm_reason)
    path = tmp_path / "merged.safetensors"
    path.write_bytes(checkpoint_bytes(merged))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model.eval()(images), load_merged(path)(images)
    assert float((wanted - got).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("place", "module", "said"),
    [
        ("layer1.0.act2", nn.GELU(), "its 'layer1.0.act2' is a GELU, the timm model's a ReLU"),
        ("layer1.0.bn2", "eps", "its 'layer1.0.bn2' is a BatchNorm2d of eps 0.1"),
        ("layer2.0.conv1", "stride", "stride"),
    ],
)
def test_other_settings_that_no_note_mends_leave_no_checkpoint(place: str, module: Any, said: str) -> None:
    base = randomise(timm.create_model("test_resnet")).eval()
    if module == "eps":
        base.get_submodule(place).eps = 0.1
    elif module == "stride":
        base.layer2[0].conv2.stride, base.layer2[0].conv1.stride = (2, 2), (1, 1)
    else:
        base.set_submodule(place, module)
    model = cadapt.insert(base, scheme="residual-par", num_classes=3)
    merged, report = merge(model)
    assert not report.timm_loadable and said in report.timm_reason
    with pytest.raises(CadaptError, match="no timm checkpoint"):
        checkpoint_bytes(merged)
