"""Conv-Adapter on tokens, and where the base has no kernel: against the formula, token by token, and as exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cadapt.adapters import get_scheme
from cadapt.adapters.conv_adapter import fold_alpha
from cadapt.plan import Form
from cadapt.site import Pair, Site
from tests.adapters.test_conv_adapter import build, conv_site

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "identity": lambda x: x}


def token_site(
    channels: Pair = (8, 12),
    *,
    grid: Pair = (6, 9),
    stride: int = 1,
    prefix: int = 1,
    kernel: int | None = None,
    activation: str = "gelu",
    **more: Any,
) -> Site:
    out = (-(-grid[0] // stride), -(-grid[1] // stride))
    pad = 0 if kernel is None else kernel // 2
    return Site(
        path="blocks.0",
        kind="block",
        in_shape=(prefix + grid[0] * grid[1], channels[0]),
        out_shape=(prefix + out[0] * out[1], channels[1]),
        layout="NLC",
        grid=grid,
        out_grid=out,
        kernel=None if kernel is None else (kernel, kernel),
        stride=(stride, stride),
        padding=(pad, pad),
        prefix_tokens=prefix,
        activation=activation,
        **more,
    )


def reference(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], *, grid: Pair, stride: int, prefix: int, sigma: str
) -> torch.Tensor:
    """α ⊙ PW(σ(DW(x))), one output token after the other; a prefix token has no neighbours. No conv is called."""
    weight, kernel = tensors["depthwise.weight"], tensors["depthwise.weight"].shape[2]
    width, per_group = weight.shape[:2]
    height, breadth = grid
    # channel c of the input belongs to bottleneck channel c // per_group, or to all where nothing is grouped
    dense = torch.zeros(width, x.shape[2], kernel, kernel, dtype=x.dtype)
    for row in range(width):
        start = 0 if per_group == x.shape[2] else row * per_group
        dense[row, start : start + per_group] = weight[row]

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        hidden = ACTIVATIONS[sigma](hidden + tensors["depthwise.bias"])
        mixed = hidden @ tensors["pointwise.weight"][:, :, 0, 0].T + tensors["pointwise.bias"]
        return mixed * tensors["alpha"].flatten()

    centre = kernel // 2
    tokens = [finish(x[:, index] @ dense[:, :, centre, centre].T) for index in range(prefix)]
    for top in range(0, height, stride):
        for left in range(0, breadth, stride):
            total = torch.zeros(x.shape[0], width, dtype=x.dtype)
            for row in range(kernel):
                for column in range(kernel):
                    here, there = top + row - centre, left + column - centre
                    if 0 <= here < height and 0 <= there < breadth:
                        token = x[:, prefix + here * breadth + there]
                        total = total + token @ dense[:, :, row, column].T
            tokens.append(finish(total))
    return torch.stack(tokens, dim=1)


CASES = [
    pytest.param({"prefix": 0}, "parallel", {"gamma": 2}, id="no-prefix"),
    pytest.param({"prefix": 1}, "parallel", {"gamma": 4}, id="class-token"),
    pytest.param({"prefix": 2}, "parallel", {"gamma": 2}, id="two-prefix-tokens"),
    pytest.param({"prefix": 0, "stride": 2}, "parallel", {"gamma": 2}, id="stride-2"),
    pytest.param({"prefix": 1, "stride": 2}, "parallel", {"gamma": 2}, id="class-token-stride-2"),
    pytest.param({"prefix": 2, "stride": 2}, "sequential", {"gamma": 4}, id="behind-stride-2"),
    pytest.param({"prefix": 2, "stride": 2, "grid": (7, 5)}, "parallel", {"gamma": 1}, id="odd-grid-stride-2"),
    pytest.param({"prefix": 1, "kernel": 7, "activation": "relu"}, "parallel", {"gamma": 8}, id="own-kernel"),
    pytest.param({"prefix": 1}, "parallel", {"gamma": 2, "kernel": 5}, id="larger-kernel"),
    pytest.param({"prefix": 1}, "sequential", {"gamma": 2, "kernel": 1}, id="smaller-kernel"),
    pytest.param({"prefix": 1}, "parallel", {"gamma": 3, "conv_type": "regular"}, id="regular"),
    pytest.param({"prefix": 2, "stride": 2}, "parallel", {"gamma": 2, "conv_type": "linear"}, id="linear-stride-2"),
]


@pytest.mark.parametrize(("place", "form", "settings"), CASES)
def test_it_computes_the_formula_on_tokens(place: dict[str, Any], form: Form, settings: dict[str, object]) -> None:
    site = token_site(**place)
    adapter = build(site, form, **settings)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *(site.out_shape if form == "sequential" else site.in_shape), generator=generator)
    x.requires_grad_()
    got = adapter(x)
    assert got.shape == (2, *site.out_shape)
    cotangent = torch.randn(got.shape, generator=generator)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), (x, *tensors))

    # the reference is computed in fp64 from the same values
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in adapter.named_parameters()}
    x_wide = x.detach().double().requires_grad_()
    behind = form == "sequential"
    grid = site.output_grid if behind else site.grid
    assert grid is not None
    stride = 1 if behind else site.stride[0]
    expected = reference(x_wide, wide, grid=grid, stride=stride, prefix=site.prefix_tokens, sigma=site.activation)
    expected_gradients = torch.autograd.grad((expected * cotangent.double()).sum(), (x_wide, *wide.values()))
    for what, ours, theirs in zip(
        ("output", "x", *names), (got, *gradients), (expected, *expected_gradients), strict=True
    ):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        # gradients of parameters are sums over all positions, whose terms cancel
        allowed = 1e-6 if what in ("output", "x") else 5e-6
        assert error <= allowed, f"{what}: relative error {float(error):.2e}"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_place_without_a_kernel_gets_three_by_three(layout: str, stride: int) -> None:
    # ceil(H / stride), also on odd and unequal sides
    shape, out = (8, 7, 10), (12, -(-7 // stride), -(-10 // stride))
    last = layout == "NHWC"
    site = Site(
        path="blocks.0",
        kind="block",
        in_shape=(*shape[1:], shape[0]) if last else shape,
        out_shape=(*out[1:], out[0]) if last else out,
        layout=layout,  # type: ignore[arg-type]
        grid=shape[1:],
        stride=(stride, stride),
        activation="relu",
    )
    adapter = build(site, gamma=2)
    assert adapter.depthwise.kernel_size == (3, 3)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    hidden = F.conv2d(x, adapter.depthwise.weight, adapter.depthwise.bias, stride=stride, padding=1, groups=4)
    expected = adapter.alpha * F.conv2d(F.relu(hidden), adapter.pointwise.weight, adapter.pointwise.bias)
    got = adapter(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else adapter(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert build(site, gamma=2, kernel=5)(x.permute(0, 2, 3, 1) if last else x).shape == (2, *site.out_shape)


def test_same_padding_holds_without_a_kernel() -> None:
    site = replace(token_site(grid=(8, 6), stride=2), padding="same")
    adapter = build(site, gamma=2)
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
    assert adapter(x).shape == (2, *site.out_shape)
    # TensorFlow's rule puts the odd row at the end of the grid
    picture = x[:, 1:].transpose(1, 2).unflatten(2, (8, 6))
    plain = nn.Conv2d(8, 4, 3, stride=2, groups=4)
    plain.load_state_dict(adapter.depthwise.state_dict())
    hidden = F.gelu(plain(F.pad(picture, (0, 1, 0, 1))))
    expected = (adapter.alpha * adapter.pointwise(hidden)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(adapter(x)[:, 1:], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_it_starts_at_zero_and_has_the_parameters_of_the_formula(prefix: int) -> None:
    site, scheme = token_site((16, 24), prefix=prefix), get_scheme("res-par")
    adapter = scheme.build(site, "parallel", scheme.configure({"gamma": 4}))
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adapter(x), torch.zeros(2, *site.out_shape))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 16 * 9 + 4 + 4 * 24 + 2 * 24
    on_maps = build(conv_site((16, 24)), gamma=4).state_dict()
    assert {name: tensor.shape for name, tensor in adapter.state_dict().items()} == {
        name: tensor.shape for name, tensor in on_maps.items()
    }


def test_folding_alpha_holds_on_tokens() -> None:
    site = token_site(prefix=2, stride=2)
    adapter = build(site, gamma=2)
    folded, _ = fold_alpha(adapter, get_scheme("res-par").configure({"gamma": 2}))
    x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(x), adapter(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"conv_type": "linear"}])
def test_it_exports_with_any_batch(settings: dict[str, object]) -> None:
    adapter = build(token_site(prefix=1, stride=2), gamma=2, **settings)
    x = torch.randn(2, *token_site().in_shape, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(adapter, (x,), dynamic_shapes={"x": {0: batch}})
    for size in (1, 2, 3, 7):
        images = torch.randn(size, *x.shape[1:], generator=torch.Generator().manual_seed(size))
        torch.testing.assert_close(program.module()(images), adapter(images), rtol=1e-6, atol=1e-6)


def test_it_compiles_without_breaks_and_runs_channels_last() -> None:
    adapter = build(token_site(prefix=1), gamma=2)
    x = torch.randn(2, *token_site().in_shape, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapter(x), rtol=0, atol=0)
    last = copy.deepcopy(adapter).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), adapter(x), rtol=1e-6, atol=1e-6)


def test_it_stays_in_half_precision_under_autocast() -> None:
    adapter = build(token_site(prefix=1), gamma=2)
    x = torch.randn(2, *token_site().in_shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = adapter(x)
    assert half.dtype == torch.bfloat16
    expected = adapter(x)
    assert (half.float() - expected).abs().max() < 0.03 * expected.abs().max()
