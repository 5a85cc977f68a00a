"""Lowered layers: functions with the same results, and the layers that must stay calls of their modules."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cadapt.adapted import AdaptedModel
from cadapt.frozen.inline import inline_adapters
from cadapt.frozen.lowering import activate, affine, lower, pad_same
from cadapt.frozen.program import Program
from cadapt.graph.shift import call_shifted
from tests.frozen.programs import adapted, assert_unchanged, called, count, measured, pictures, toy
from tests.frozen.toys import CHANNELS, Framed, conv, framed, vector

CASES = [
    ("plain", "conv-par"),
    ("weight-standardised", "conv-seq"),
    ("norm-free", "conv-par"),
    ("same-padded", "bias"),
    ("reused", "conv-par"),
    ("overwriting", "res-par"),
    ("windowed", "norm"),
    ("straight", "conv-par"),
    ("layer-scaled", "bias"),
    ("hard-swish", "full"),
    ("re-parameterised", "norm"),
]


def lowered(model: AdaptedModel) -> Program:
    return measured(model, lower)


@pytest.mark.parametrize(("trait", "scheme"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_the_same_results(trait: str, scheme: str, training: bool) -> None:
    program = measured(adapted(trait, scheme, classes=5).train(training), inline_adapters, lower)
    assert not count(program, nn.Conv2d, nn.Linear, nn.Identity, nn.ReLU, nn.LayerNorm, layers.LayerNorm2d)
    # a program's statistics are the model's: each pass of the two moves them
    if not (training and scheme == "full"):
        assert_unchanged(program)


def test_a_frozen_batch_norm_is_its_formula() -> None:
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3)
    program = lowered(toy(Framed(norm), "stem"))
    (node,) = program.nodes(affine)
    scale, shift = (program.exact(item) for item in node.args[1:])
    deviation = torch.sqrt(norm.running_var + 1e-3)
    assert torch.allclose(scale, norm.weight / deviation, rtol=1e-14)
    assert torch.allclose(shift, norm.bias - norm.running_mean * norm.weight / deviation, rtol=1e-14)
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("norm", "trainable", "policy"),
    [
        (nn.BatchNorm2d, ("stem",), "train"),
        (nn.BatchNorm2d, ("body.weight",), "frozen"),
        (nn.BatchNorm2d, ("body.bias",), "frozen"),
        (lambda channels: nn.BatchNorm2d(channels, affine=False), ("stem",), "frozen"),
        (lambda channels: nn.BatchNorm2d(channels, track_running_stats=False), ("stem",), "frozen"),
    ],
)
def test_batch_norms_that_move_or_measure_stay(norm, trainable, policy) -> None:  # type: ignore[no-untyped-def]
    """Also where the model is in eval mode while the program is made: its plan says what will be trained."""
    program = lowered(toy(Framed(norm(CHANNELS)), *trainable, bn_policy=policy))
    assert count(program, nn.BatchNorm2d) == 1 and not count(program, affine)
    assert_unchanged(program)


def test_norms_that_hold_an_activation() -> None:
    body = nn.Sequential(layers.BatchNormAct2d(CHANNELS), layers.GroupNormAct(CHANNELS, 2, act_layer=nn.SiLU))
    program = lowered(toy(Framed(body), "stem"))
    assert [item for item in called(program) if item in (affine, activate, F.group_norm)] == [
        affine,
        activate,
        F.group_norm,
        activate,
    ]
    assert_unchanged(program)


def test_learned_differences_are_added_to_the_tensors() -> None:
    """To a bias, and where the layer has none; a difference to a batch norm's scale leaves that call as it was."""
    bias = measured(adapted("plain", "bias"), inline_adapters, lower)
    assert not count(bias, call_shifted)
    shifts = [node.args[2] for node in bias.nodes(affine)]
    assert shifts and all(shift.meta["live"] for shift in shifts)
    norm = measured(adapted("plain", "norm"), inline_adapters, lower)
    assert count(norm, call_shifted) and not count(norm, affine)


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"padding": "same", "dilation": 2}, (2, 2)),
        ({"padding": "valid"}, (0, 0)),
        ({"padding": 1, "stride": 2, "groups": 4}, (1, 1)),
        ({"padding": "same", "kernel_size": (3, 1)}, (1, 0)),
        ({"padding": 1, "padding_mode": "reflect"}, None),
    ],
)
def test_paddings(options: dict, padding: tuple[int, int] | None) -> None:  # type: ignore[type-arg]
    layer = nn.Conv2d(CHANNELS, CHANNELS, **{"kernel_size": 3, **options})
    program = lowered(toy(Framed(layer), "stem"))
    found = [node.args[4] for node in program.nodes(F.conv2d)][1:]
    assert found == ([] if padding is None else [padding])
    assert count(program, nn.Conv2d) == (padding is None)
    assert_unchanged(program)


def test_same_padding_follows_the_picture() -> None:
    model = toy(Framed(layers.Conv2dSame(CHANNELS, CHANNELS, 3, stride=2)), "stem")
    program = lowered(model)
    assert count(program, pad_same) == 1
    for side in (7, 8, 9, 12):
        assert_unchanged(program, torch.randn(1, 3, side, side, dtype=torch.float64).requires_grad_())


def test_computed_weights_are_computed_once() -> None:
    body = nn.Sequential(layers.StdConv2d(CHANNELS, CHANNELS, 3, padding=1), layers.ScaledStdConv2dSame(CHANNELS, 4, 3))
    body.append(nn.Conv2d(4, CHANNELS, 1))
    frozen = lowered(toy(Framed(body), "stem"))
    assert count(frozen, F.conv2d) == 4 and not count(frozen, layers.StdConv2d, layers.ScaledStdConv2dSame)
    assert_unchanged(frozen)
    training = lowered(toy(Framed(body), "body.0", "body.1.gain"))
    assert count(training, layers.StdConv2d) == count(training, layers.ScaledStdConv2dSame) == 1
    assert_unchanged(training)


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrised_layers() -> None:
    """A linear layer stays a call; a frozen conv is what it convolves with; one that trains is left alone."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return block.conv(block.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def built() -> Framed:
        parts = {"linear": nn.Linear(CHANNELS, CHANNELS), "conv": conv(1)}
        for part in parts.values():
            parametrize.register_parametrization(part, "weight", _Halved())
        return framed(forward, **parts)

    frozen = lowered(toy(built(), "stem"))
    assert (count(frozen, F.conv2d), count(frozen, F.linear)) == (2, 1)
    assert_unchanged(frozen)
    training = lowered(toy(built(), "body.conv"))
    assert (count(training, F.conv2d), count(training, F.linear)) == (1, 1)
    assert_unchanged(training)


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [conv, nn.Identity, nn.GELU, lambda: nn.BatchNorm2d(CHANNELS)])
def test_hooked_modules_stay(make, hook: str) -> None:  # type: ignore[no-untyped-def]
    module, seen = make(), []
    model = toy(Framed(module), "stem")
    getattr(module, hook)(lambda *_: seen.append(1))
    program = lowered(model)
    assert count(program, type(module)) == 1
    seen.clear()
    assert_unchanged(program)
    assert len(seen) == 2


def test_what_drops_nothing_goes() -> None:
    body = nn.Sequential(nn.Identity(), nn.Dropout(0.0), layers.DropPath(0.0), nn.Dropout(0.5), layers.DropPath(0.3))
    program = lowered(toy(Framed(body), "stem").train())
    assert [item for item in called(program) if isinstance(item, type)] == [nn.Dropout, layers.DropPath]
    assert_unchanged(program)


def test_pools() -> None:
    body = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    program = lowered(toy(Framed(body), "stem"))
    assert count(program, F.max_pool2d, F.avg_pool2d) == 2
    assert_unchanged(program)
    odd = lowered(toy(Framed(nn.AvgPool2d(2, divisor_override=3)), "stem"))
    assert count(odd, nn.AvgPool2d) == 1
    assert_unchanged(odd)


def test_activations_by_name() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = F.gelu(block.silu(block.tanh_gelu(x)), approximate="tanh")
        return block.learned(block.leaky(F.relu6(y.sigmoid()) + x))

    parts = {
        "silu": nn.SiLU(inplace=True),
        "tanh_gelu": nn.GELU("tanh"),
        "learned": nn.PReLU(),
        "leaky": nn.LeakyReLU(),
    }
    program = lowered(toy(framed(forward, **parts), "stem"))
    names = [node.args[1] for node in program.nodes(activate)]
    assert names == ["gelu_tanh", "silu", "gelu_tanh", "sigmoid", "relu6"]
    assert count(program, nn.PReLU, nn.LeakyReLU) == 2  # with settings of their own
    assert_unchanged(program)


def test_overwriting_goes_where_nobody_reads_what_was_there() -> None:
    def forgetting(block: nn.Module, x: Tensor) -> Tensor:
        y = block.act(block.conv(x))
        y += x
        return y.mul_(2.0)

    program = lowered(toy(framed(forgetting, conv=conv(), act=nn.ReLU(inplace=True)), "stem"))
    assert not count(program, operator.iadd, "mul_", nn.ReLU)
    assert_unchanged(program)


def test_overwriting_a_view_stays() -> None:
    """The other half of the conv's result is read afterwards, by the tensor's own name."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = block.conv(x)
        y[:, :4].mul_(2.0)
        return x + block.last(y)

    program = lowered(toy(framed(forward, conv=conv(), last=conv()), "stem", "body.conv"))
    assert count(program, "mul_") == 1
    assert_unchanged(program)


def test_one_layer_called_twice() -> None:
    layer = conv()
    program = lowered(toy(framed(lambda block, x: block.conv(block.conv(x)), conv=layer), "stem"))
    weights = [node.args[1].target for node in program.nodes(F.conv2d)]
    assert weights == ["stem.weight", "body.conv.weight", "body.conv.weight"]
    assert_unchanged(program)


@pytest.mark.parametrize("padding", ["same", 1])
def test_functions_are_written_in_one_way(padding: str | int) -> None:
    """Arguments by position; one whose padding is a word is left as it is, by all passes."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, block.weight, padding=padding) + x

    program = lowered(toy(framed(forward, weight=vector(CHANNELS, CHANNELS, 3, 3)), "stem"))
    node = list(program.nodes(F.conv2d))[1]
    assert (len(node.args), bool(node.kwargs)) == ((2, True) if padding == "same" else (7, False))
    assert_unchanged(program)


def test_what_is_asked_of_the_model_itself_is_left() -> None:
    model = adapted("plain", "conv-par")
    before = {name: (item.data_ptr(), item._version) for name, item in model.state_dict(keep_vars=True).items()}
    lowered(model)
    after = {name: (item.data_ptr(), item._version) for name, item in model.state_dict(keep_vars=True).items()}
    assert before == after
    assert torch.isfinite(model(pictures(model))).all()
