"""Sums and activations computed into memory that nobody needs: only there, and with the same results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadapt.frozen.functions.relu import relu_bits, relu_result
from cadapt.frozen.keeping import choose_kept
from cadapt.frozen.lowering import lower
from cadapt.frozen.overwriting import add_into, may_overwrite, overwrite_sums
from cadapt.frozen.prepare import build
from cadapt.frozen.program import Program
from tests.frozen.programs import adapted, assert_unchanged, count, measured, toy
from tests.frozen.toys import conv, framed

Forward = Callable[[nn.Module, Tensor], Tensor]


def test_the_sum_lies_in_the_first_one_s_memory_where_it_fits() -> None:
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected, place = first + second, first.data_ptr()
    assert torch.equal(result := add_into(first, second), expected)
    assert result.data_ptr() == place


@pytest.mark.parametrize(
    ("sink", "other"),
    [
        (torch.randn(2, 3, 1), torch.randn(2, 3, 4)),
        (torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4)),
        (torch.randn(2, 3, 4).requires_grad_(), torch.randn(2, 3, 4)),
    ],
)
def test_where_it_does_not_it_lies_elsewhere(sink: Tensor, other: Tensor) -> None:
    before = sink.detach().clone()
    result = add_into(sink, other)
    assert torch.equal(result, before + other)
    assert torch.equal(sink, before)
    assert result.dtype == torch.float32


def program_of(forward: Forward, *trainable: str, **parts: nn.Module) -> Program:
    parts = {"conv": conv(), "other": conv(), **parts}
    return measured(toy(framed(forward, **parts), *(trainable or ("stem",))), lower, choose_kept, overwrite_sums)


SUMS: dict[str, tuple[Forward, int]] = {
    "a shortcut": (lambda block, x: x + block.conv(x), 1),
    "two convs": (lambda block, x: block.conv(x) + block.other(x), 1),
    "a sum of sums": (lambda block, x: block.conv(x) + (block.other(x) + x), 2),
    "what is read again": (lambda block, x: (y := block.conv(x)) + F.relu(y), 0),
    "no conv": (lambda block, x: F.relu(x) + x, 0),
    "twice the same": (lambda block, x: (y := block.conv(x)) + y, 0),
    "a broadcast sum": (lambda block, x: block.conv(x).mean((2, 3), keepdim=True) + x, 0),
    "a narrow conv's": (lambda block, x: x + block.conv(x.mean((2, 3), keepdim=True)), 0),
    "a number": (lambda block, x: block.conv(x) + 1.0, 0),
    "a weighted sum": (lambda block, x: torch.add(x, block.conv(x), alpha=2), 0),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("trainable", [("stem",), ("body.conv",), ("fc",)])
def test_which_sums_are_computed_in_place(name: str, trainable: tuple[str, ...]) -> None:
    forward, expected = SUMS[name]
    program = program_of(forward, *trainable)
    found = count(program, add_into)
    # a conv that trains keeps what its own gradient asks for by other means, and its sum is left as it is
    assert found == expected if trainable != ("body.conv",) else found <= expected
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("forward", "in_place"),
    [
        (lambda block, x: F.relu(block.conv(x)), True),
        (lambda block, x: F.relu(block.conv(x) + x), True),
        (lambda block, x: (y := block.conv(x)) + F.relu(y), False),
        (lambda block, x: F.relu(F.gelu(x)), False),
        (lambda block, x: F.relu(block.conv(x).flatten(2)).view(x.shape), False),
    ],
)
def test_which_relus_are_computed_in_place(forward: Forward, in_place: bool) -> None:
    program = program_of(forward)
    (node,) = program.nodes(relu_bits, relu_result, F.relu)
    assert node.args[1] is in_place
    assert_unchanged(program)


def test_no_one_overwrites_the_pictures_or_weights() -> None:
    """A sum's memory may be the picture's own where it was handed on as it came."""
    program = program_of(lambda block, x: F.relu(x.contiguous()) + block.conv(x))
    pictures = next(node for node in program.graph.nodes if node.op == "placeholder")
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert not any(may_overwrite(program, node) for node in (pictures, *weights))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    before = x.detach().clone()
    assert_unchanged(program, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("trait", ["overwriting", "straight", "plain"])
def test_bases_that_overwrite_themselves(trait: str) -> None:
    for training in (False, True):
        assert_unchanged(build(adapted(trait, "res-par", classes=5).train(training)))
