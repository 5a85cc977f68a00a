"""The library's front on models that are not the usual ones, and against what does not belong together."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import cadapt
from cadapt.backbone import describe_model
from cadapt.bundle import save_bundle
from cadapt.errors import RefusedError, UsageError
from cadapt.library import to_bundle
from cadapt.plan import Plan
from cadapt.preprocessing import Preprocessing
from cadapt.surgery import operate
from cadapt.verify import check_insertion


def small(**settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_resnet", **settings).eval()


def pictures(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))


def test_pickled_model_computes_the_same() -> None:
    model = cadapt.insert(small(), "conv-par", num_classes=5)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(pictures()), model(pictures()))


def test_disabled_through_a_compiled_model() -> None:
    base = small()
    model = cadapt.insert(base, "full", num_classes=5)
    with torch.no_grad():
        model.get_parameter("conv1.0.weight").add_(1.0)
    compiled = torch.compile(model, backend="eager")
    changed = model(pictures())
    with cadapt.disabled(compiled):
        assert torch.equal(compiled(pictures()), base(pictures()))
    assert torch.equal(model(pictures()), changed)


def test_disabled_refuses_other_models() -> None:
    with pytest.raises(UsageError, match="no adapters to switch off"), cadapt.disabled(nn.Linear(2, 2)):
        pass


def test_merged_model_can_still_be_switched_off() -> None:
    base = small()
    model = cadapt.insert(base, "full", num_classes=5)
    with torch.no_grad():
        model.get_parameter("conv1.0.weight").add_(1.0)
    merged, _ = cadapt.merge(model)
    with cadapt.disabled(merged):
        torch.testing.assert_close(merged(pictures()), base(pictures()), rtol=0, atol=1e-6)


def test_grey_input() -> None:
    model = cadapt.insert(small(in_chans=1), "conv-par")
    assert model.preprocessing.input_size[0] == 1
    assert len(model.preprocessing.mean) == len(model.preprocessing.std) == 1
    assert model(pictures(1)).shape == (2, 1000)


def test_half_precision_base() -> None:
    base = timm.create_model("test_convnext").eval().bfloat16()
    model = cadapt.insert(base, "conv-par")
    images = pictures().bfloat16()
    assert torch.equal(model(images), base(images))


def test_fresh_head_on_pooled_maps_without_a_classifier() -> None:
    base = timm.create_model("resnetv2_50", num_classes=0, layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_chs=8)
    model = cadapt.insert(base.eval(), "linear", num_classes=5, img_size=64)
    assert model(pictures()).shape == (2, 5)


def test_alpha_keeps_low_precision_under_autocast() -> None:
    model = cadapt.insert(small(), "conv-par")
    seen: list[torch.dtype] = []
    model.get_submodule("bn1").register_forward_hook(lambda module, given, result: None)
    for adapter in model.adapters.conv_par.children():
        adapter.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pictures())
    assert set(seen) == {torch.bfloat16}


def test_same_weights_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    pooled = small(global_pool="max")
    cadapt.save(cadapt.insert(pooled, "conv-par"), tmp_path / "adapter.safetensors")
    other = small()
    other.load_state_dict(pooled.state_dict())
    with pytest.raises(RefusedError, match="computes something else"):
        cadapt.load(tmp_path / "adapter.safetensors", other)
    loaded = cadapt.load(tmp_path / "adapter.safetensors", pooled)
    assert torch.equal(loaded(pictures()), pooled(pictures()))


def test_gpu_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every GPU"))
    state = torch.get_rng_state()
    cadapt.insert(base, "conv-par", num_classes=5)
    assert torch.equal(torch.get_rng_state(), state)


class Constant(nn.Module):
    """Computes with a tensor that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = torch.tensor([2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) * self.factor).mean((2, 3))


def test_constant_tensors_are_told() -> None:
    with pytest.raises(cadapt.CadaptError, match="neither parameter nor buffer"):
        cadapt.insert(Constant(), "linear")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("head", "num_classes", -1), ("head", "dropout", 5.0), ("head", "num_classes", 10**13), ("base", "seed", 2**80)],
)
def test_forged_plans_are_refused(part: str, field: str, value: object) -> None:
    record = to_bundle(cadapt.insert(small(), "conv-par", num_classes=5)).plan.to_json()
    record[part][field] = value
    with pytest.raises(RefusedError, match="damaged plan"):
        Plan.from_json(record)


@pytest.mark.parametrize(
    ("field", "value"), [("std", [0.0, 1.0, 1.0]), ("interpolation", "foo"), ("crop_pct", 0), ("mean", [0.5])]
)
def test_forged_preprocessing_is_refused(field: str, value: object) -> None:
    with pytest.raises(RefusedError, match=field):
        Preprocessing.from_json(Preprocessing().to_json() | {field: value})


def test_class_names_must_match_the_head(tmp_path: Path) -> None:
    model = cadapt.insert(small(), "linear", num_classes=5)
    model.classes = ("only", "two")
    with pytest.raises(UsageError, match="2 names, its head 5 outputs"):
        cadapt.save(model, tmp_path / "adapter.safetensors")
    save_bundle(tmp_path / "forged.safetensors", to_bundle(model), overwrite=False)
    with pytest.raises(RefusedError, match="class names"):
        cadapt.load(tmp_path / "forged.safetensors", small())


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(UsageError, match="takes a model"):
        cadapt.insert("test_resnet")
    with pytest.raises(UsageError, match="no adapters to save"):
        cadapt.save(small(), "unused.safetensors")


def test_a_base_made_in_python_is_asked_for(tmp_path: Path) -> None:
    cadapt.save(cadapt.insert(small(), "linear"), tmp_path / "adapter.safetensors")
    with pytest.raises(cadapt.CadaptError, match="was a model made in Python"):
        cadapt.load(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(("scheme", "reaches"), [("conv-par", False), ("res-par", True)])
def test_adapters_that_a_base_mutes_are_told(scheme: str, reaches: bool) -> None:
    base = small()
    backbone = describe_model(base)
    model = cadapt.insert(base, scheme)
    check = check_insertion(backbone, model)
    assert check.identical_on
    assert check.reaches is reaches


def test_two_adapters_at_one_place_are_refused() -> None:
    base = small()
    plan = cadapt.insert(base, "conv-par").plan
    doubled = replace(plan, insertions=(plan.insertions[0], plan.insertions[0]))
    with pytest.raises(RefusedError, match="two adapters"):
        operate(describe_model(base), doubled)
