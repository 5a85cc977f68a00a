"""Factors carried back into the layers before them: s ⊙ z + t by weights, along the right dimension, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadapt.frozen.lowering import lower
from cadapt.frozen.program import Program
from cadapt.frozen.scaling import Scaling, absorb, can_absorb, multiply
from tests.frozen.programs import EXACT, measured, pictures, running, toy
from tests.frozen.toys import CHANNELS, Block, conv, vector

Forward = Callable[[nn.Module, Tensor], Tensor]


def program_of(forward: Forward, *trainable: str, **parts: nn.Module | nn.Parameter) -> tuple[Program, fx.Node]:
    """A block's lowered program, and the node of its result."""
    program = measured(toy(Block(forward, **parts), *trainable, channels=CHANNELS), lower)
    (result,) = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
    return program, result


def scaled(program: Program, node: fx.Node, dim: int, width: int) -> tuple[Tensor, Tensor]:
    """A factor and an offset of the program's own, absorbed by a node; returns both."""
    scale, shift = torch.rand(width, dtype=torch.float64) + 0.5, torch.randn(width, dtype=torch.float64)
    absorb(program, node, Scaling(scale=program.hold(scale), shift=program.hold(shift), dim=dim))
    return scale, shift


def along(vector: Tensor, dim: int, rank: int) -> Tensor:
    return vector.reshape([-1 if index == dim else 1 for index in range(rank)])


def linear_last(block: nn.Module, x: Tensor) -> Tensor:
    return block.layer(x.permute(0, 2, 3, 1))


MAKERS: dict[str, tuple[Forward, dict[str, nn.Module], int]] = {
    "conv": (lambda block, x: block.layer(x), {"layer": conv()}, 1),
    "conv without a bias": (lambda block, x: block.layer(x), {"layer": conv(bias=False)}, 1),
    "grouped": (lambda block, x: block.layer(x), {"layer": conv(groups=4)}, 1),
    "depth-wise, wider": (lambda block, x: block.layer(x), {"layer": conv(outputs=16, groups=8)}, 1),
    "linear": (linear_last, {"layer": nn.Linear(CHANNELS, 6)}, 3),
    "linear without a bias": (linear_last, {"layer": nn.Linear(CHANNELS, 6, bias=False)}, 3),
    "permuted": (lambda block, x: block.layer(x).permute(0, 2, 3, 1), {"layer": conv()}, 3),
    "permuted linear": (
        lambda block, x: torch.permute(linear_last(block, x), (0, 3, 1, 2)),
        {"layer": nn.Linear(CHANNELS, 6)},
        1,
    ),
    "transposed": (lambda block, x: block.layer(x).transpose(1, -1).contiguous(), {"layer": conv()}, 3),
    "tokens": (lambda block, x: block.layer(x).flatten(2).transpose(1, 2), {"layer": conv()}, 2),
    "sum": (lambda block, x: block.layer(x) + block.other(x), {"layer": conv(), "other": conv(1)}, 1),
    "sum of three": (
        lambda block, x: block.layer(x) + (block.other(x) + block.third(x).contiguous()),
        {"layer": conv(), "other": conv(1), "third": conv(bias=False)},
        1,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("trains", [False, True])
def test_what_takes_a_factor_up_takes_it_exactly(name: str, trains: bool) -> None:
    forward, parts, dim = MAKERS[name]
    program, node = program_of(forward, *(["layer.weight"] if trains else []), **parts)
    assert can_absorb(program, node, dim, learned=False)
    model, x = program.model, pictures(program.model)
    expected = model(x)
    scale, shift = scaled(program, node, dim, expected.shape[dim])
    expected = expected * along(scale, dim, expected.dim()) + along(shift, dim, expected.dim())
    found = running(program)(x)
    assert torch.allclose(found, expected, rtol=0, atol=EXACT * float(expected.detach().abs().max()))
    wanted = [x, *(item for item in model.parameters() if item.requires_grad)]
    weights = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, wanted, weights), torch.autograd.grad(expected, wanted, weights), strict=True
    )
    assert all(torch.allclose(mine, other, rtol=0, atol=1e-12 * float(other.abs().max())) for mine, other in pairs)


@pytest.mark.parametrize("name", MAKERS)
def test_along_no_other_dimension(name: str) -> None:
    forward, parts, dim = MAKERS[name]
    program, node = program_of(forward, **parts)
    rank = 3 if name == "tokens" else 4
    assert [index for index in range(rank) if can_absorb(program, node, index, learned=False)] == [dim]


def test_a_frozen_layer_takes_no_learned_factor() -> None:
    """Its gradient would need that of the whole weight."""
    forward, parts, dim = MAKERS["sum"]
    for trainable, fits in [((), False), (("layer",), False), (("layer", "other"), True)]:
        program, node = program_of(forward, *trainable, **parts)
        assert can_absorb(program, node, dim, learned=True) is fits
        assert can_absorb(program, node, dim, learned=False)


def test_a_sum_s_offset_goes_to_one_term_and_that_is_the_frozen_one() -> None:
    forward, parts, dim = MAKERS["sum"]
    for trains, taker in [("layer", 1), ("other", 0)]:
        program, node = program_of(forward, trains, **parts)
        terms = list(node.args)
        scaled(program, node, dim, CHANNELS)
        biases = [term.args[2] for term in terms if isinstance(term, fx.Node)]
        constant = [program.is_constant(bias) for bias in biases]
        assert constant == [index == taker for index in range(2)]


REFUSED: dict[str, Forward] = {
    "read by another": lambda block, x: block.layer(x) + block.layer(x).mean() * 0 + (y := block.layer(x)) * y,
    "an activation": lambda block, x: F.relu(block.layer(x)),
    "dropout": lambda block, x: F.dropout(block.layer(x), 0.5, block.training),
    "a broadcast term": lambda block, x: block.layer(x) + block.layer(x).mean((2, 3), keepdim=True),
    "the picture in the sum": lambda block, x: block.layer(x) + x,
    "a number in the sum": lambda block, x: block.layer(x) + 1.0,
    "twice the same": lambda block, x: (y := block.layer(x)) + y,
    "a weighted sum": lambda block, x: torch.add(block.layer(x), block.other(x), alpha=2),
    "padding by a word": lambda block, x: F.conv2d(x, block.layer.weight, padding="same"),
    "a weight from the picture": lambda block, x: F.conv2d(x, block.layer.weight * x.mean(), padding=1),
    "mixed places": lambda block, x: block.layer(x).reshape(x.shape[0], -1, 4, 4),
    "all in one": lambda block, x: block.layer(x).flatten(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    program, node = program_of(REFUSED[name], layer=conv(), other=conv(1))
    assert not can_absorb(program, node, 1, learned=False)


def test_shapes_may_be_asked_of_what_is_scaled() -> None:
    """Who asks for a size alone is no reader."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        y = block.layer(x)
        return y.permute(0, 2, 3, 1) if y.dim() is None else y.reshape(y.shape[0], CHANNELS, -1).view(y.size())

    program, _ = program_of(forward, layer=conv())
    (node,) = program.nodes(F.conv2d)
    assert len(node.users) > 1 and can_absorb(program, node, 1, learned=False)


def test_frozen_products_are_rounded_once() -> None:
    """In the dtype of the model, after two products in fp64."""
    model = toy(Block(lambda block, x: block.layer(x), layer=conv()), channels=CHANNELS).float()
    program = measured(model, lower)
    (node,) = program.nodes(F.conv2d)
    weight = node.args[1]
    factors = [torch.rand(CHANNELS, dtype=torch.float64) + 0.5 for _ in range(2)]
    assert isinstance(weight, fx.Node)
    exact = model.layer.weight.double() * along(factors[0] * factors[1], 0, 4)
    for factor in factors:
        weight = multiply(program, weight, program.hold(factor), 4, before=node)
    assert program.value(weight).dtype == torch.float32
    assert torch.equal(program.value(weight), exact.float())
    assert torch.allclose(program.exact(weight), exact, rtol=1e-15)


def test_a_learned_factor_s_gradient_comes_through_the_weight() -> None:
    forward: Forward = lambda block, x: block.layer(x) * 1.0  # noqa: E731
    program, _ = program_of(forward, layer=conv(1), alpha=vector(CHANNELS))
    (node,) = program.nodes(F.conv2d)
    assert can_absorb(program, node, 1, learned=False) and not can_absorb(program, node, 1, learned=True)
