"""iConFormer against its formula, written out sample by sample; where it goes; both ways to convolve; as exported."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from cadapt.adapters import Refusal, get_scheme
from cadapt.adapters.iconformer import InputConditionedAdapter, convolve_by_groups, convolve_by_shifts, fold_scale
from cadapt.backbone import describe_model
from cadapt.errors import UsageError
from cadapt.export import onnx_bytes
from cadapt.merging import merge
from cadapt.plan import Form
from cadapt.planning import plan_insertions, survey
from cadapt.site import Layout, Pair, Site, SiteKind
from tests.adapters.iconformer_reference import reference
from tests.adapters.test_conv_tokens import token_site
from tests.merging.cases import trained
from tests.models import ReusedNet, enliven, randomise

SCHEME = get_scheme("iconformer")


def map_site(layout: Layout = "NCHW", *, stride: int = 1, kind: SiteKind = "block", grid: Pair = (7, 6)) -> Site:
    out = (-(-grid[0] // stride), -(-grid[1] // stride))
    last = layout == "NHWC"
    return Site(
        path="layer.0" if kind == "block" else "layer.0.mlp",
        kind=kind,
        in_shape=(*grid, 8) if last else (8, *grid),
        out_shape=(*out, 12) if last else (12, *out),
        layout=layout,
        grid=grid,
        stride=(stride, stride),
        activation="gelu",
    )


def build(site: Site, form: Form = "parallel", scale: float = 0.3, **settings: Any) -> InputConditionedAdapter:
    config = SCHEME.configure({"r": 5, **settings})
    assert SCHEME.fits(site, form, config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = SCHEME.build(site, form, config)
    enliven(adapter, scale=scale)
    assert isinstance(adapter, InputConditionedAdapter)
    return adapter


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = [
    pytest.param(map_site(), {}, id="block"),
    pytest.param(map_site(stride=2), {"s": 0.5}, id="block-stride-2"),
    pytest.param(map_site(stride=2), {"normalise": "never", "kernel": 5}, id="block-unnormalised"),
    pytest.param(map_site("NHWC", kind="mlp"), {"activation": "identity"}, id="channels-last"),
    pytest.param(map_site("NHWC", kind="mlp"), {"normalise": "always"}, id="mlp-normalised"),
    pytest.param(replace(token_site(prefix=0), kind="mlp"), {"kernel": 1}, id="no-prefix"),
    pytest.param(replace(token_site(prefix=1), kind="mlp"), {"activation": "relu"}, id="class-token"),
    pytest.param(replace(token_site(prefix=3), kind="mlp"), {"s": -2.0, "kernel": 5}, id="three-prefix-tokens"),
    pytest.param(token_site(prefix=2, stride=2, grid=(7, 5)), {}, id="tokens-stride-2"),
]


@pytest.mark.parametrize(("site", "settings"), CASES)
def test_it_computes_the_formula(site: Site, settings: dict[str, Any]) -> None:
    adapter = build(site, scale=0.1, **settings)
    x = images(3, *site.in_shape).requires_grad_()
    got = adapter(x)
    assert got.shape == (3, *site.out_shape)
    cotangent = images(*got.shape, seed=1)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), (x, *tensors))

    # the reference is computed in fp64 from the same values
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in adapter.named_parameters()}
    x_wide = x.detach().double().requires_grad_()
    rule = settings.get("normalise", "blocks")
    expected = reference(
        x_wide,
        wide,
        layout=site.layout,
        grid=site.grid,
        stride=site.stride[0],
        prefix=site.prefix_tokens,
        sigma=settings.get("activation", "gelu"),
        s=settings.get("s", 1.0),
        normalise=rule == "always" or (rule == "blocks" and site.kind == "block"),
    )
    wanted = torch.autograd.grad((expected * cotangent.double()).sum(), (x_wide, *wide.values()))
    for what, ours, theirs in zip(("output", "x", *names), (got, *gradients), (expected, *wanted), strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-6, f"{what}: relative error {float(error):.2e}"


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_both_ways_to_convolve_are_equal(kernel: int) -> None:
    maps, kernels = images(3, 4, 6, 5).requires_grad_(), images(3, 4, kernel, kernel, seed=1).requires_grad_()
    cotangent = images(3, 4, 6, 5, seed=2)
    results = []
    for convolve in (convolve_by_groups, convolve_by_shifts):
        output = convolve(maps, kernels)
        results.append((output, *torch.autograd.grad((output * cotangent).sum(), (maps, kernels))))
    for grouped, shifted in zip(*results, strict=True):
        assert (grouped - shifted).abs().max() <= 1e-6 * grouped.abs().max()


def test_an_exported_adapter_knows_no_batch_size() -> None:
    adapter = build(replace(token_site(prefix=1), kind="mlp")).eval()
    x = images(7, *token_site(prefix=1).in_shape)
    program = torch.export.export(adapter, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    grouped = [node for node in program.graph.nodes if "conv" in str(node.target) and 5 in node.args[6:]]
    assert grouped == []
    for batch in (1, 2, 3, 7):
        torch.testing.assert_close(program.module()(x[:batch]), adapter(x[:batch]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("site", [map_site(stride=2), replace(token_site(prefix=1), kind="mlp")])
def test_a_sample_depends_on_no_other(site: Site) -> None:
    adapter = build(site)
    x = images(3, *site.in_shape).requires_grad_()
    together = adapter(x)
    for index in range(3):
        (gradient,) = torch.autograd.grad(together[index].square().sum(), x, retain_graph=True)
        assert gradient[index].abs().max() > 0
        assert [bool(gradient[other].any()) for other in range(3) if other != index] == [False, False]
        torch.testing.assert_close(adapter(x[index : index + 1])[0], together[index], rtol=1e-6, atol=1e-6)


def test_prefix_tokens_get_the_kernels_of_the_grid_alone() -> None:
    site = replace(token_site(prefix=2), kind="mlp")
    adapter, x = build(site), images(2, *site.in_shape)
    changed = x.clone()
    changed[:, 0] += 1.0
    before, after = adapter(x), adapter(changed)
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-2
    assert torch.equal(after[:, 1:], before[:, 1:])
    changed = x.clone()
    changed[:, -1] += 1.0
    assert (adapter(changed)[:, :2] - before[:, :2]).abs().min() > 0, "the mean over the grid has no part in them"


def test_beside_blocks_it_grows_as_its_input_does() -> None:
    x = images(2, *map_site().in_shape)
    for normalise, growth in (("blocks", 100.0), ("never", 10_000.0)):
        adapter = build(map_site(), activation="relu", normalise=normalise)
        with torch.no_grad():
            ratio = adapter(1e6 * x).abs().max() / adapter(1e4 * x).abs().max()
        assert float(ratio) == pytest.approx(growth, rel=1e-2)


@functools.cache
def counted(name: str) -> tuple[int, Mapping[tuple[str, Form], int]]:
    """Parameters of all adapters at real size, and how many there are of each kind and form."""
    with torch.device("meta"):
        backbone = describe_model(timm.create_model(name).eval(), 224)
    plan = plan_insertions(backbone, "iconformer", surveyed=survey(backbone))
    total, places = 0, {}
    for item in plan.insertions:
        with torch.device("meta"):
            adapter = SCHEME.build(item.site, item.form, SCHEME.configure(item.config))
        total += sum(parameter.numel() for parameter in adapter.parameters())
        place = (item.site.kind, item.form)
        places[place] = places.get(place, 0) + 1
    return total, places


def size(c_in: int, c_out: int) -> int:
    """W_d, the generator and W_up with their biases, at r = 64 and K = 3."""
    return (c_in + 1) * 64 + (64 + 1) * 64 * 9 + (64 + 1) * c_out


def test_vit_base_has_the_published_share() -> None:
    assert counted("vit_base_patch16_224") == (1_638_912, {("mlp", "bypass"): 12})


def test_swin_base_and_resnet_50_follow_the_formula() -> None:
    depths = zip((2, 2, 18, 2), (128, 256, 512, 1024), strict=True)
    assert counted("swin_base_patch4_window7_224") == (
        sum(depth * size(width, width) for depth, width in depths),
        {("mlp", "bypass"): 24},
    )
    stages = ((3, 64, 256), (4, 256, 512), (6, 512, 1024), (3, 1024, 2048))
    expected = sum(size(first, width) + (depth - 1) * size(width, width) for depth, first, width in stages)
    assert counted("resnet50") == (expected, {("block", "parallel"): 16})


def test_every_block_of_a_hybrid_is_adapted_once() -> None:
    # EfficientFormer's last block alone has an MLP of linear layers
    assert counted("efficientformer_l1")[1] == {("block", "parallel"): 14, ("mlp", "bypass"): 1}
    # MLP-Mixer's blocks have two
    assert counted("mixer_s32_224")[1] == {("mlp", "bypass"): 8}


def test_places_off_the_grid_are_left_out() -> None:
    mlp = replace(token_site(), path="blocks.0.mlp", kind="mlp")
    off = replace(mlp, path="class_blocks.0.mlp", grid=None, out_grid=None)
    sites = [mlp, token_site(), off, replace(off, path="class_blocks.0", kind="block")]
    placed = SCHEME.select(sites, SCHEME.configure({}))
    assert [(item.site, item.form) for item in placed] == [(mlp, "bypass")]
    again = [replace(site, call=1) for site in sites]
    assert [item.site.call for item in SCHEME.select([*sites, *again], SCHEME.configure({}))] == [0, 1]


@pytest.mark.parametrize(
    ("site", "form", "said"),
    [
        (replace(map_site(grid=(35, 35)), out_shape=(12, 17, 17), stride=(2, 2)), "parallel", "to 18×18, not to 17×17"),
        (replace(token_site(), grid=None, out_grid=None), "parallel", "lie on no grid"),
        (replace(token_site(), out_shape=(54, 12)), "bypass", "output's 54 tokens"),
        (map_site(), "sequential", "not behind it"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(site: Site, form: Form, said: str) -> None:
    reason = SCHEME.fits(site, form, SCHEME.configure({}))
    assert reason is not None and said in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"kernel": 4}, "kernel is 4, expected an odd number"),
        ({"s": math.inf}, "s is inf"),
        ({"activation": "reluu"}, "unknown activation 'reluu'"),
        ({"activation": ""}, "unknown activation ''"),
        ({"normalise": "mlps"}, "blocks | never | always"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        SCHEME.configure(settings)
    assert said in caught.value.message


def test_the_scale_folds_into_the_up_projection() -> None:
    site = replace(token_site(prefix=1), kind="mlp")
    adapter, x = build(site, s=0.1), images(2, *site.in_shape)
    expected = adapter(x)
    folded, config = fold_scale(adapter, SCHEME.configure({"r": 5, "s": 0.1}))
    assert config == SCHEME.configure({"r": 5})
    torch.testing.assert_close(folded(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(adapter(x), expected), "the argument was changed"


def test_it_is_not_merged_and_the_report_says_why() -> None:
    outcome = SCHEME.merge(map_site(), "parallel", build(map_site()), nn.Identity())
    assert isinstance(outcome, Refusal)
    model = trained("reused", "iconformer", r=4, s=0.1)
    merged, report = merge(model)
    assert len(report.sites) == 2
    assert all(row.status == "simplified" and outcome.reason in row.reason for row in report.sites)
    assert "computed from each input" in outcome.reason
    assert len(list(merged.adapters.get_submodule("iconformer").children())) == 2


def small_vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=16, depth=1, num_heads=2, reg_tokens=2, num_classes=5
    )


@pytest.mark.parametrize(("make", "side"), [(small_vit, 24), (ReusedNet, 24)])
def test_the_onnx_file_agrees_at_every_batch_size(make: Any, side: int) -> None:
    backbone = describe_model(randomise(make()).eval(), side)
    model = trained((backbone, survey(backbone)), "iconformer", r=4).eval()
    classes = [str(index) for index in range(model.plan.head.num_classes)]  # type: ignore[union-attr]
    _, report = onnx_bytes(model, preprocessing=backbone.preprocessing, classes=classes, name="iconformer")
    assert {check.batch for check in report.checks} == {1, 2, 3, 7}
    assert max(check.relative_error for check in report.checks) <= 1e-5
