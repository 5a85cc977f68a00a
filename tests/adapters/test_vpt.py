"""The visual prompt against its definition, pixel by pixel; its count, its refusals, and an exported model with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cadapt.adapters import Refusal, get_scheme
from cadapt.adapters.vpt import BorderPrompt
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError, UsageError
from cadapt.export import onnx_bytes
from cadapt.merging import merge
from cadapt.planning import Survey, plan_insertions, survey, with_head
from cadapt.site import Site
from cadapt.surgery import operate
from tests.merging.cases import trained
from tests.models import enliven, make_backbone

SCHEME = get_scheme("vpt")


def input_site(shape: tuple[int, int, int] = (3, 12, 17)) -> Site:
    return Site(path="", kind="input", in_shape=shape, out_shape=shape, grid=shape[1:])


def build(site: Site, **settings: object) -> BorderPrompt:
    config = SCHEME.configure(settings)
    assert SCHEME.fits(site, "sequential", config) is None
    prompt = SCHEME.build(site, "sequential", config)
    assert isinstance(prompt, BorderPrompt)
    return prompt


def reference(x: torch.Tensor, strips: dict[str, torch.Tensor], border: int) -> torch.Tensor:
    """The border alone, one pixel of it after the other."""
    batch, channels, height, width = x.shape
    rows = []
    for row in range(height):
        for column in range(width):
            if row < border:
                pixel = strips["top"][:, :, row, column]
            elif row >= height - border:
                pixel = strips["bottom"][:, :, row - (height - border), column]
            elif column < border:
                pixel = strips["left"][:, :, row - border, column]
            elif column >= width - border:
                pixel = strips["right"][:, :, row - border, column - (width - border)]
            else:
                pixel = torch.zeros(1, channels, dtype=x.dtype)
            rows.append(pixel.expand(batch, channels))
    return torch.stack(rows, dim=2).reshape(batch, channels, height, width)


@pytest.mark.parametrize(
    ("shape", "border"), [((3, 12, 12), 2), ((3, 12, 17), 3), ((1, 9, 7), 3), ((5, 6, 30), 2), ((3, 12, 12), 1)]
)
def test_it_is_a_border_whatever_the_picture_shows(shape: tuple[int, int, int], border: int) -> None:
    prompt = build(input_site(shape), border=border)
    enliven(prompt, scale=1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator)
    got = prompt(x)
    assert got.shape == x.shape
    assert torch.equal(got, prompt(torch.zeros_like(x)))
    cotangent = torch.randn(got.shape, generator=generator)
    names, strips = zip(*prompt.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), strips)

    wide = {name: strip.detach().double().requires_grad_() for name, strip in zip(names, strips, strict=True)}
    expected = reference(x.double(), wide, border)
    wanted = torch.autograd.grad((expected * cotangent.double()).sum(), list(wide.values()))
    for ours, theirs in zip((got, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * float(theirs.detach().abs().max()))


def count(shape: tuple[int, int, int], border: int) -> int:
    return sum(strip.numel() for strip in build(input_site(shape), border=border).parameters())


def test_parameters() -> None:
    assert count((3, 224, 224), 10) == 25_680
    assert count((3, 384, 384), 30) == 12 * 30 * (384 - 30)
    # all pixels less those inside
    assert count((4, 20, 33), 7) == 4 * (20 * 33 - 6 * 19)


def test_it_starts_at_zero_or_as_in_the_paper() -> None:
    x = torch.randn(2, 3, 12, 17)
    assert torch.equal(build(input_site(), border=2)(x), torch.zeros_like(x))
    torch.manual_seed(0)
    paper = build(input_site((3, 224, 224)), init="paper")
    values = torch.cat([strip.detach().flatten() for strip in paper.parameters()])
    assert float(values.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(values.std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("border", "fits"), [(5, True), (6, False), (100, False)])
def test_a_border_that_leaves_no_picture_is_refused(border: int, fits: bool) -> None:
    reason = SCHEME.fits(input_site(), "sequential", SCHEME.configure({"border": border}))
    assert (reason is None) is fits
    if reason is not None:
        assert f"borders of {border} pixels leave nothing of a 12×17 picture; here at most 5 fit" in reason


def test_a_border_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="border is 0, expected at least 1 pixel"):
        SCHEME.configure({"border": 0})


def test_another_size_is_refused() -> None:
    with pytest.raises(CadaptError, match=r"for pictures of \(3, 12, 17\), got \(3, 12, 18\)"):
        build(input_site(), border=2)(torch.zeros(1, 3, 12, 18))


def test_it_stays_where_a_model_is_merged() -> None:
    model = trained("plain", "vpt")
    outcome = SCHEME.merge(input_site(), "sequential", build(input_site(), border=2), model)
    assert isinstance(outcome, Refusal)
    _, report = merge(model)
    assert [(row.site, row.status) for row in report.sites] == [("input", "kept")]
    assert report.sites[0].reason == outcome.reason


def wide_base() -> tuple[Backbone, Survey]:
    backbone = make_backbone("plain")
    backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, input_size=(3, 48, 80)))
    return backbone, survey(backbone)


def test_it_exports_with_any_batch() -> None:
    backbone, sites = wide_base()
    plan = plan_insertions(backbone, "vpt", {"border": 4}, surveyed=sites)
    model = operate(backbone, with_head(plan, backbone, 5), sites)
    enliven(model.adapters, scale=0.3)
    names = tuple(f"class {index}" for index in range(5))
    _, report = onnx_bytes(model, preprocessing=model.preprocessing, classes=names, name="tiny")
    assert {check.batch for check in report.checks} == {1, 2, 3, 7}
    assert max(check.relative_error for check in report.checks) <= 1e-5
    assert sum(parameter.numel() for parameter in model.adapters.get_submodule("vpt").parameters()) == 3 * (
        48 * 80 - 40 * 72
    )
