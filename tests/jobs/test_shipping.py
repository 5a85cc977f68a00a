"""Shipping: the packed file loads, evaluates and merges as the trained one did; merged files are the base's again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load

import cadapt
from cadapt.adapted import AdaptedModel
from cadapt.backbone import describe_model
from cadapt.bundle import load_bundle
from cadapt.errors import RefusedError
from cadapt.export import read_onnx_header
from cadapt.jobs import shipping
from cadapt.jobs.shipping import ship_adapter, ship_onnx, ship_timm
from cadapt.library import from_bundle, to_bundle
from cadapt.merging import merge
from tests.models import enliven, randomise

CLASSES = tuple("abcde")
SIDE = 64


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(timm.create_model("test_vit", img_size=SIDE, num_classes=7)).eval()


def trained(base: torch.nn.Module, **settings: Any) -> AdaptedModel:
    model = cadapt.insert(base, "consolidator", num_classes=len(CLASSES), img_size=SIDE, **settings)
    enliven(model.adapters, scale=0.1)
    model.classes = CLASSES
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def adapters_of(model: AdaptedModel) -> int:
    return sum(item.numel() for item in model.get_submodule("adapters.consolidator").parameters())


@pytest.mark.parametrize(
    ("settings", "stored", "numbers"),
    [
        # of 6 blocks with 64 → 192 → 64 and qkv, proj: D·C/g over the layers is 64·(192+64+192) + 192·64 by g
        ({"groups": (32, 16)}, False, 6 * (40_960 // 16 + 512)),
        ({"groups": (32, 16), "shuffle": True}, True, None),
        ({"groups": (64,)}, False, 6 * (40_960 // 64 + 512)),
    ],
    ids=["nested", "shuffled", "one branch"],
)
def test_the_exported_adapter_is_packed_and_equal(
    base: torch.nn.Module, tmp_path: Path, settings: dict[str, Any], stored: bool, numbers: int | None
) -> None:
    model = trained(base, drop_path=0.2, **settings)
    several = len(settings["groups"]) > 1
    shipment = ship_adapter(to_bundle(model))
    assert shipment.facts == {"kind": "adapter", "dtype": "fp32", "packed": 24 if several else 0}
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(shipment.data)

    again = cadapt.load(path, base)
    assert {insertion.config["stored"] for insertion in again.plan.insertions} == {stored}
    assert again.plan.settings == model.plan.settings or list(again.plan.settings["groups"]) == list(settings["groups"])
    if numbers is not None:
        assert adapters_of(again) == numbers
    assert adapters_of(again) < adapters_of(model) if several else adapters_of(again) == adapters_of(model)
    with torch.no_grad():
        wanted, got = model(images()), again(images())
    assert float((wanted - got).abs().max()) <= 1e-5 * float(wanted.abs().max())

    # the merge of the packed one is that of the trained one, but for the one rounding of the file
    ours, report = merge(again, dtype=torch.float64)
    theirs, _ = merge(model, dtype=torch.float64)
    assert report.merged == report.total == 24
    for name, tensor in theirs.state_dict().items():
        assert float((ours.state_dict()[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name


def test_branches_are_summed_in_fp64_and_rounded_once(base: torch.nn.Module) -> None:
    model = trained(base, groups=(32, 16))
    bundle = to_bundle(model)
    packed = load_bundle(ship_adapter(bundle, "fp16").data)
    at = "adapters.consolidator.blocks__0__mlp__fc1"
    total = sum(bundle.tensors[f"{at}.branches.{index}.bias"].double() for index in (0, 1))
    assert isinstance(total, torch.Tensor)
    assert torch.equal(packed.tensors[f"{at}.branches.0.bias"], total.to(torch.float16))
    assert packed.plan.insertions[0].config["groups"] == [16]


def test_a_packed_file_packs_no_further_and_trains_on(base: torch.nn.Module) -> None:
    model = trained(base, groups=(32, 16), shuffle=True)
    once = ship_adapter(to_bundle(model))
    twice = ship_adapter(load_bundle(once.data))
    assert (twice.data, twice.facts["packed"]) == (once.data, 0)
    again = from_bundle(load_bundle(once.data), describe_model(base, SIDE))
    again.train()(images()).square().sum().backward()
    assert all(item.grad is not None for item in again.get_submodule("adapters").parameters())


def test_tensors_that_the_plan_does_not_call_for_are_refused(base: torch.nn.Module) -> None:
    bundle = to_bundle(trained(base, groups=(32, 16)))
    name = "adapters.consolidator.blocks__0__mlp__fc1.branches.1.bias"
    lacking = {key: value for key, value in bundle.tensors.items() if key != name}
    with pytest.raises(RefusedError, match="lacks 'adapters.consolidator.blocks__0__mlp__fc1"):
        ship_adapter(replace(bundle, tensors=lacking))
    with pytest.raises(RefusedError, match=r"has shape \(3,\), expected \(192,\)"):
        ship_adapter(replace(bundle, tensors={**bundle.tensors, name: torch.zeros(3)}))


def test_other_schemes_are_left_as_they_are(base: torch.nn.Module) -> None:
    model = cadapt.insert(base, "conv-par+norm", num_classes=5, img_size=SIDE)
    model.classes = CLASSES
    shipment = ship_adapter(to_bundle(model))
    assert shipment.facts["packed"] == 0
    found = load_bundle(shipment.data).tensors
    assert found.keys() == to_bundle(model).tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in to_bundle(model).tensors.items())


def lively(base: torch.nn.Module, scheme: str, side: int) -> AdaptedModel:
    model = cadapt.insert(base, scheme, num_classes=len(CLASSES), img_size=side)
    enliven(model.adapters, scale=0.1)
    model.classes = CLASSES
    return model.eval()


def lead_to(base: torch.nn.Module, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a bundle find its base, a model in memory that no name or checkpoint leads to."""
    backbone = describe_model(base, side)
    monkeypatch.setattr(shipping, "trained_model", lambda bundle, **places: from_bundle(bundle, backbone))


def test_the_merged_onnx_has_the_base_s_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = randomise(timm.create_model("test_vit", img_size=SIDE, num_classes=7, depth=1)).eval()
    lead_to(base, SIDE, monkeypatch)
    nodes, sizes = [], []
    for scheme in ("linear", "consolidator+bias+norm"):
        shipment = ship_onnx(to_bundle(lively(base, scheme, SIDE)))
        path = tmp_path / "model.onnx"
        path.write_bytes(shipment.data)
        nodes.append(read_onnx_header(path).nodes)
        sizes.append(len(shipment.data))
    assert nodes[0] == nodes[1]
    assert sizes[1] == pytest.approx(sizes[0], rel=5e-3)


@pytest.mark.parametrize("scheme", ["consolidator", "bias", "consolidator+bias+norm"])
def test_the_timm_checkpoint_loads_strictly_and_agrees(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = randomise(timm.create_model("test_vit", num_classes=7)).eval()
    lead_to(base, 160, monkeypatch)
    model = lively(base, scheme, 160)
    fresh = timm.create_model("test_vit", num_classes=len(CLASSES)).eval()
    fresh.load_state_dict(load(ship_timm(to_bundle(model)).data), strict=True)
    batch = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, got = model(batch), fresh(batch)
    assert float((wanted - got).abs().max()) <= 1e-5 * float(wanted.abs().max())
