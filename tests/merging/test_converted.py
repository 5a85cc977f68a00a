"""Weight-standardised convs that took adapters up: plain in the merged model, in a file that only the loader takes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load, save
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.adapters import MergedLayer
from cadapt.backbone import load_backbone
from cadapt.bundle.container import LENGTH_BYTES, check_length, parse_header
from cadapt.errors import CadaptError, RefusedError
from cadapt.merging import checkpoint_bytes, load_merged, merge, timm_state_dict
from cadapt.merging.converting import plain_form, restandardise
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.site import Site
from cadapt.surgery import operate
from tests.merging.cases import CLASSES, toy, traced, trained
from tests.models import TinyNet, enliven, randomise

NAME = "test_nfnet"
SITE = Site(path="", kind="layer", in_shape=(6, 9, 9), out_shape=(8, 9, 9))


def adapted(scheme: str) -> AdaptedModel:
    backbone = load_backbone(NAME, pretrained=False)
    randomise(backbone.model)
    sites = survey(backbone)
    plan = with_head(plan_insertions(backbone, scheme, surveyed=sites), backbone, CLASSES)
    model = operate(backbone, plan, sites).eval()
    model.classes = tuple("abcde")
    enliven(model.adapters, scale=0.2)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[AdaptedModel, AdaptedModel]:
    model = adapted("lora")
    merged, report = merge(model)
    assert report.merged == report.total > 0
    assert not report.timm_loadable and "plain Conv2d now" in report.timm_reason
    assert "ScaledStdConv2d would compute anew" in report.timm_reason
    assert all("plain conv now" in row.note for row in report.sites if ".fc" not in row.site)
    return model, merged


def facts_of(data: bytes) -> dict[str, Any]:
    length = check_length(data[: LENGTH_BYTES + 1], len(data))
    metadata = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data)).metadata
    found: dict[str, Any] = json.loads(metadata["timm"])
    return found


def test_the_file_is_loaded_to_the_same_logits_and_timm_fails_loudly(pair: Any, tmp_path: Path) -> None:
    model, merged = pair
    path = tmp_path / "merged.safetensors"
    path.write_bytes(checkpoint_bytes(merged))
    loaded = load_merged(path)
    assert not isinstance(loaded, AdaptedModel)
    images = torch.randn(2, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(loaded(images), merged(images), rtol=1e-4, atol=1e-4)
    kinds = {type(loaded.get_submodule(row)) for row in facts_of(path.read_bytes())["plain"]}
    assert kinds == {nn.Conv2d}
    # what no adapter joined is timm's own still
    assert isinstance(loaded.get_submodule("stem.conv1"), ScaledStdConv2d)
    fresh = timm.create_model(NAME, num_classes=CLASSES)
    with pytest.raises(RuntimeError, match=r"plain\.weight"):
        fresh.load_state_dict(load(path.read_bytes()), strict=True)
    with pytest.raises(CadaptError, match="plain Conv2d now"):
        timm_state_dict(merged)


def test_scale_and_shift_of_a_norm_free_net_keep_its_kind_and_timm_loads_it() -> None:
    model = adapted("ssf")
    merged, report = merge(model)
    assert report.verified and report.timm_loadable, report.timm_reason
    assert all("keeps its kind" in row.note for row in report.sites if "conv" in row.site and "fc" not in row.site)
    data = checkpoint_bytes(merged)
    assert facts_of(data)["plain"] == {}
    fresh = timm.create_model(NAME, num_classes=CLASSES).eval()
    fresh.load_state_dict(load(data), strict=True)
    images = torch.randn(2, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(images), fresh(images)
    assert float((wanted - got).abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert report.end_to_end.logit_effect >= 0.1 * report.end_to_end.logit_scale


def test_as_differences_no_layer_becomes_another() -> None:
    model = adapted("lora")
    merged, report = merge(model, as_deltas=True)
    # the convs of squeeze-and-excite are plain already
    standardised = [row for row in report.sites if ".fc" not in row.site]
    assert report.merged == report.total - len(standardised) > 0
    assert all("which no adapter file holds" in row.reason for row in standardised)
    assert {type(module) for module in merged.modules()} >= {ScaledStdConv2d}


@pytest.mark.parametrize("scale", [0.99, 0.03])
def test_without_a_gain_the_layer_becomes_plain_or_its_adapter_stays(scale: float) -> None:
    model = trained(toy(StdConv2d(8, 8, 3, padding=1)), "ssf")
    with torch.no_grad():
        for name, value in model.adapters.named_parameters():
            if name.endswith("0__conv.scale"):
                value.fill_(scale)
    (plain,) = (row for row in merge(model)[1].sites if row.site == "blocks.0.conv")
    (kept,) = (row for row in merge(model, as_deltas=True)[1].sites if row.site == "blocks.0.conv")
    assert plain.status == "exact" and "plain conv now" in plain.note
    assert kept.status == "kept" and "which no adapter file holds" in kept.reason


def test_a_dilation_far_over_the_kernel_is_no_obstacle() -> None:
    layer = ScaledStdConv2d(8, 8, 3, dilation=8, padding=0)
    backbone, sites = traced(TinyNet(nn.Sequential(layer, nn.ReLU())), 64)
    model = operate(backbone, plan_insertions(backbone, "ssf", surveyed=sites), sites).eval()
    enliven(model.adapters, scale=0.2)
    _, report = merge(model)
    assert report.verified and {row.status for row in report.sites} == {"exact"}


def test_a_file_in_half_precision_and_one_that_would_overflow(pair: Any) -> None:
    merged = pair[1]
    tensors = load(checkpoint_bytes(merged, dtype=torch.float16))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    with torch.no_grad():
        weight = merged.get_parameter("stem.conv1.weight")
        kept = weight.clone()
        weight[0, 0, 0, 0] = 1e6
        with pytest.raises(CadaptError, match=r"'stem.conv1.weight' does not fit into float16"):
            checkpoint_bytes(merged, dtype=torch.float16)
        weight.copy_(kept)


FORGED: Mapping[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "no_such_net"}, "unknown model"),
    "settings": ({"settings": {"checkpoint_path": "/etc/passwd"}}, "not one of its architecture"),
    "classes": ({"num_classes": -1}, "num_classes"),
    "a list": ({"plain": []}, "plain layers"),
    "settings that fail": ({"settings": {"in_chans": -1}}, "cannot be made"),
    "settings of another size": ({"settings": {"in_chans": 10**9}}, "does not fit"),
    "many classes": ({"num_classes": 10_000_000}, "does not fit"),
    "another layer": ({"plain": {"stem": {"kind": "Conv2d"}}}, "no layer 'stem'"),
    "no tensor": ({"plain": {"stem.conv1": {"kind": "Conv2d"}}}, "lacks 'stem.conv1.plain.weight'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(case: str, pair: Any, tmp_path: Path) -> None:
    data = checkpoint_bytes(pair[1])
    change, said = FORGED[case]
    path = tmp_path / "forged.safetensors"
    path.write_bytes(save(load(data), {"timm": json.dumps({**facts_of(data), **change})}))
    with pytest.raises(RefusedError, match=said) as caught:
        load_merged(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Linear"},
        {"kind": "Embedding"},
        {"kind": {}},
        {"kind": [[]]},
        {"kind": "Conv2dSame", "padding": [1, 1]},
        {"stride": [3, 3]},
        {"padding": {}},
        {"padding_mode": {}},
        {"stride": [0, 1]},
        {"stride": [2**40, 1]},
        {"padding": "some"},
        {"padding": "same", "stride": [2, 2]},
        {"groups": 5},
        {"groups": True},
        {"padding_mode": "mirror"},
        {"device": "cuda"},
    ],
)
def test_a_forged_note_on_a_layer_is_refused(change: dict[str, Any], pair: Any, tmp_path: Path) -> None:
    data = checkpoint_bytes(pair[1])
    facts = facts_of(data)
    first = next(iter(facts["plain"]))
    facts["plain"][first] = {**facts["plain"][first], **change}
    path = tmp_path / "forged.safetensors"
    path.write_bytes(save(load(data), {"timm": json.dumps(facts)}))
    with pytest.raises(RefusedError, match="damaged checkpoint"):
        load_merged(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
@pytest.mark.parametrize("is_plain", [True, False])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, is_plain: bool, pair: Any, tmp_path: Path) -> None:
    data = checkpoint_bytes(pair[1])
    tensors = load(data)
    name = next(name for name in tensors if name.endswith(".weight") and ("plain" in name) == is_plain)
    path = tmp_path / "forged.safetensors"
    path.write_bytes(save({**tensors, name: tensors[name].to(dtype)}, {"timm": json.dumps(facts_of(data))}))
    with pytest.raises(RefusedError, match=str(dtype)):
        load_merged(path)


def test_a_file_is_read_under_any_suffix(pair: Any, tmp_path: Path) -> None:
    path = tmp_path / "merged.st"
    path.write_bytes(checkpoint_bytes(pair[1]))
    assert load_merged(path).training is False


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(CadaptError, match="no checkpoint at"):
        load_merged(path)
    path.write_bytes(save({"weight": torch.zeros(2)}, {"format": "pt"}))
    with pytest.raises(RefusedError, match="does not say which architecture"):
        load_merged(path)
    path.write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(RefusedError):
        load_merged(path)


def test_a_kernel_that_the_layer_computes_is_solved_for() -> None:
    torch.manual_seed(0)
    scaled = ScaledStdConv2d(6, 8, 3, gamma=1.7).double().eval()
    plain = nn.Conv2d(6, 8, 3, padding=1).double()
    wanted = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    wanted -= wanted.mean(dim=(1, 2, 3), keepdim=True)
    wanted[3] = 0
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(wanted)
        plain.bias.copy_(scaled.bias)
    standardised = StdConv2d(6, 8, 3).double().eval()
    # without a gain only what is next to the layer's own kernel: here with its rows in another order
    rows = plain_form(SITE, standardised)
    assert isinstance(rows, nn.Conv2d)
    for layer, kernel in ((scaled, wanted), (standardised, rows.weight.detach().flip(0))):
        solved = restandardise(layer, MergedLayer(weight=kernel, bias=None))
        assert solved is not None and type(solved) is type(layer)
        with torch.no_grad():
            reference = nn.functional.conv2d(x, kernel, layer.bias, padding=1)
            assert float((solved(x) - reference).abs().max()) <= 1e-12 * float(reference.abs().max())
    # weights a hundredth of the layer's own would be lost in half precision
    assert restandardise(standardised, MergedLayer(weight=0.4 * wanted, bias=None)) is None
    # a row with a mean, a row of a variance that no standardised one has, and another kind of layer
    assert restandardise(scaled, MergedLayer(weight=wanted + 1e-3, bias=None)) is None
    assert restandardise(StdConv2d(6, 8, 3).double(), MergedLayer(weight=9 * wanted, bias=None)) is None
    assert restandardise(Conv2dSame(6, 8, 3).double(), MergedLayer(weight=wanted, bias=None)) is None
