"""Conv-Adapter against its formula, written here with plain functions; its settings and its refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from cadapt.adapters import get_scheme
from cadapt.adapters.conv_adapter import ConvAdapter, ConvAdapterConfig, fold_alpha
from cadapt.errors import UsageError
from cadapt.plan import Form
from cadapt.site import Site
from tests.models import enliven

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "identity": lambda x: x}


def conv_site(
    channels: tuple[int, int] = (8, 12),
    *,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    side: int = 9,
    layout: str = "NCHW",
    padding: int | None = None,
    activation: str = "relu",
) -> Site:
    pad = dilation * (kernel // 2) if padding is None else padding
    out = (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    first = layout == "NCHW"
    return Site(
        path="layer.conv",
        kind="conv",
        in_shape=(channels[0], side, side) if first else (side, side, channels[0]),
        out_shape=(channels[1], out, out) if first else (out, out, channels[1]),
        layout=layout,  # type: ignore[arg-type]
        grid=(side, side),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(dilation, dilation),
        activation=activation,
    )


def build(site: Site, form: Form = "parallel", **settings: object) -> ConvAdapter:
    scheme = get_scheme("conv-par")
    config = scheme.configure(settings)
    assert scheme.fits(site, form, config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = scheme.build(site, form, config)
    enliven(adapter, scale=0.3)
    assert isinstance(adapter, ConvAdapter)
    return adapter


def reference(
    x: torch.Tensor,
    site: Site,
    form: Form,
    tensors: dict[str, torch.Tensor],
    *,
    kernel: int,
    alpha: float | None = None,
) -> torch.Tensor:
    """α ⊙ PW(σ(DW(x))) of METHODS, section 1, one channel and one tap at a time: no conv is called."""
    if site.layout == "NHWC":
        x = x.movedim(-1, 1)
    weight, bias = tensors["depthwise.weight"], tensors["depthwise.bias"]
    stride = 1 if form == "sequential" else site.stride[0]
    dilation = site.dilation[0]
    own, given = (0, 0) if site.kernel is None else site.kernel[0], site.padding[0]
    assert isinstance(given, int)
    pad = dilation * (kernel // 2) if form == "sequential" else given + dilation * (kernel - own) // 2
    padded = F.pad(x, (pad, pad, pad, pad))
    side = (padded.shape[2] - dilation * (kernel - 1) - 1) // stride + 1
    width, per_group = weight.shape[:2]
    rows = []
    for output in range(width):
        # channel w of the bottleneck reads the C_in / w neighbouring channels of its own group
        start = 0 if per_group == x.shape[1] else output * per_group
        total = bias[output] * torch.ones_like(x[:, 0, :1, :1])
        for channel in range(per_group):
            for row in range(kernel):
                for column in range(kernel):
                    taps = padded[
                        :,
                        start + channel,
                        row * dilation : row * dilation + stride * (side - 1) + 1 : stride,
                        column * dilation : column * dilation + stride * (side - 1) + 1 : stride,
                    ]
                    total = total + weight[output, channel, row, column] * taps
        rows.append(total)
    hidden = ACTIVATIONS[site.activation](torch.stack(rows, dim=1))
    mixed = torch.einsum("ow,bwhk->bohk", tensors["pointwise.weight"][:, :, 0, 0], hidden)
    mixed = mixed + tensors["pointwise.bias"][:, None, None]
    delta = mixed * tensors["alpha"]
    return delta.movedim(1, -1) if site.layout == "NHWC" else delta


CASES = [
    pytest.param({}, "parallel", {"gamma": 2}, 3, id="depthwise"),
    pytest.param({"stride": 2}, "parallel", {"gamma": 2}, 3, id="stride-2"),
    pytest.param({"stride": 2, "side": 8}, "parallel", {"gamma": 4}, 3, id="stride-2-even"),
    pytest.param({"dilation": 2}, "parallel", {"gamma": 1}, 3, id="dilated"),
    pytest.param({"layout": "NHWC"}, "parallel", {"gamma": 2}, 3, id="channels-last"),
    pytest.param({"layout": "NHWC", "stride": 2}, "sequential", {"gamma": 4}, 3, id="channels-last-sequential"),
    pytest.param({"stride": 2}, "sequential", {"gamma": 4}, 3, id="sequential"),
    pytest.param({}, "parallel", {"gamma": 3, "conv_type": "regular"}, 3, id="regular"),
    pytest.param({"stride": 2}, "parallel", {"gamma": 2, "conv_type": "regular"}, 3, id="regular-stride-2"),
    pytest.param({}, "parallel", {"gamma": 2, "conv_type": "linear"}, 1, id="linear"),
    pytest.param({"stride": 2}, "parallel", {"gamma": 2, "conv_type": "linear"}, 1, id="linear-stride-2"),
    pytest.param({}, "parallel", {"gamma": 2, "kernel": 5}, 5, id="larger-kernel"),
    pytest.param({}, "parallel", {"gamma": 2, "kernel": 1}, 1, id="smaller-kernel"),
    pytest.param({"kernel": 7, "activation": "gelu"}, "parallel", {"gamma": 8}, 7, id="convnext"),
    pytest.param({"kernel": 2, "stride": 2, "side": 8, "padding": 0}, "parallel", {"gamma": 2}, 2, id="downsample"),
    pytest.param({"kernel": 2, "stride": 2, "side": 8, "padding": 0}, "sequential", {"gamma": 2}, 1, id="after-it"),
    pytest.param({"activation": "silu"}, "parallel", {"gamma": 2}, 3, id="silu"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("place", "form", "settings", "kernel"), CASES)
def test_it_computes_the_formula(
    place: dict[str, object], form: Form, settings: dict[str, object], kernel: int, dtype: torch.dtype
) -> None:
    site = conv_site(**place)  # type: ignore[arg-type]
    adapter = build(site, form, **settings).to(dtype)
    generator = torch.Generator().manual_seed(0)
    shape = site.out_shape if form == "sequential" else site.in_shape
    x = torch.randn(2, *shape, generator=generator, dtype=dtype, requires_grad=True)
    got = adapter(x)
    assert got.shape == (2, *site.out_shape)
    cotangent = torch.randn(got.shape, generator=generator, dtype=dtype)
    names, tensors = zip(*adapter.named_parameters(), strict=True)
    gradients = torch.autograd.grad((got * cotangent).sum(), (x, *tensors))

    # the reference is computed in fp64 from the same values
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in adapter.named_parameters()}
    x_wide = x.detach().double().requires_grad_()
    expected = reference(x_wide, site, form, wide, kernel=kernel)
    expected_gradients = torch.autograd.grad((expected * cotangent.double()).sum(), (x_wide, *wide.values()))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for what, ours, theirs in zip(
        ("output", "x", *names), (got, *gradients), (expected, *expected_gradients), strict=True
    ):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        # gradients of parameters are sums over all positions, whose terms cancel
        allowed = tolerance if what in ("output", "x") else 5 * tolerance
        assert error <= allowed, f"{what}: relative error {float(error):.2e}"


def test_same_padding_follows_tensorflow() -> None:
    site = replace(conv_site(stride=2, side=8), padding="same", out_shape=(12, 4, 4))
    adapter = build(site, gamma=2)
    assert isinstance(adapter.depthwise, Conv2dSame)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    # a 3×3 kernel at stride 2 on an even side needs one row more, which TensorFlow puts at the end
    hidden = F.conv2d(
        F.pad(x, (0, 1, 0, 1)),
        adapter.depthwise.weight,
        adapter.depthwise.bias,
        stride=2,
        groups=adapter.depthwise.groups,
    )
    expected = adapter.alpha * F.conv2d(F.relu(hidden), adapter.pointwise.weight, adapter.pointwise.bias)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_its_parameters_are_counted_by_the_formula(gamma: int, kernel: int) -> None:
    width = 16 // gamma
    expected = 16 * kernel**2 + width + width * 24 + 2 * 24
    adapter = build(conv_site((16, 24), kernel=kernel), gamma=gamma)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == expected
    assert adapter.depthwise.weight.shape == (width, 16 // width, kernel, kernel)


def test_zero_initialisation_gives_zero_and_paper_does_not() -> None:
    site, scheme = conv_site(), get_scheme("conv-par")
    x = torch.randn(1, *site.in_shape, generator=torch.Generator().manual_seed(0))
    for activation in ("relu", "gelu"):
        zero = scheme.build(replace(site, activation=activation), "parallel", scheme.configure({}))
        assert torch.equal(zero(x), torch.zeros(1, *site.out_shape))
        assert torch.equal(zero.alpha, torch.ones(1, 12, 1, 1))
        paper = scheme.build(replace(site, activation=activation), "parallel", scheme.configure({"init": "paper"}))
        assert paper(x).abs().max() > 0
        assert not paper.pointwise.bias.any()


def test_paper_initialisation_has_its_deviations() -> None:
    scheme, site = get_scheme("conv-par"), conv_site((256, 256))
    torch.manual_seed(0)
    relu = scheme.build(site, "parallel", scheme.configure({"init": "paper", "gamma": 1}))
    # kaiming, fan_out: sqrt(2 / C_out)
    torch.testing.assert_close(float(relu.pointwise.weight.detach().std()), (2 / 256) ** 0.5, rtol=0.02, atol=0)
    gelu = scheme.build(replace(site, activation="gelu"), "parallel", scheme.configure({"init": "paper", "gamma": 1}))
    torch.testing.assert_close(float(gelu.pointwise.weight.detach().std()), 0.02, rtol=0.02, atol=0)


def test_alpha_can_be_fixed() -> None:
    site = conv_site()
    learned, fixed = build(site, gamma=2), build(site, gamma=2, alpha="fixed", alpha_init=0.25)
    assert "alpha" not in dict(fixed.named_parameters())
    fixed.load_state_dict({key: value for key, value in learned.state_dict().items() if key != "alpha"})
    x = torch.randn(1, *site.in_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fixed(x), learned(x) / learned.alpha * 0.25, rtol=1e-5, atol=1e-6)


def test_folding_alpha_gives_an_equal_adapter() -> None:
    site, config = conv_site(), ConvAdapterConfig(gamma=2)
    for settings in ({}, {"alpha": "fixed", "alpha_init": 0.3}):
        adapter = build(site, gamma=2, **settings)
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        folded, folded_config = fold_alpha(adapter, config)
        x = torch.randn(2, *site.in_shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(folded(x), adapter(x), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())
        # the config it comes with builds a module that its state fits
        again = get_scheme("conv-par").build(site, "parallel", folded_config)
        again.load_state_dict(folded.state_dict(), strict=True)
        assert torch.equal(again(x), folded(x))


def test_gamma_that_leaves_no_whole_groups_is_refused_with_what_fits() -> None:
    scheme = get_scheme("conv-par")
    site = conv_site((96, 96))
    reason = scheme.fits(site, "parallel", scheme.configure({"gamma": 7}))
    assert reason is not None
    assert "96 channels do not divide by γ=7" in reason
    assert "1, 2, 4, 8" in reason
    assert scheme.fits(site, "parallel", scheme.configure({"gamma": 7, "conv_type": "regular"})) is None


def test_the_default_gamma_takes_the_nearest_width_that_divides() -> None:
    # 30 // 4 = 7 does not divide 30; 6 is nearer than 10
    adapter = build(conv_site((30, 30)))
    assert adapter.depthwise.out_channels == 6
    assert build(conv_site((2, 2))).depthwise.out_channels == 1


@pytest.mark.parametrize(
    ("padding", "form", "settings"),
    [(1, "parallel", {"kernel": 2}), (1, "sequential", {"kernel": 4}), (0, "parallel", {"kernel": 1})],
)
def test_a_kernel_that_cannot_keep_the_grid_is_refused(padding: int, form: Form, settings: dict[str, int]) -> None:
    scheme = get_scheme("conv-par")
    reason = scheme.fits(conv_site(padding=padding), form, scheme.configure(settings))
    assert reason is not None and "cannot keep the grid" in reason


def test_a_site_without_a_grid_is_refused() -> None:
    scheme = get_scheme("res-par")
    site = Site(path="blocks.0", kind="block", in_shape=(197, 64), out_shape=(197, 64), layout="NLC")
    reason = scheme.fits(site, "parallel", scheme.configure({}))
    assert reason is not None and "no grid" in reason


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gama": 4}, "no setting 'gama'"),
        ({"gamma": 0}, "γ is 0"),
        ({"gamma": "four"}, "gamma is 'four'"),
        ({"gamma": 2.5}, "gamma is 2.5"),
        ({"kernel": 0}, "kernel is 0"),
        ({"conv_type": "dense"}, "depthwise | regular | linear"),
        ({"activation": "reluu"}, "unknown activation 'reluu'"),
        ({"activation": ""}, "unknown activation ''"),
        ({"alpha_init": "big"}, "alpha_init is 'big'"),
        ({"init": None}, "init is None"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=None) as caught:
        get_scheme("conv-par").configure(settings)
    assert said in caught.value.message


def test_an_unknown_setting_gets_a_close_match() -> None:
    with pytest.raises(UsageError) as caught:
        get_scheme("conv-par").configure({"gama": 4})
    assert caught.value.hint == "did you mean gamma?"


def test_settings_may_be_text() -> None:
    config = get_scheme("conv-par").configure({"gamma": "8", "kernel": "none", "alpha_init": "0.5"})
    assert config == ConvAdapterConfig(gamma=8, kernel=None, alpha_init=0.5)


def test_every_module_of_an_adapter_is_a_plain_one() -> None:
    adapter = build(conv_site())
    assert [type(child) for child in adapter.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert not adapter.activation.inplace
