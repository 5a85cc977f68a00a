"""Conv-Adapter's ablations (arXiv 2208.07463, table 5): whole stages, spatial down-sampling, against the formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import cadapt
from cadapt.adapters import Refusal, get_scheme
from cadapt.adapters.conv_merge import merge_conv_adapter
from cadapt.plan import Form
from cadapt.site import Site
from tests.adapters.test_conv_adapter import build, conv_site
from tests.adapters.test_conv_tokens import token_site
from tests.models import enliven, randomise


def average(x: torch.Tensor, side: int) -> torch.Tensor:
    """Means over squares; rows and columns that fill no square are left out."""
    height, width = x.shape[2] // side, x.shape[3] // side
    squares = x[:, :, : height * side, : width * side].unflatten(2, (height, side)).unflatten(4, (width, side))
    return squares.mean((3, 5))


def bring_back(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear by two matrices: an output pixel's centre lies between two input centres, held at the borders."""

    def weights(given: int, wanted: int) -> torch.Tensor:
        places = ((torch.arange(wanted, dtype=x.dtype) + 0.5) * given / wanted - 0.5).clamp(0, given - 1)
        return (1 - (places[:, None] - torch.arange(given, dtype=x.dtype)).abs()).clamp_min(0)

    return weights(x.shape[2], size[0]) @ x @ weights(x.shape[3], size[1]).T


def pooled_delta(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], *, pool: int, stride: int, size: tuple[int, int]
) -> torch.Tensor:
    """α ⊙ Up(PW(σ(DW(AvgPool(x))))) with all channels kept and a kernel of 3, σ = ReLU."""
    weight = tensors["depthwise.weight"]
    assert weight.shape[:2] == (x.shape[1], 1)
    taps = F.unfold(average(x, pool), 3, padding=1, stride=stride).unflatten(1, (x.shape[1], 9))
    sides = [(side // pool - 1) // stride + 1 for side in x.shape[2:]]
    hidden = torch.einsum("ck,bckn->bcn", weight.flatten(1), taps) + tensors["depthwise.bias"][:, None]
    mixed = torch.einsum("oc,bcn->bon", tensors["pointwise.weight"].flatten(1), hidden.relu())
    mixed = (mixed + tensors["pointwise.bias"][:, None]).unflatten(2, sides)
    return tensors["alpha"] * bring_back(mixed, size)


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize(
    ("site", "settings", "pool"),
    [
        (conv_site(), {}, 2),
        (conv_site(stride=2, side=11), {}, 2),
        (conv_site(layout="NHWC", side=12), {"gamma": 3}, 3),
        (token_site(prefix=0, kernel=3, activation="relu"), {}, 2),
    ],
    ids=["map", "stride-2", "channels-last-by-3", "tokens"],
)
def test_spatial_down_sampling_is_the_formula(site: Site, settings: dict[str, Any], pool: int, form: Form) -> None:
    adapter = build(site, form, down="spatial", **settings)
    generator = torch.Generator().manual_seed(0)
    shape = site.out_shape if form == "sequential" else site.in_shape
    x = torch.randn(2, *shape, generator=generator, requires_grad=True)
    ours = adapter(x)
    cotangent = torch.randn(ours.shape, generator=generator)
    tensors = dict(adapter.named_parameters())
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    x_wide = x.detach().double().requires_grad_()
    grid, reached = (site.output_grid if form == "sequential" else site.grid), site.output_grid
    assert grid is not None and reached is not None
    maps = {
        "NCHW": lambda: x_wide,
        "NHWC": lambda: x_wide.movedim(-1, 1),
        "NLC": lambda: x_wide.transpose(1, 2).unflatten(2, grid),
    }[site.layout]()
    stride = site.stride[0] if form == "parallel" else 1
    theirs = pooled_delta(maps, wide, pool=pool, stride=stride, size=reached)
    theirs = {
        "NCHW": lambda: theirs,
        "NHWC": lambda: theirs.movedim(1, -1),
        "NLC": lambda: theirs.flatten(2).transpose(1, 2),
    }[site.layout]()
    found = torch.autograd.grad((ours * cotangent).sum(), (x, *tensors.values()))
    wanted = torch.autograd.grad((theirs * cotangent.double()).sum(), (x_wide, *wide.values()))
    for got, expected in zip((ours, *found), (theirs, *wanted), strict=True):
        assert (got.double() - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_prefix_tokens_are_not_pooled() -> None:
    site = token_site(prefix=2, kernel=3)
    adapter = build(site, down="spatial")
    x = torch.randn(2, *site.in_shape)
    moved = torch.cat((x[:, :2], x[:, 2:] + 1), 1)
    assert torch.equal(adapter(x)[:, :2], adapter(moved)[:, :2])
    assert not torch.equal(adapter(x)[:, 2:], adapter(moved)[:, 2:])


def test_all_channels_are_kept() -> None:
    site = conv_site((8, 12))
    count = sum(parameter.numel() for parameter in build(site, down="spatial").parameters())
    assert count == 8 * 9 + 8 + 8 * 12 + 2 * 12


def test_small_maps_are_refused_and_nothing_pooled_is_merged() -> None:
    scheme, site = get_scheme("conv-par"), conv_site(side=3)
    assert scheme.fits(site, "parallel", scheme.configure({"down": "spatial"})) is None
    reason = scheme.fits(site, "parallel", scheme.configure({"down": "spatial", "gamma": 4}))
    assert reason is not None and "too small to be pooled by 4" in reason
    adapter = build(replace(site, in_shape=(8, 3, 3)), down="spatial", activation="identity")
    outcome = merge_conv_adapter(site, "parallel", adapter, torch.nn.Conv2d(8, 12, 3, padding=1))
    assert isinstance(outcome, Refusal) and "pooled" in outcome.reason


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_stages_are_adapted_as_a_whole(name: str) -> None:
    """Beside every run of blocks: the same adapters called by hand around the stages of the untraced model."""
    base = randomise(timm.create_model(name)).eval()
    model = cadapt.insert(base, "stage-par", img_size=64)
    # the head is a copy of the classifier, and is to stay it
    enliven(model.get_submodule("adapters.stage_par"), scale=0.3)
    stages = {item.site.path: item.site for item in model.plan.insertions}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given: dict[str, torch.Tensor] = {}
    for path, site in stages.items():
        whole = base.get_submodule(path)
        # ConvNeXt's stage module holds the conv that joins stages as well: the blocks alone are the stage
        blocks = list(whole.blocks) if hasattr(whole, "blocks") else list(whole)  # type: ignore[arg-type]
        adapter = model.get_submodule(f"adapters.stage_par.{path.replace('.', '__')}__stage")
        blocks[0].register_forward_pre_hook(lambda _, x, path=path: given.update({path: x[0].clone()}))
        blocks[-1].register_forward_hook(lambda _, __, y, path=path, adapter=adapter: y + adapter(given[path]))
        assert site.in_shape[0] in (site.out_shape[0], 64, site.out_shape[0] // 2)
    assert len(stages) == 4
    with torch.no_grad():
        ours, theirs = model(images), base(images)
        with cadapt.disabled(model):
            assert (model(images) - ours).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
