"""The wide middle of MLPs and of adapters: not kept, computed again, and where it must stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadapt.frozen.expansions import recompute_bottlenecks, recompute_expansions
from cadapt.frozen.functions.norm import frozen_layer_norm
from cadapt.frozen.prepare import build
from cadapt.frozen.program import Program
from cadapt.frozen.stretches import Stretch
from tests.frozen.programs import adapted, assert_unchanged, pictures, running, saved, toy
from tests.frozen.toys import CHANNELS, conv, framed

Forward = Callable[[nn.Module, Tensor], Tensor]
WIDE = 4 * CHANNELS


def stretches(program: Program) -> list[Stretch]:
    return [module for module in program.own.children() if isinstance(module, Stretch)]


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def back(y: Tensor, x: Tensor) -> Tensor:
    return x + y.transpose(1, 2).reshape(x.shape)


def of_mlp(forward: Forward, *trainable: str, hidden: int = WIDE, **parts: nn.Module) -> Program:
    mlp = {"norm": nn.LayerNorm(CHANNELS), "first": nn.Linear(CHANNELS, hidden), "last": nn.Linear(hidden, CHANNELS)}
    program = build(toy(framed(forward, **{**mlp, **parts}), "stem", *trainable))
    recompute_expansions(program)
    return program


def kept(program: Program) -> list[tuple[int, ...]]:
    """The shapes of kept tensors that have a batch in front."""
    own = [*program.model.parameters(), *program.own.buffers()]
    return [shape for shape, _ in saved(running(program), pictures(program.model).detach(), own) if shape[0] == 2]


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    return back(block.last(F.gelu(block.first(block.norm(tokens(x))))), x)


def test_an_mlp_keeps_what_enters_its_norm() -> None:
    program = of_mlp(mlp)
    assert len(stretches(program)) == 1
    inside = [node.target for node in stretches(program)[0].body.graph.nodes]
    assert frozen_layer_norm in inside
    assert not [shape for shape in kept(program) if WIDE in shape]
    assert [shape for shape in kept(build(program.model)) if WIDE in shape]  # type: ignore[arg-type]
    assert_unchanged(program)


def test_an_inverted_bottleneck_of_convs() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return x + block.narrow(F.silu(block.deep(F.silu(block.wide(x)))))

    parts = {"wide": conv(1, outputs=WIDE), "deep": conv(3, WIDE, WIDE, groups=WIDE), "narrow": conv(1, WIDE)}
    program = of_mlp(forward, **parts)
    # the depth-wise layer does not widen: the map that it reads is not kept, the one that it gives is
    assert len(stretches(program)) == 1
    assert [shape for shape in kept(program) if WIDE in shape] == [(2, WIDE, 8, 8)]
    assert_unchanged(program)


STAYING: dict[str, tuple[Forward, tuple[str, ...], int]] = {
    "not wide": (mlp, (), CHANNELS + 4),
    "a first layer that trains": (mlp, ("body.first",), WIDE),
    "a last layer that trains": (mlp, ("body.last",), WIDE),
    "a hidden map that is read again": (
        lambda b, x: back(b.last(F.gelu(y := b.first(tokens(x)))) + y[:, :, :CHANNELS], x),
        (),
        WIDE,
    ),
    "a hidden map whose size is asked for": (
        lambda b, x: back(b.last(F.gelu(y := b.first(tokens(x)))) * y.shape[2], x),
        (),
        WIDE,
    ),
    "a result that is read by what may keep it": (
        lambda b, x: back(b.last((y := F.gelu(b.first(tokens(x)))) * torch.sigmoid(y)), x),
        (),
        WIDE,
    ),
    "a ReLU, which keeps a bit": (lambda b, x: back(b.last(F.relu(b.first(tokens(x)))), x), (), WIDE),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays(name: str) -> None:
    forward, trainable, hidden = STAYING[name]
    program = of_mlp(forward, *trainable, hidden=hidden)
    assert not stretches(program)
    assert_unchanged(program)


def test_below_the_first_tensor_that_trains_there_is_nothing_to_keep() -> None:
    parts = {"norm": nn.LayerNorm(CHANNELS), "first": nn.Linear(CHANNELS, WIDE), "last": nn.Linear(WIDE, CHANNELS)}
    program = build(toy(framed(mlp, **parts), "fc"))
    recompute_expansions(program)
    assert not stretches(program)
    assert_unchanged(program, pictures(program.model).detach())


def test_a_norm_that_others_read_is_not_in_the_stretch() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = block.norm(tokens(x))
        return back(block.last(F.gelu(block.first(y))) + y * y.shape[1], x)

    program = of_mlp(forward)
    (stretch,) = stretches(program)
    assert frozen_layer_norm not in [node.target for node in stretch.body.graph.nodes]
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("trait", "scheme"),
    [("layer-scaled", "conv-par"), ("tokens", "bias"), ("windowed", "convpass")],
)
def test_the_same_results(trait: str, scheme: str) -> None:
    program = build(adapted(trait, scheme, classes=5).train())
    recompute_expansions(program)
    recompute_bottlenecks(program)
    assert_unchanged(program)
    assert stretches(program)


@pytest.mark.parametrize("trait", ["plain", "layer-scaled"])
def test_an_adapter_keeps_its_input_alone(trait: str) -> None:
    """DW(x) and σ(DW(x)) are computed again from x, which DW's own gradient needs."""
    before, after = (build(adapted(trait, "conv-par")) for _ in range(2))
    recompute_bottlenecks(after)
    assert stretches(after)
    assert len(kept(after)) < len(kept(before))
    assert_unchanged(after)
