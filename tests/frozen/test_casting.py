"""Frozen weights held in half precision, and constants computed once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cadapt.frozen import Memory, prepare
from cadapt.frozen.casting import cast_frozen_weights, evaluate_constants
from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.lowering import lower
from cadapt.frozen.prepare import build
from cadapt.frozen.program import OWN, Program
from cadapt.frozen.stretches import Stretch
from tests.frozen.programs import adapted, assert_unchanged, called, measured, pictures, results, running, saved, toy
from tests.frozen.toys import CHANNELS, conv, framed, vector


def held(program: Program) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(item.shape), item.dtype) for item in program.own.buffers()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_are_cast_and_learned_ones_are_not(dtype: torch.dtype) -> None:
    model = toy(
        framed(lambda block, x: block.last(F.relu(block.conv(x))), conv=conv(), last=conv()), "stem", "body.last"
    )
    program = build(model.float())
    cast_frozen_weights(program, dtype)
    program.settle()
    assert held(program) == [((8, 8, 3, 3), dtype), ((8,), dtype), ((5, 8), dtype), ((5,), dtype)]
    assert torch.equal(next(program.own.buffers()), model.body.conv.weight.to(dtype))
    assert {item.dtype for item in model.parameters()} == {torch.float32}


class _Casts(TorchDispatchMode):
    """The shapes of given tensors that are cast while it is on."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.places = {item.untyped_storage()._cdata for item in tensors}
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.places:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["fast", "low", "min"])
@pytest.mark.parametrize("trait", ["plain", "layer-scaled", "norm-free"])
def test_no_frozen_weight_is_cast_in_a_step(trait: str, memory: Memory) -> None:
    """Of layers outside stretches and of those within, which are handed theirs."""
    model = adapted(trait, "conv-par", classes=5).float()
    frozen = [item for item in model.parameters() if not item.requires_grad]
    prepared = prepare(model, memory=memory, precision="bf16")
    casts = _Casts([*frozen, *prepared.root.get_submodule(OWN).buffers()])
    with torch.autocast("cpu", torch.bfloat16), casts:
        prepared(pictures(model)).sum().backward()
    assert casts.shapes == []
    assert any(isinstance(module, Stretch) for module in prepared.modules()) or (trait, memory) != ("plain", "min")


@pytest.mark.parametrize("memory", ["fast", "low", "min"])
@pytest.mark.parametrize("trait", ["plain", "layer-scaled"])
def test_losses_and_gradients_under_autocast(trait: str, memory: Memory) -> None:
    """As near to fp32's as the plain path's under the same autocast, to a factor; bf16 has eight bits."""
    model = adapted(trait, "conv-par", classes=5).float()
    x = pictures(model, 3)
    exact = results(model, model, x)
    prepared = prepare(model, memory=memory, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = results(model, model, x), results(prepared, model, x)
    off = {name: [float((item[name].float() - exact[name]).norm()) for item in (plain, ours)] for name in exact}
    far = {name: pair for name, pair in off.items() if pair[1] > 2 * pair[0] + 0.02 * float(exact[name].norm())}
    assert far == {}


def test_a_weight_that_something_else_reads_in_a_stretch_keeps_its_precision() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = F.gelu(F.conv2d(x, block.weight, None, 1, 1))
        return F.gelu(block.conv(y * block.weight.view(-1)[:CHANNELS].view(-1, 1, 1)))

    model = toy(framed(forward, weight=vector(CHANNELS, CHANNELS, 3, 3), conv=conv()), "stem").float()
    prepared = prepare(model, memory="min", precision="bf16")
    assert any(isinstance(module, Stretch) for module in prepared.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(prepared(pictures(model))).all()


def test_constants_are_computed_once() -> None:
    """A table of biases looked up, and a sum of two frozen tensors; what depends on a trained one stays."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        table = block.table[block.places.view(-1)].view(8, 8).unsqueeze(0)
        frozen = torch.cat((block.first, block.second)) + 1.0
        return x + table + frozen.view(-1, 1, 1) + torch.exp(block.learned).view(-1, 1, 1)

    parts = {"table": vector(16), "first": vector(4), "second": vector(4), "learned": vector(CHANNELS)}
    base = framed(forward, **parts)
    base.body.register_buffer("places", torch.arange(64) % 16)
    program = measured(toy(base, "body.learned"), lower, evaluate_constants)
    names = [str(getattr(item, "__name__", item)) for item in called(program)]
    assert "cat" not in names and "getitem" not in names and names.count("exp") == 1
    assert sorted(tuple(item.shape) for item in program.own.buffers()) == [(1, 8, 8), (8, 1, 1)]
    assert_unchanged(program)


def test_windows_have_their_tables_ready() -> None:
    program = build(adapted("windowed", "conv-par"))
    left = [node for node in program.graph.nodes if "relative_position" in str(node.target)]
    assert left == []
    assert_unchanged(program)


def test_settling_forgets_what_is_no_longer_read() -> None:
    program = build(adapted("plain", "conv-par").float())
    before = len(held(program))
    weights = [node for node in program.nodes(frozen_conv2d)]
    program.settle()
    assert len(weights) <= len(held(program)) < before
    assert_unchanged(program, tolerance=1e-4)


def test_a_cast_weight_is_all_that_is_kept_of_a_frozen_conv() -> None:
    model = toy(framed(lambda block, x: block.conv(x), conv=conv()), "stem").float()
    program = build(model)
    cast_frozen_weights(program, torch.bfloat16)
    program.settle()
    own = [*model.parameters(), *program.own.buffers()]
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved(running(program), pictures(model), own)
    # the pictures and the stem's weight, which trains, both as they were multiplied
    assert sorted(kept) == [((2, 3, 8, 8), torch.bfloat16), ((8, 3, 3, 3), torch.bfloat16)]
