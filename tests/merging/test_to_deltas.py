"""A merge told as differences: the same logits on the same base, which stays bit for bit what it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import cadapt
from cadapt.adapted import AdaptedModel, disabled
from cadapt.bundle import bundle_bytes
from cadapt.errors import CadaptError, UsageError
from cadapt.library import to_bundle
from cadapt.merging import merge, to_deltas
from cadapt.merging.deltas import as_bundle
from tests.merging.cases import CLASSES, ConvBlock, linear, toy, traced, trained
from tests.models import TinyNet, enliven, make_images, randomise

NAMES = tuple("abcde")


def made(base: str, scheme: str) -> AdaptedModel:
    model = linear(base, scheme) if scheme.startswith("conv-par") else trained(base, scheme)
    model.classes = NAMES
    model.training_record = {"epochs": 3}
    return model


def relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((wanted - got).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("base", "scheme"),
    [
        ("plain", "conv-par"),
        ("plain", "residual-seq"),
        ("depth-wise", "lora"),
        ("depth-wise", "ssf"),
        ("layer-scaled", "consolidator"),
        ("overwriting", "conv-par"),
        ("overwriting", "bias"),
        ("reused", "ssf"),
    ],
)
def test_it_computes_what_the_adapted_model_does(base: str, scheme: str) -> None:
    model = made(base, scheme)
    merged, _ = merge(model, as_deltas=True)
    small = to_deltas(model, merged)
    images = make_images(base, batch=3, seed=9)
    with torch.no_grad():
        adapted, got, expected = model(images), small(images), merged(images)
        with disabled(model), disabled(small):
            assert torch.equal(model(images), small(images))
            off = small(images)
    assert relative_error(expected, got) <= 5e-6
    assert relative_error(adapted, got) <= 1e-5
    # so small an error proves something only beside what the adapters do
    assert off.shape != adapted.shape or relative_error(adapted, off) >= 1e-2
    assert small.plan.base == model.plan.base
    assert small.plan.scheme == scheme
    assert small.classes == NAMES
    assert small.plan.insertions == merged.plan.insertions
    assert set(small.plan.deltas) >= set(model.plan.deltas)
    assert small.training_record["epochs"] == 3
    assert f"{len(small.plan.deltas)} tensors" in small.training_record["merged"]


def test_the_arguments_are_left_as_they_were() -> None:
    model = made("plain", "conv-par+norm").train()
    merged, _ = merge(model, as_deltas=True)
    before = [copy.deepcopy(item.state_dict()) for item in (model, merged)]
    modes = [[module.training for module in item.modules()] for item in (model, merged)]
    to_deltas(model, merged)
    for item, state, mode in zip((model, merged), before, modes, strict=True):
        assert [module.training for module in item.modules()] == mode
        assert all(torch.equal(item.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("scheme", ["lora", "conv-par+norm"])
def test_merging_it_again_takes_all_differences_up(scheme: str) -> None:
    model = made("plain", scheme)
    merged, _ = merge(model, as_deltas=True)
    small = to_deltas(model, merged)
    again, report = merge(small)
    images = make_images("plain", batch=3, seed=9)
    with torch.no_grad():
        assert relative_error(merged(images), again(images)) <= 5e-6
    assert report.differences == len(small.plan.deltas)
    assert not report.sites
    assert not again.plan.deltas


def test_only_what_changed_is_in_the_file(tmp_path: Path) -> None:
    base = randomise(timm.create_model("test_resnet", num_classes=7)).eval()
    model = cadapt.insert(base, "lora", num_classes=CLASSES, include=["layer1.*"])
    enliven(model.adapters, scale=0.1)
    model.classes = NAMES
    merged, _ = cadapt.merge(model, as_deltas=True, dtype=torch.float64)
    small = cadapt.to_deltas(model, merged)
    assert set(small.plan.deltas) == {"layer1.0.conv1.weight", "layer1.0.conv2.weight"}
    size = sum(4 * base.state_dict()[name].numel() for name in small.plan.deltas)
    head = sum(4 * item.numel() for item in small.get_submodule("adapters.head").parameters())
    cadapt.save(small, tmp_path / "merged.safetensors")
    written = (tmp_path / "merged.safetensors").stat().st_size
    assert size + head < written < size + head + 6000
    # what the estimate weighs without making it
    assert abs(len(bundle_bytes(as_bundle(model, merged))) - written) <= 200
    loaded = cadapt.load(tmp_path / "merged.safetensors", model=base)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))


def test_differences_are_rounded_once() -> None:
    model = made("plain", "lora")
    exact, _ = merge(model, as_deltas=True, dtype=torch.float64)
    small = to_deltas(model, exact)
    for name in small.plan.deltas:
        wanted = exact.get_parameter(name) - model.get_parameter(name).double()
        got = small.get_parameter(f"adapters.delta.{name.replace('.', '__')}")
        assert torch.equal(got, wanted.float())


def test_what_the_plan_tunes_in_place_stays_so() -> None:
    model = made("plain", "full")
    merged, _ = merge(model, as_deltas=True)
    small = to_deltas(model, merged)
    assert small.plan.trainable == model.plan.trainable
    assert small.plan.deltas == ()
    assert len(bundle_bytes(to_bundle(small))) <= len(bundle_bytes(to_bundle(model))) + 400


def test_a_bias_that_the_layer_lacked() -> None:
    model = linear(toy(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm=True))
    merged, report = merge(model, as_deltas=True)
    small = to_deltas(model, merged)
    assert report.merged == report.total > 0
    assert "blocks.0.conv.bias" in small.plan.deltas
    assert small.get_submodule("blocks.0.conv").bias is None


def test_a_layer_that_became_another_is_refused() -> None:
    model = linear(traced(TinyNet(ConvBlock(nn.Conv2d(8, 8, 3, padding=1)))))
    merged, _ = merge(model, as_deltas=True)

    class Other(nn.Conv2d):
        pass

    conv = merged.get_submodule("blocks.0.conv")
    other = Other(8, 8, 3, padding=1)
    other.load_state_dict(conv.state_dict())
    merged.set_submodule("blocks.0.conv", other)
    with pytest.raises(CadaptError, match="was a Conv2d and is a Other") as caught:
        to_deltas(model, merged)
    assert "as_deltas=True" in str(caught.value.hint)


def test_a_bias_that_moved_into_a_norm_is_refused() -> None:
    model = linear(toy(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm=True))
    merged, _ = merge(model)
    with pytest.raises(CadaptError, match=r"'blocks\.0\.norm\.running_mean'"):
        to_deltas(model, merged)


def test_a_merge_that_computes_something_else_is_not_delivered() -> None:
    """What no tensor shows: the plan of the merged model says another sum than its layers hold."""
    model = made("plain", "conv-par")
    merged, _ = merge(model, as_deltas=True)
    conv = next(module for module in merged.modules() if isinstance(module, nn.Conv2d))
    conv.dilation = (2, 2)
    with pytest.raises(CadaptError, match="logits differ"):
        to_deltas(model, merged)


def test_lower_precision_and_other_models_are_refused() -> None:
    model = made("plain", "lora")
    merged, _ = merge(model, as_deltas=True, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"merged to torch\.bfloat16") as caught:
        to_deltas(model, merged)
    assert "dtype=torch.float32" in str(caught.value.hint)
    merged, _ = merge(model, as_deltas=True)
    merged.plan = replace(merged.plan, scheme="ssf")
    with pytest.raises(UsageError, match="was not made of this"):
        to_deltas(model, merged)
