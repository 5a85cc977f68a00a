"""Learned differences to the base's own tensors: bias and norm tuning, alone and beside adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import cadapt
from cadapt.adapters import get_scheme
from cadapt.backbone import describe_model
from cadapt.errors import RefusedError, UsageError
from cadapt.merging import merge, timm_state_dict
from cadapt.plan import Plan
from cadapt.planning import plan_insertions, survey
from cadapt.surgery import operate
from tests.models import enliven, make_model, randomise

BASES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]


def base_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(timm.create_model(name, num_classes=7)).eval()


def images_for(name: str) -> torch.Tensor:
    side = 160 if name == "test_vit" else 64
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def is_head(name: str) -> bool:
    return name.startswith(("fc.", "head.fc.", "head.", "classifier."))


def by_hand(base: nn.Module, scheme: str) -> nn.Module:
    """A copy whose own tensors are what the scheme is said to train, found by the modules' types."""
    tuned = copy.deepcopy(base).requires_grad_(False)
    for path, module in tuned.named_modules():
        norm = "Norm" in type(module).__name__
        if is_head(f"{path}.") and not norm:
            continue
        if scheme == "bias" and isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        for leaf, parameter in module.named_parameters(recurse=False):
            if (norm and leaf in ("weight", "bias")) if scheme == "norm" else leaf == "bias":
                parameter.requires_grad_(True)
    return tuned


@pytest.mark.parametrize("scheme", ["bias", "norm"])
@pytest.mark.parametrize("name", BASES)
def test_it_is_tuning_the_tensors_themselves(name: str, scheme: str) -> None:
    """The same logits and the same gradients as a copy of the base whose own tensors were moved by as much."""
    base, images = base_of(name), images_for(name)
    model = cadapt.insert(base, scheme, img_size=images.shape[-1])
    reference = by_hand(base, scheme)
    tuned = {path: item for path, item in reference.named_parameters() if item.requires_grad}
    assert set(model.plan.deltas) == set(tuned)
    deltas = {path: model.get_parameter(f"adapters.delta.{path.replace('.', '__')}") for path in tuned}
    enliven(model.get_submodule("adapters.delta"))
    with torch.no_grad():
        for path, parameter in tuned.items():
            parameter.add_(deltas[path])
    ours, theirs = model(images), reference(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    found = torch.autograd.grad(ours.square().sum(), list(deltas.values()))
    wanted = torch.autograd.grad(theirs.square().sum(), list(tuned.values()))
    for path, got, expected in zip(tuned, found, wanted, strict=True):
        assert (got - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-12, path


@pytest.mark.parametrize(("name", "biases", "affines"), [("resnet50", 53_120, 53_120), ("vit_base_patch16_224", 0, 0)])
def test_parameters_at_real_size(name: str, biases: int, affines: int) -> None:
    with torch.device("meta"):
        base = timm.create_model(name).eval()
    modules = [(path, module) for path, module in base.named_modules() if not is_head(f"{path}.")]
    norms = [item for _, module in modules if "Norm" in type(module).__name__ for item in module.parameters(False)]
    own = sum(module.bias.numel() for _, module in modules if isinstance(getattr(module, "bias", None), nn.Parameter))
    new = sum(item.out_channels for _, item in modules if isinstance(item, nn.Conv2d) and item.bias is None)
    counted = {}
    for scheme in ("bias", "norm"):
        model = cadapt.insert(base, scheme)
        counted[scheme] = sum(item.numel() for item in model.get_submodule("adapters.delta").parameters())
    assert counted == {"bias": own + new, "norm": sum(item.numel() for item in norms)}
    if name == "resnet50":
        # 26,560 channels of batch norm, and a conv without a bias before each
        assert counted == {"bias": biases, "norm": affines}


@pytest.mark.parametrize("scheme", ["bias", "norm", "conv-par+norm", "conv-par+bias+norm"])
def test_the_base_keeps_its_values_and_the_file_has_the_differences_alone(scheme: str, tmp_path: Path) -> None:
    base, images = base_of("test_resnet"), images_for("test_resnet")
    model = cadapt.insert(base, scheme, num_classes=3, img_size=64)
    with torch.no_grad(), cadapt.disabled(model):
        assert torch.equal(model(images), base(images))
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=0.1)
    model.train()
    model(images).square().sum().backward()
    optimizer.step()
    model.eval()
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("adapters.")}
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in own.items())
    cadapt.save(model, tmp_path / "a.safetensors")
    again = cadapt.load(tmp_path / "a.safetensors", base)
    assert all(name.startswith("adapters.") for name in again.trained_tensors())
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        with cadapt.disabled(again):
            assert torch.equal(again(images), base(images))


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("scheme", ["bias", "norm", "bias+norm"])
@pytest.mark.parametrize("name", BASES)
def test_merging_puts_them_into_the_base(name: str, scheme: str) -> None:
    base, images = base_of(name), images_for(name)
    model = cadapt.insert(base, scheme, num_classes=3, img_size=images.shape[-1])
    enliven(model.adapters)
    model.eval()
    merged, report = merge(model, images=images)
    assert merged.plan.deltas == () and report.verified
    assert str(len(model.plan.deltas)) in report.summary
    with torch.no_grad():
        wanted = model(images)
        assert (merged(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert report.macs_after == report.macs_before
    with torch.random.fork_rng(devices=[]):
        fresh = timm.create_model(name, num_classes=3).eval()
    fresh.load_state_dict(timm_state_dict(merged), strict=True)
    with torch.no_grad():
        assert (fresh(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_module_called_twice_has_one_difference() -> None:
    base = make_model("reused")
    model = cadapt.insert(base, "bias", img_size=64)
    enliven(model.get_submodule("adapters.delta"))
    reference = by_hand(base, "bias")
    with torch.no_grad():
        for path in model.plan.deltas:
            delta = model.get_parameter(f"adapters.delta.{path.replace('.', '__')}")
            reference.get_parameter(path).add_(delta)
        images = images_for("test_resnet")
        assert torch.equal(model(images), reference(images))


def test_globs_leave_layers_out() -> None:
    base = base_of("test_resnet")
    model = cadapt.insert(base, "norm", include=["layer1.*"], img_size=64)
    assert model.plan.deltas and all(name.startswith("layer1.") for name in model.plan.deltas)


def test_a_plan_that_names_what_the_base_lacks_is_refused() -> None:
    backbone = describe_model(base_of("test_resnet"), 64)
    surveyed = survey(backbone)
    record = plan_insertions(backbone, "norm", surveyed=surveyed).to_json()
    plan = Plan.from_json(record)
    assert plan.deltas and Plan.from_json(plan.to_json()) == plan
    with pytest.raises(RefusedError, match=r"no tensor 'layer9\.bias'"):
        operate(backbone, Plan.from_json({**record, "deltas": ["layer9.bias"]}), surveyed)
    with pytest.raises(RefusedError, match="deltas"):
        Plan.from_json({**record, "deltas": [3]})


def test_a_base_without_norms_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3))

    backbone = describe_model(Plain(), 16)
    with pytest.raises(cadapt.CadaptError, match="nothing to adapt under norm: it has no norms"):
        plan_insertions(backbone, "norm")
    assert plan_insertions(backbone, "bias").deltas == ("conv.bias",)


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("conv-par+nrom", {}, "unknown scheme 'nrom'"),
        ("norm+norm", {}, "names norm twice"),
        ("full+norm", {}, "full trains every tensor already"),
        ("linear+norm", {}, "linear adds nothing"),
        ("conv-par+norm", {"gama": 2}, r"conv-par\+norm has no setting 'gama'"),
        ("conv-par+norm", {"norm.gamma": 2}, "norm has no setting 'gamma'"),
        ("bias+norm", {"gamma": 2}, "has no setting 'gamma'"),
        ("conv-par+", {}, "unknown scheme ''"),
    ],
)
def test_sums_that_make_no_sense(scheme: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cadapt.insert(base_of("test_resnet"), scheme, img_size=64, **settings)  # type: ignore[arg-type]


def test_settings_find_their_scheme() -> None:
    base = base_of("test_resnet")
    model = cadapt.insert(base, "conv-par+norm", img_size=64, gamma=2)
    assert {item.config["gamma"] for item in model.plan.insertions} == {2}
    model = cadapt.insert(base, "conv-par+res-seq", img_size=64, **{"gamma": 2, "res-seq.kernel": 1})  # type: ignore[arg-type]
    kernels = {item.scheme: item.config["kernel"] for item in model.plan.insertions}
    assert kernels == {"conv-par": None, "res-seq": 1}
    assert get_scheme("conv-par").config().gamma is None


@pytest.mark.parametrize("scheme", ["norm", "bias+norm", "ssf"])
def test_a_norm_in_a_head_that_the_task_replaces_is_left_alone(scheme: str) -> None:
    """Without classes ConvNeXt's head stays closed, and the task's stands in for all of it."""
    base = randomise(timm.create_model("test_convnext", num_classes=0)).eval()
    model = cadapt.insert(base, scheme, num_classes=3, img_size=64)
    assert not any(name.startswith("head.") for name in model.plan.deltas)
    assert not any(item.site.path.startswith("head.") for item in model.plan.insertions)
    assert model(images_for("test_resnet")).shape == (2, 3)
