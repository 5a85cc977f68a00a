"""Stretches computed again in backward: what is kept then, the same random numbers, and where none may begin or end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

from cadapt.frozen.prepare import build
from cadapt.frozen.program import Program
from cadapt.frozen.segments import recompute_segments
from cadapt.frozen.stretches import Stretch
from tests.frozen.programs import adapted, assert_unchanged, measured, pictures, results, running, saved, toy
from tests.frozen.toys import CHANNELS, Block, Framed, conv, vector

Forward = Callable[[nn.Module, Tensor], Tensor]


def stretches(program: Program) -> list[Stretch]:
    return [module for module in program.own.children() if isinstance(module, Stretch)]


def of_blocks(forward: Forward, *trainable: str, training: bool = False, blocks: int = 3, **parts: object) -> Program:
    """The program of some equal blocks, recomputed; the stem and the classifier train besides."""
    body = nn.Sequential(*(Block(forward, **copy.deepcopy(parts)) for _ in range(blocks)))  # type: ignore[arg-type]
    model = toy(Framed(body), "stem", "fc", *trainable).train(training)
    program = build(model)
    recompute_segments(program)
    return program


def kept_bytes(program: Program) -> int:
    own = [*program.model.parameters(), *program.own.buffers()]
    kept = saved(running(program), pictures(program.model).detach(), own)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept)


def wide(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.last(F.gelu(block.middle(F.gelu(block.first(x)))))


@pytest.mark.parametrize(
    ("trait", "scheme"),
    [
        ("plain", "conv-par"),
        ("layer-scaled", "conv-par"),
        ("windowed", "lora"),
        ("tokens", "convpass"),
        ("grouped", "full"),
        ("norm-free", "res-seq"),
        ("dense", "conv-par"),
        ("second-input", "norm"),
        ("overwriting", "conv-par"),
        ("functional-dropout", "conv-par"),
    ],
)
def test_the_same_results(trait: str, scheme: str) -> None:
    program = build(adapted(trait, scheme, classes=5))
    recompute_segments(program)
    assert_unchanged(program)


def test_less_is_kept_and_each_stretch_keeps_what_it_reads() -> None:
    parts = {"first": conv(1), "middle": conv(1), "last": conv(1)}
    lean = of_blocks(wide, blocks=6, **parts)
    whole = build(lean.model)  # type: ignore[arg-type]
    assert stretches(lean) and not stretches(whole)
    assert kept_bytes(lean) < 0.6 * kept_bytes(whole)
    assert_unchanged(lean)


def test_no_segment_costs_more_arithmetic_than_is_allowed() -> None:
    program = build(adapted("plain", "conv-par"))
    recompute_segments(program, most_macs=0.0)
    costly = [node for item in stretches(program) for node in item.body.graph.nodes if "conv" in node.name]
    assert costly == []
    assert_unchanged(program)


def dropping(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.last(F.gelu(F.dropout(block.middle(F.gelu(block.drop(block.first(x)))), 0.5, block.training)))


def attending(block: nn.Module, x: Tensor) -> Tensor:
    tokens = F.gelu(block.tokens(x.flatten(2).transpose(1, 2)))
    y = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.5 if block.training else 0.0)
    return x + F.gelu(y).transpose(1, 2).reshape(x.shape)


def masking(block: nn.Module, x: Tensor) -> Tensor:
    y = F.gelu(block.first(x))
    return x + F.gelu(block.last(y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.5)))


def noisy(block: nn.Module, x: Tensor) -> Tensor:
    return x + F.gelu(block.first(F.gelu(x * torch.rand_like(x))))


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (dropping, {"first": conv(), "middle": conv(), "last": conv(), "drop": nn.Dropout2d(0.3)}),
        (dropping, {"first": conv(), "middle": conv(), "last": conv(), "drop": layers.DropPath(0.3)}),
        (attending, {"tokens": nn.Linear(CHANNELS, CHANNELS)}),
        (masking, {"first": conv(), "last": conv()}),
        (noisy, {"first": conv()}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_repeat(forward: Forward, parts: dict[str, nn.Module], training: bool) -> None:
    """Masks of the second run are the first one's: else gradients would be another model's."""
    program = of_blocks(forward, training=training, **parts)
    assert any(item.draws for item in stretches(program))
    assert_unchanged(program)


def test_states_are_kept_only_where_numbers_are_drawn() -> None:
    program = of_blocks(wide, first=conv(), middle=conv(), last=conv())
    assert stretches(program) and not any(item.draws for item in stretches(program))


def test_a_batch_counts_once() -> None:
    """Statistics of a norm that trains are moved by the first run alone; the second computes with the batch's own."""
    parts = {"conv": conv(), "norm": nn.BatchNorm2d(CHANNELS)}
    body = nn.Sequential(*(Block(lambda b, x: F.gelu(b.norm(F.gelu(b.conv(x)))), **parts) for _ in range(2)))
    model = toy(Framed(body), "stem", "body", "fc", bn_policy="train").train()
    program = build(model)
    recompute_segments(program)
    assert stretches(program)
    x, first = pictures(model), copy.deepcopy(model.state_dict())
    expected = results(model, model, x)
    plain = copy.deepcopy(model.state_dict())
    model.load_state_dict(first)
    found = results(running(program), model, x)
    assert all(torch.equal(item, plain[name]) for name, item in model.state_dict().items())
    assert not torch.equal(plain["body.0.norm.running_mean"], first["body.0.norm.running_mean"])
    off = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert all(value <= 1e-12 * max(1.0, float(expected[name].abs().max())) for name, value in off.items())


def test_a_learned_number_without_dimensions_and_a_mode_are_handed_in() -> None:
    """The one needs a gradient and the other is no tensor."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = F.dropout(F.gelu(block.first(x)), 0.5, block.training) * block.gain
        return x + F.gelu(block.last(F.silu(y)) * block.gain)

    parts = {"first": conv(), "last": conv(), "gain": nn.Parameter(torch.tensor(0.7))}
    for training in (False, True):
        program = of_blocks(forward, "body.0.gain", "body.2.gain", training=training, **parts)
        assert stretches(program)
        assert_unchanged(program)


def test_pieces_of_a_tensor_are_no_end() -> None:
    """All paths pass through the tuple of pieces; a gradient would not find its way back through it."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        first, second = block.first(F.gelu(x)).chunk(2, 1)
        return block.last(F.gelu(first) * torch.sigmoid(F.gelu(second)))

    parts = {"first": conv(outputs=16), "last": conv()}
    program = of_blocks(forward, **parts)
    assert stretches(program)
    assert_unchanged(program)


def test_sizes_that_are_asked_for_behind_a_stretch() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = block.first(F.gelu(x))
        z = F.gelu(block.last(F.gelu(y)))
        return F.gelu(z * y.shape[1]) + x * z.size(2)

    program = of_blocks(forward, first=conv(), last=conv())
    assert_unchanged(program)
    for batch, side in ((1, 8), (3, 12)):
        assert_unchanged(program, torch.randn(batch, 3, side, side, dtype=torch.float64).requires_grad_())


def overwriting_its_input(block: nn.Module, x: Tensor) -> Tensor:
    y = F.silu(x, inplace=True)
    return block.last(F.gelu(block.first(y))) + x


def overwriting_by_module(block: nn.Module, x: Tensor) -> Tensor:
    y = block.leaky(block.first(x) + x)
    return y + F.gelu(block.last(F.gelu(y)))


def overwriting_a_view(block: nn.Module, x: Tensor) -> Tensor:
    y = block.first(F.gelu(x))
    y[:, :4].mul_(2.0)
    return x + F.gelu(block.last(F.gelu(y)))


@pytest.mark.parametrize("forward", [overwriting_its_input, overwriting_by_module, overwriting_a_view])
def test_what_a_stretch_reads_is_not_overwritten_in_it(forward: Forward) -> None:
    """The second run would read what the first one wrote."""
    parts = {"first": conv(), "last": conv(), "leaky": nn.LeakyReLU(0.2, inplace=True)}
    for training in (False, True):
        program = of_blocks(forward, "body", training=training, **parts)
        assert_unchanged(program)
        assert_unchanged(program)


def test_stretches_between_overwriting_modules() -> None:
    parts = {"first": conv(), "last": conv(), "leaky": nn.LeakyReLU(0.2, inplace=True)}
    assert stretches(of_blocks(overwriting_by_module, **parts))


def test_modules_that_stay_calls_train_inside() -> None:
    """A learned activation and a hooked layer: their parameters' gradients come out of the stretch."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return x + F.gelu(block.learned(block.first(F.gelu(x * block.scale))))

    parts = {"first": conv(), "learned": nn.PReLU(CHANNELS), "scale": vector(CHANNELS, 1, 1)}
    program = of_blocks(forward, "body", **parts)
    assert any(item._parts[1] for item in stretches(program))
    assert_unchanged(program)


def test_without_a_gradient_a_stretch_just_runs() -> None:
    program = of_blocks(wide, first=conv(), middle=conv(), last=conv())
    x = pictures(program.model)
    with torch.no_grad():
        assert torch.allclose(running(program)(x), program.model(x), atol=1e-12)
    with torch.inference_mode():
        assert torch.allclose(running(program)(x), program.model(x), atol=1e-12)


def test_measured_again() -> None:
    """A program with stretches has shapes, too."""
    program = of_blocks(wide, first=conv(), middle=conv(), last=conv())
    program.measure()
    calls = [node for node in program.graph.nodes if isinstance(program.module(node), Stretch)]
    assert calls and all(node.meta["live"] and node.meta["tensor_meta"].shape for node in calls)
    assert measured(program.model).model is program.model  # type: ignore[arg-type]
