"""TinyTL's lite residual against its definition, tap by tap, on every layout; its sizes, count, and an export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from cadapt.adapters import Refusal, get_scheme
from cadapt.adapters.tinytl import LiteResidual, find_norm_groups
from cadapt.backbone import describe_model
from cadapt.errors import UsageError
from cadapt.export import onnx_bytes
from cadapt.planning import plan_insertions
from cadapt.site import Layout, Pair, Site
from tests.merging.cases import trained
from tests.models import enliven

SCHEME = get_scheme("tinytl")


def block_site(
    channels: Pair = (16, 24),
    *,
    grid: Pair = (12, 18),
    stride: int = 1,
    out: Pair | None = None,
    layout: Layout = "NCHW",
    prefix: int = 0,
) -> Site:
    out = out or (-(-grid[0] // stride), -(-grid[1] // stride))
    shapes = {
        "NCHW": ((channels[0], *grid), (channels[1], *out)),
        "NHWC": ((*grid, channels[0]), (*out, channels[1])),
        "NLC": ((prefix + grid[0] * grid[1], channels[0]), (prefix + out[0] * out[1], channels[1])),
    }
    return Site(
        path="blocks.0",
        kind="block",
        in_shape=shapes[layout][0],
        out_shape=shapes[layout][1],
        layout=layout,
        grid=grid,
        out_grid=out if layout == "NLC" else None,
        stride=(stride, stride),
        prefix_tokens=prefix,
    )


def build(site: Site, *, lively: bool = True, **settings: object) -> LiteResidual:
    config = SCHEME.configure(settings)
    assert SCHEME.fits(site, "parallel", config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = SCHEME.build(site, "parallel", config)
    if lively:
        enliven(adapter, scale=0.3)
    assert isinstance(adapter, LiteResidual)
    return adapter


def pooled(x: torch.Tensor, pool: int) -> torch.Tensor:
    """Averages of pool × pool windows; a side of less than two windows is averaged as a whole."""
    for axis in (2, 3):
        side = x.shape[axis]
        count = side // pool
        windows = [x.narrow(axis, index * pool, pool) for index in range(count)] if count > 1 else [x]
        x = torch.cat([window.mean(dim=axis, keepdim=True) for window in windows], dim=axis)
    return x


def convolved(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """A grouped conv that pads by half of its kernel, one tap at a time."""
    rows, columns = weight.shape[2:]
    per_group = weight.shape[1]
    groups = x.shape[1] // per_group
    padded = torch.nn.functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    height, width = ((side - 1) // stride + 1 for side in x.shape[2:])
    outputs = []
    for group, kernel in enumerate(weight.chunk(groups)):
        channels = padded[:, group * per_group : (group + 1) * per_group]
        total = torch.zeros(x.shape[0], len(kernel), height, width, dtype=x.dtype)
        for row in range(rows):
            for column in range(columns):
                taps = channels[:, :, row:, column:][:, :, : stride * (height - 1) + 1 : stride]
                taps = taps[:, :, :, : stride * (width - 1) + 1 : stride]
                total = total + torch.einsum("oc,bchw->bohw", kernel[:, :, row, column], taps)
        outputs.append(total)
    return torch.cat(outputs, dim=1)


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, group: int) -> torch.Tensor:
    parts = []
    for part in x.split(group, dim=1):
        mean = part.mean(dim=(1, 2, 3), keepdim=True)
        variance = (part - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        parts.append((part - mean) / (variance + 1e-5).sqrt())
    return torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]


def stretched(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Linear interpolation between the centres of pixels."""
    side = x.shape[axis]
    parts = []
    for index in range(size):
        at = min(max((index + 0.5) * side / size - 0.5, 0.0), side - 1.0)
        low = int(at)
        high = min(low + 1, side - 1)
        parts.append((1 - (at - low)) * x.select(axis, low) + (at - low) * x.select(axis, high))
    return torch.stack(parts, dim=axis)


def refined(x: torch.Tensor, tensors: dict[str, torch.Tensor], stride: int, group: Pair) -> torch.Tensor:
    hidden = convolved(x, tensors["conv.weight"], stride)
    hidden = normed(hidden, tensors["norm.weight"], tensors["norm.bias"], group[0]).clamp(min=0)
    mixed = torch.einsum("oc,bchw->bohw", tensors["pointwise.weight"][:, :, 0, 0], hidden)
    return normed(mixed, tensors["final_norm.weight"], tensors["final_norm.bias"], group[1])


def reference(x: torch.Tensor, site: Site, tensors: dict[str, torch.Tensor], *, pool: int, group: Pair) -> torch.Tensor:
    """Up(GN(PW(ReLU(GN(Conv(AvgPool(x))))))) of METHODS, section 5; a prefix token is a picture of one pixel."""
    stride, prefix = site.stride[0], site.prefix_tokens
    grid, out = site.grid, site.output_grid
    assert grid is not None and out is not None
    if site.layout == "NHWC":
        picture = x.movedim(-1, 1)
    elif site.layout == "NLC":
        picture = x[:, prefix:].movedim(-1, 1).reshape(len(x), -1, *grid)
    else:
        picture = x
    delta = refined(pooled(picture, pool), tensors, stride, group)
    delta = stretched(stretched(delta, 2, out[0]), 3, out[1])
    if site.layout == "NHWC":
        return delta.movedim(1, -1)
    if site.layout == "NCHW":
        return delta
    singles = [refined(x[:, index, :, None, None], tensors, stride, group)[:, None, :, 0, 0] for index in range(prefix)]
    return torch.cat([*singles, delta.flatten(2).movedim(1, -1)], dim=1)


# the site, the settings, and what follows from them: the pool's side, the kernel, the width, channels per norm group
CASES = [
    pytest.param({}, {}, 2, (5, 5), 16, (8, 8), id="map"),
    pytest.param({"stride": 2}, {}, 2, (5, 5), 16, (8, 8), id="stride-2"),
    pytest.param({"grid": (13, 15), "stride": 2}, {}, 2, (5, 5), 16, (8, 8), id="odd-stride-2"),
    pytest.param({"grid": (7, 9)}, {}, 2, (3, 3), 16, (8, 8), id="small-map"),
    pytest.param({"grid": (4, 20)}, {}, 2, (1, 5), 16, (8, 8), id="flat-map"),
    pytest.param({"grid": (3, 12)}, {}, 2, (1, 5), 16, (8, 8), id="a-side-averaged-as-a-whole"),
    pytest.param({"grid": (1, 1)}, {}, 2, (1, 1), 16, (8, 8), id="one-pixel"),
    pytest.param({"grid": (2, 2), "stride": 2}, {}, 2, (1, 1), 16, (8, 8), id="to-one-pixel"),
    pytest.param({"grid": (12, 12), "out": (10, 10)}, {}, 2, (5, 5), 16, (8, 8), id="unpadded-block"),
    pytest.param({"channels": (12, 10)}, {}, 2, (5, 5), 16, (8, 10), id="odd-channels"),
    pytest.param({"layout": "NHWC", "stride": 2}, {}, 2, (5, 5), 16, (8, 8), id="channels-last"),
    pytest.param({"layout": "NLC"}, {}, 2, (5, 5), 16, (8, 8), id="tokens"),
    pytest.param({"layout": "NLC", "prefix": 1}, {}, 2, (5, 5), 16, (8, 8), id="class-token"),
    pytest.param({"layout": "NLC", "prefix": 2, "stride": 2}, {}, 2, (5, 5), 16, (8, 8), id="two-tokens-stride-2"),
    pytest.param({}, {"groups": 4, "expand": 0.5}, 2, (5, 5), 8, (8, 8), id="narrow-4-groups"),
    pytest.param({}, {"groups": 1, "expand": 2}, 2, (5, 5), 32, (8, 8), id="wide-no-groups"),
    pytest.param({"channels": (18, 6)}, {"groups": 3}, 2, (5, 5), 24, (8, 6), id="3-groups"),
    pytest.param({}, {"kernel": 3, "pool": 3}, 3, (3, 3), 16, (8, 8), id="pool-3"),
    pytest.param({"prefix": 1, "layout": "NLC"}, {"kernel": 1, "pool": 1}, 1, (1, 1), 16, (8, 8), id="no-pool"),
]


@pytest.mark.parametrize(("place", "settings", "pool", "kernel", "width", "group"), CASES)
def test_it_computes_its_definition(
    place: dict[str, Any], settings: dict[str, object], pool: int, kernel: Pair, width: int, group: Pair
) -> None:
    site = block_site(**place)
    adapter = build(site, **settings)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *site.in_shape, generator=generator, requires_grad=True)
    got = adapter(x)
    assert got.shape == (2, *site.out_shape)
    cotangent = torch.randn(got.shape, generator=generator)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), (x, *tensors))

    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in zip(names, tensors, strict=True)}
    groups = int(settings.get("groups", 2))  # type: ignore[call-overload]
    assert wide["conv.weight"].shape == (width, site.in_channels // groups, *kernel)
    count = site.in_channels * kernel[0] * kernel[1] * width // groups + width * site.out_channels
    assert sum(tensor.numel() for tensor in tensors) == count + 2 * width + 2 * site.out_channels
    x_wide = x.detach().double().requires_grad_()
    expected = reference(x_wide, site, wide, pool=pool, group=group)
    wanted = torch.autograd.grad((expected * cotangent.double()).sum(), (x_wide, *wide.values()))
    # a norm's gradients are small differences of large sums: the scale is that of all of them
    scale = float(max(item.abs().max() for item in wanted))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * scale)


def test_it_starts_as_identity_and_its_last_norm_learns_first() -> None:
    site = block_site(layout="NLC", prefix=1)
    adapter = build(site, lively=False)
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
    delta = adapter(x)
    assert torch.equal(delta, torch.zeros(2, *site.out_shape))
    delta.square().sum().backward()
    (adapter(x) * x.sum()).sum().backward()
    moving = {name for name, tensor in adapter.named_parameters() if tensor.grad is not None and tensor.grad.any()}
    assert moving == {"final_norm.weight", "final_norm.bias"}


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 8), (8, 1), (16, 2), (12, 2), (10, 1), (13, 1), (3, 1), (100, 10), (36, 4)]
)
def test_norm_groups_hold_about_eight_channels(channels: int, groups: int) -> None:
    assert find_norm_groups(channels) == groups


def test_parameters_of_a_resnet() -> None:
    with torch.device("meta"):
        backbone = describe_model(timm.create_model("resnet50").eval(), 224)
    plan = plan_insertions(backbone, "tinytl")
    total = 0
    for item in plan.insertions:
        with torch.device("meta"):
            adapter = SCHEME.build(item.site, item.form, SCHEME.configure(item.config))
        total += sum(parameter.numel() for parameter in adapter.parameters())
    # per stage: blocks, channels before and in it; the last maps are pooled to 7×7 first and to 3×3 then
    expected, side, before = 0, 56, 64
    for index, (blocks, out) in enumerate(((3, 256), (4, 512), (6, 1024), (3, 2048))):
        for block in range(blocks):
            given = before if block == 0 else out
            kernel = 5 if side // 2 >= 5 else 3
            expected += given * given * kernel**2 // 2 + given * out + 2 * given + 2 * out
            if block == 0 and index:
                side //= 2
        before = out
    assert total == expected


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({}, {"groups": 3}, "3 groups do not divide its 16 input channels"),
        ({"grid": None}, {}, "it has no grid"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], settings: dict[str, object], said: str) -> None:
    reason = SCHEME.fits(replace(block_site(), **change), "parallel", SCHEME.configure(settings))
    assert reason is not None and said in reason


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": 4}, "kernel is 4, expected an odd number"),
        ({"pool": 0}, "pool is 0, expected more than 0"),
        ({"groups": -2}, "groups is -2, expected more than 0"),
        ({"expand": "nan"}, "expand is nan, expected more than 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SCHEME.configure(settings)


def test_it_does_not_merge_and_says_why() -> None:
    outcome = SCHEME.merge(block_site(), "parallel", build(block_site()), None)
    assert isinstance(outcome, Refusal)
    assert "not linear" in outcome.reason


def test_maps_of_another_size_keep_the_blocks_rule() -> None:
    """A convolutional base runs at other sizes; Δ follows its block by the stride and what the block cuts off."""
    adapter = build(block_site(stride=2))
    assert adapter(torch.zeros(1, 16, 31, 17)).shape == (1, 24, 16, 9)
    adapter = build(block_site(grid=(12, 12), out=(10, 10)))
    assert adapter(torch.zeros(1, 16, 20, 14)).shape == (1, 24, 18, 12)


@pytest.mark.parametrize("trait", ["plain", "tokens", "windowed"])
def test_it_exports_with_any_batch(trait: str) -> None:
    model = trained(trait, "tinytl")
    names = tuple(f"class {index}" for index in range(5))
    _, report = onnx_bytes(model, preprocessing=model.preprocessing, classes=names, name="tiny")
    assert {check.batch for check in report.checks} == {1, 2, 3, 7}
    # relative to what sets the outputs of different pictures apart, which is little in these tiny nets
    assert max(check.relative_error for check in report.checks) <= 5e-5


def test_it_keeps_half_precision_under_autocast() -> None:
    site = block_site(layout="NLC", prefix=1)
    adapter = build(site)
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = adapter(x)
    assert half.dtype == torch.bfloat16
    expected = adapter(x)
    assert (half.float() - expected).abs().max() < 0.05 * expected.abs().max()
