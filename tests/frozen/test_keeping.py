"""What each operation keeps once its lean form was chosen, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.relu import relu_bits, relu_result
from cadapt.frozen.keeping import choose_kept, conv2d_behind, linear_behind, mul_behind
from cadapt.frozen.lowering import lower
from cadapt.frozen.prepare import build
from cadapt.frozen.program import Program
from tests.frozen.programs import adapted, assert_unchanged, called, count, measured, pictures, running, saved, toy
from tests.frozen.toys import CHANNELS, conv, framed, vector

Forward = Callable[[nn.Module, Tensor], Tensor]
MAP = (2, CHANNELS, 8, 8)


def chosen(forward: Forward, *trainable: str, **parts: nn.Module | nn.Parameter) -> Program:
    return measured(toy(framed(forward, **parts), *(trainable or ("stem.bias",))), lower, choose_kept)


def kept_maps(program: Program) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What is kept that depends on the pictures: all with a batch in front, and packed bits."""
    kept = saved(
        running(program), pictures(program.model).detach(), [*program.model.parameters(), *program.own.buffers()]
    )
    return [item for item in kept if item[0][0] == 2 or item[1] == torch.uint8]


WIDE = torch.float64
BITS = ((2 * CHANNELS * 8 * 8 // 8,), torch.uint8)

# forward, its parts, what trains, what is kept of maps
LEAN: dict[str, tuple[Forward, dict[str, nn.Module | nn.Parameter], tuple[str, ...], list[object]]] = {
    "a frozen conv keeps nothing": (lambda b, x: b.conv(x), {"conv": conv(groups=2)}, (), []),
    "nor with a bias that trains": (lambda b, x: b.conv(x), {"conv": conv()}, ("body.conv.bias",), []),
    "a conv that trains keeps its input": (
        lambda b, x: b.conv(x),
        {"conv": conv()},
        ("stem.bias", "body.conv"),
        [(MAP, WIDE)],
    ),
    "a frozen batch norm nothing": (lambda b, x: b.norm(F.pad(x, (0, 0))), {"norm": nn.BatchNorm2d(CHANNELS)}, (), []),
    "a ReLU a bit": (lambda b, x: b.conv(F.relu(x)), {"conv": conv()}, (), [BITS]),
    "a ReLU before a conv that trains its result, once": (
        lambda b, x: b.conv(F.relu(x)),
        {"conv": conv()},
        ("stem.bias", "body.conv"),
        [(MAP, WIDE)],
    ),
    "GELU its input": (lambda b, x: b.conv(F.gelu(x)), {"conv": conv()}, (), [(MAP, WIDE)]),
    "GELU and a conv that trains one tensor together": (
        lambda b, x: b.conv(F.gelu(x)),
        {"conv": conv()},
        ("stem.bias", "body.conv"),
        [(MAP, WIDE)],
    ),
    "GELU and two such convs as well": (
        lambda b, x: b.conv(y := F.silu(x)) + b.other(y),
        {"conv": conv(), "other": conv(1)},
        ("stem.bias", "body"),
        [(MAP, WIDE)],
    ),
    "a sigmoid its result": (lambda b, x: torch.sigmoid(x), {}, (), [(MAP, WIDE)]),
    "a gated map its source and the gate": (
        lambda b, x: (y := F.silu(x)) * torch.sigmoid(b.conv(y.mean((2, 3), keepdim=True))),
        {"conv": conv(1)},
        (),
        [(MAP, WIDE), ((2, CHANNELS, 1, 1), WIDE)],
    ),
    "average pooling nothing": (lambda b, x: b.pool(x), {"pool": nn.AvgPool2d(2)}, (), []),
    "a shortcut nothing": (lambda b, x: b.conv(x) + x, {"conv": conv()}, (), []),
}


@pytest.mark.parametrize("name", LEAN)
def test_what_is_kept(name: str) -> None:
    forward, parts, trainable, expected = LEAN[name]
    program = chosen(forward, *trainable, **parts)
    assert kept_maps(program) == expected
    assert_unchanged(program)


def test_max_pooling_keeps_less_than_its_input_and_places() -> None:
    program = chosen(lambda b, x: b.pool(x), pool=nn.MaxPool2d(3, 2, 1))
    kept = kept_maps(program)
    assert kept and all(dtype == torch.uint8 for _, dtype in kept)
    assert_unchanged(program)


@pytest.mark.parametrize(
    "norm", [lambda: layers.LayerNorm2d(CHANNELS), lambda: nn.GroupNorm(2, CHANNELS), lambda: nn.LayerNorm(8)]
)
def test_a_frozen_norm_keeps_its_input_and_two_numbers_a_group(norm: Callable[[], nn.Module]) -> None:
    program = chosen(lambda b, x: b.norm(x), norm=norm())
    wide = [shape for shape, _ in kept_maps(program) if torch.Size(shape).numel() >= torch.Size(MAP).numel()]
    assert len(wide) == 1
    assert_unchanged(program)


def test_tokens() -> None:
    """Linear layers as convs: a frozen one keeps nothing, one that trains what it was given was made of."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = block.last(F.gelu(block.first(x.flatten(2).transpose(1, 2))))
        return x + y.transpose(1, 2).reshape(x.shape)

    parts = {"first": nn.Linear(CHANNELS, 12), "last": nn.Linear(12, CHANNELS)}
    frozen = chosen(forward, **parts)
    assert kept_maps(frozen) == [((2, 64, 12), WIDE)]
    assert_unchanged(frozen)
    training = chosen(forward, "stem.bias", "body.last", **parts)
    assert count(training, linear_behind) == 1 and kept_maps(training) == [((2, 64, 12), WIDE)]
    assert_unchanged(training)


def test_nothing_is_kept_below_the_first_tensor_that_trains() -> None:
    body = {"conv": conv(), "norm": nn.BatchNorm2d(CHANNELS)}
    program = chosen(lambda b, x: F.gelu(b.norm(F.relu(b.conv(x)))), "fc", **body)
    x = pictures(program.model).detach()
    own = [*program.model.parameters(), *program.own.buffers()]
    assert saved(running(program), x, own) == [((2, CHANNELS), WIDE)]
    assert not count(program, frozen_conv2d, relu_bits, conv2d_behind)
    assert_unchanged(program, x)


def test_a_weight_from_the_picture_is_left_to_autograd() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, block.weight * x.mean(), padding=1) + F.linear(x, block.matrix * x.mean())

    parts = {"weight": vector(CHANNELS, CHANNELS, 3, 3), "matrix": vector(8, 8)}
    program = chosen(forward, "stem", **parts)
    # the classifier and the stem are the only layers that have another form
    assert (count(program, F.conv2d), count(program, F.linear)) == (1, 1)
    assert_unchanged(program)


def test_a_conv_whose_padding_is_a_word_is_left_to_autograd() -> None:
    parts = {"weight": vector(CHANNELS, CHANNELS, 3, 3)}
    program = chosen(lambda block, x: x + F.conv2d(x, block.weight, padding="same"), "stem", **parts)
    assert count(program, F.conv2d) == 1
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("reader", "shared"),
    [
        (lambda b, y: b.frozen(y), False),
        (lambda b, y: F.max_pool2d(y, 1) + y, False),
        (lambda b, y: b.trains(y), True),
        (lambda b, y: b.trains(y.flatten(2).view(y.shape)), True),
        (lambda b, y: y * torch.sigmoid(b.frozen(y)), True),
        (lambda b, y: torch.softmax(y, 1), True),
        (lambda b, y: y * b.scale, True),
    ],
)
def test_a_relu_keeps_its_result_where_another_does(reader, shared: bool) -> None:  # type: ignore[no-untyped-def]
    parts = {"frozen": conv(1), "trains": conv(1), "scale": vector(CHANNELS, 1, 1)}
    program = chosen(lambda b, x: reader(b, F.relu(x)), "stem", "body.trains", "body.scale", **parts)
    assert (count(program, relu_result), count(program, relu_bits)) == ((1, 0) if shared else (0, 1))
    assert_unchanged(program)


def test_gates_of_other_shapes() -> None:
    """A gate for each place, or for each picture alone, is a product as before."""
    for gate in (lambda y: y.mean(1, keepdim=True), lambda y: y.mean((1, 2, 3), keepdim=True), lambda y: y.mean()):
        program = chosen(lambda b, x, gate=gate: (y := F.silu(x)) * torch.sigmoid(gate(y)))
        assert not count(program, mul_behind)
        assert_unchanged(program)


def test_a_learned_offset_behind_a_frozen_norm() -> None:
    """A difference to the bias of a batch norm that no conv takes up is a sum, which keeps no map."""
    program = build(adapted("dense", "bias"))
    assert "affine" in {getattr(item, "__name__", "") for item in called(program)}
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("trait", "scheme"),
    [
        ("plain", "conv-par"),
        ("depth-wise", "conv-seq"),
        ("hard-swish", "lora"),
        ("tokens", "bias"),
        ("grouped", "full"),
    ],
)
def test_the_same_results_on_bases(trait: str, scheme: str) -> None:
    assert_unchanged(build(adapted(trait, scheme, classes=5)))
