"""Batch norms, layer scales and α folded into the layers before them, and where each must stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadapt.frozen.folding import fold_frozen_scales, fold_learned_scales, fold_norms
from cadapt.frozen.inline import inline_adapters
from cadapt.frozen.lowering import affine, lower
from cadapt.frozen.program import Program
from tests.frozen.programs import adapted, assert_unchanged, count, measured, pictures, running, saved, toy
from tests.frozen.toys import CHANNELS, Framed, conv, framed, vector

FOLDS = (inline_adapters, lower, fold_learned_scales, fold_norms, fold_frozen_scales)


def folded(base: nn.Module, *trainable: str) -> Program:
    return measured(toy(base, *trainable), *FOLDS)


@pytest.mark.parametrize(
    ("trait", "scheme"),
    [
        ("plain", "conv-par"),
        ("plain", "conv-seq"),
        ("plain", "res-par"),
        ("plain", "bias"),
        ("grouped", "conv-par"),
        ("same-padded", "lora"),
        ("layer-scaled", "conv-par"),
        ("norm-free", "conv-par"),
        ("re-parameterised", "res-seq"),
        ("second-input", "conv-par"),
        ("dense", "conv-par"),
        ("reused", "ssf"),
        ("windowed", "convpass"),
    ],
)
def test_the_same_results(trait: str, scheme: str) -> None:
    program = measured(adapted(trait, scheme, classes=5).train(), *FOLDS)
    # what was dropped at random stays as random: the two draw the same numbers in the same order
    assert_unchanged(program)


def test_a_norm_and_its_conv_are_one_conv() -> None:
    """(γ / √(σ² + ε)) ⊙ (w ∗ x) + β − μ γ / √(σ² + ε), held in one weight and one bias."""
    layer, norm = conv(bias=False), nn.BatchNorm2d(CHANNELS)
    program = folded(Framed(nn.Sequential(layer, norm)), "stem")
    assert not count(program, affine)
    _, node = program.nodes(F.conv2d)
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    assert torch.allclose(program.exact(node.args[1]), layer.weight * factor.view(-1, 1, 1, 1), rtol=1e-14)
    assert torch.allclose(program.exact(node.args[2]), norm.bias - norm.running_mean * factor, rtol=1e-13)
    assert_unchanged(program)


def test_a_norm_behind_a_joint_goes_into_base_and_adapter() -> None:
    program = measured(adapted("plain", "conv-par"), *FOLDS)
    assert not count(program, affine)
    # nor are maps multiplied by α: the weights are products now
    assert not any(node.meta["moving"] for node in program.nodes(torch.mul))
    program = measured(adapted("plain", "conv-par"), inline_adapters, lower)
    assert count(program, affine) and count(program, torch.mul)


def test_alpha_leaves_no_map_to_keep() -> None:
    """Its own gradient and PW's come of products of weights: what PW gives is not kept."""
    counts = {}
    for passes in ((inline_adapters, lower), FOLDS):
        program = measured(adapted("plain", "conv-par"), *passes)
        x = pictures(program.model, 3)
        maps = [shape for shape, _ in saved(running(program), x) if len(shape) == 4 and shape[0] == 3]
        counts[len(passes)] = len(maps)
    adapters = sum(node.op == "call_module" and "conv_par" in str(node.target) for node in program.model.graph.nodes)
    assert counts[2] - counts[len(FOLDS)] >= adapters


def test_layer_scales_go_into_the_last_layer_of_their_branch() -> None:
    program = measured(adapted("layer-scaled", "linear"), *FOLDS)
    assert not count(program, torch.mul)
    assert count(measured(adapted("layer-scaled", "linear"), lower), torch.mul)


def test_numbers_go_into_frozen_and_learned_layers() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return 0.5 * block.conv(x) + block.last(x) * block.gain

    parts = {"conv": conv(), "last": conv(), "gain": vector(1)}
    program = folded(framed(forward, **parts), "stem", "body.last")
    # in each step the learned weight and bias are multiplied, and no map
    assert [len(node.meta["tensor_meta"].shape) for node in program.nodes(torch.mul)] == [4, 1]
    assert not any(node.meta["moving"] for node in program.nodes(torch.mul))
    assert_unchanged(program)


def behind(forward, norm: nn.Module | None = None, **parts) -> Framed:  # type: ignore[no-untyped-def]
    return framed(forward, **{"conv": conv(), "norm": norm or nn.BatchNorm2d(CHANNELS), **parts})


STAYING = {
    "a conv that is read twice": lambda block, x: block.norm(y := block.conv(x)) + y,
    "an activation between": lambda block, x: block.norm(F.relu(block.conv(x))),
    "a dropout between": lambda block, x: block.norm(F.dropout(block.conv(x), 0.5, block.training)),
    "a sum with what is no layer": lambda block, x: block.norm(block.conv(x) + F.relu(x)),
    "a conv whose padding is a word": lambda block, x: block.norm(F.conv2d(x, block.conv.weight, padding="same")),
    "a concatenation": lambda block, x: block.norm(torch.cat((block.conv(x)[:, :4], x[:, :4]), 1)),
}


@pytest.mark.parametrize("name", STAYING)
@pytest.mark.parametrize("training", [False, True])
def test_norms_that_stay(name: str, training: bool) -> None:
    program = folded(behind(STAYING[name]).train(training), "stem")
    program.model.train(training)
    assert count(program, affine) == 1
    assert_unchanged(program)


def test_a_weighted_sum_keeps_its_norm() -> None:
    """The offset would be multiplied, too, in the second term."""

    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return block.norm(torch.add(block.conv(x), block.other(x), alpha=3))

    for trainable in ("stem", "body.conv", "body.other"):
        program = folded(behind(forward, other=conv(bias=False)), trainable)
        assert count(program, affine) == 1
        assert_unchanged(program)


def test_one_conv_before_two_norms_is_called_twice_and_folded_twice() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        return block.norm(block.conv(block.other(block.conv(x))))

    program = folded(behind(forward, other=nn.BatchNorm2d(CHANNELS)), "stem")
    assert not count(program, affine)
    assert_unchanged(program)


@pytest.mark.parametrize(
    ("trainable", "fits"), [(("body.alpha",), False), (("body.alpha", "body.conv"), True), (("body.conv",), True)]
)
def test_a_learned_factor_needs_a_learned_layer(trainable: tuple[str, ...], fits: bool) -> None:
    parts = {"conv": conv(1), "alpha": vector(1, CHANNELS, 1, 1)}
    program = folded(framed(lambda block, x: x + block.alpha * block.conv(x), **parts), *trainable)
    assert any(node.meta["moving"] for node in program.nodes(torch.mul)) is not fits
    assert_unchanged(program)


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (8,), (2, 1, 1, 1), (1, 8, 8, 1), (1, 8, 8, 8)])
@pytest.mark.parametrize("trainable", ["body.alpha", "body.conv"])
def test_factors_along_other_dimensions_stay(shape: tuple[int, ...], trainable: str) -> None:
    """Rows, columns, pictures and whole maps: as many as there are channels, and not one for each."""
    parts = {"conv": conv(), "alpha": vector(*shape)}
    program = folded(framed(lambda block, x: x + block.alpha * block.conv(x), **parts), "stem", trainable)
    assert sum(node.meta["moving"] for node in program.nodes(torch.mul)) == 1
    assert_unchanged(program)


def test_two_factors_of_one_layer_and_a_factor_of_the_picture() -> None:
    def forward(block: nn.Module, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
        return gate * (block.beta * (block.alpha * block.conv(x)))

    parts = {"conv": conv(), "alpha": vector(CHANNELS, 1, 1), "beta": vector(1, CHANNELS, 1, 1)}
    program = folded(framed(forward, **parts), "stem", "body.conv", "body.alpha")
    assert sum(node.meta["moving"] for node in program.nodes(torch.mul)) == 1
    assert_unchanged(program)
