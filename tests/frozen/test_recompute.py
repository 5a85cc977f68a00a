"""A stretch that is run twice: the same gradients, random numbers and casts, and nothing kept but what it reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadapt.frozen.functions.conv import frozen_conv2d
from cadapt.frozen.functions.recompute import recompute
from cadapt.frozen.functions.relu import relu_bits
from tests.frozen.comparing import assert_same, kept, map_of, whole


def stretch(x: Tensor, weight: Tensor) -> Tensor:
    return F.gelu(F.conv2d(F.silu(x), weight, padding=1))


def test_gradients_of_arguments_and_of_what_is_read_besides() -> None:
    x, weight, factor = map_of(2, 4, 6, 6), map_of(4, 4, 3, 3), map_of(1)

    def lean(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        product = weight * factor  # no leaf: its own history lies outside
        result = recompute(lambda x: stretch(x, product), (x,), (product,))
        assert isinstance(result, Tensor)
        return result

    assert_same(lean, lambda x, weight, factor: stretch(x, weight * factor), (x, weight, factor))
    assert torch.autograd.gradcheck(lean, (map_of(1, 4, 2, 2), weight, factor))


def test_keeps_what_it_reads() -> None:
    x, weight = map_of(2, 4, 6, 6), map_of(4, 4, 3, 3)
    seen = kept(lambda: recompute(lambda x: stretch(x, weight), (x,), (weight,)))
    assert seen == [((2, 4, 6, 6), torch.float64), ((4, 4, 3, 3), torch.float64)]
    assert not kept(lambda: recompute(lambda x: stretch(x, weight.detach()), (x.detach(),)))


def test_a_trained_parameter_behind_a_frozen_input() -> None:
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3).requires_grad_()
    assert_same(
        lambda weight: recompute(lambda x: stretch(x, weight), (x,), (weight,)),  # type: ignore[arg-type]
        lambda weight: stretch(x, weight),
        (weight,),
        1e-6,
    )


def several(x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    return torch.sin(x), count + 1, torch.cos(x).mean(), x.detach() * 2, x


def test_several_results_some_without_gradients() -> None:
    x, count = map_of(3, 4), torch.arange(3)
    ours, reference = recompute(several, (x, count)), several(x, count)
    assert isinstance(ours, tuple)
    assert not ours[1].requires_grad
    assert all(torch.equal(mine, other) for mine, other in zip(ours, reference, strict=True))
    (mine,) = torch.autograd.grad(ours[0].sum() * 2 + ours[3].sum() + ours[4].prod(), x, retain_graph=True)
    (other,) = torch.autograd.grad(reference[0].sum() * 2 + reference[4].prod(), x)
    assert torch.allclose(mine, other, atol=1e-12)
    (nothing,) = torch.autograd.grad(ours[3].sum(), x, allow_unused=True)
    assert nothing is None


@pytest.mark.parametrize("autocast", [False, True])
def test_random_numbers_and_casts_repeat(autocast: bool) -> None:
    x, weight = torch.randn(2, 4, 6, 6).requires_grad_(), torch.randn(4, 4, 3, 3).requires_grad_()

    def dropping(x: Tensor) -> Tensor:
        return F.dropout(F.conv2d(x, weight, padding=1), 0.5).float()

    results = []
    for function in (lambda x: recompute(dropping, (x,), (weight,), needs_rng=True), dropping):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        torch.manual_seed(4)
        before = torch.get_rng_state()
        results.append((y, *torch.autograd.grad(y.sum(), (x, weight))))
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


def test_lean_operations_inside() -> None:
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    settings = ((1, 1), (1, 1), (1, 1), 1)

    def inside(x: Tensor) -> Tensor:
        return relu_bits(frozen_conv2d(x, weight, None, *settings), inplace=True)

    assert_same(
        lambda x: recompute(inside, (x,)),  # type: ignore[arg-type]
        lambda x: F.relu(F.conv2d(x, weight, None, *settings)),
        (map_of(2, 4, 6, 6),),
    )


def test_errors_inside_leave_the_random_state_alone() -> None:
    x = map_of(3)
    calls = []

    def failing(x: Tensor) -> Tensor:
        calls.append(torch.rand(1))
        if len(calls) > 1:
            raise ValueError("the second time")
        return x * 2

    y = recompute(failing, (x,), needs_rng=True)
    assert isinstance(y, Tensor)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="second time"):
        y.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(calls[0], calls[1])


def test_compiled_and_on_meta() -> None:
    weight = map_of(4, 4, 3, 3)
    assert_same(
        whole(lambda x, weight: recompute(lambda x: stretch(x, weight), (x,), (weight,)) * 2),  # type: ignore[operator]
        lambda x, weight: stretch(x, weight) * 2,
        (map_of(2, 4, 6, 6), weight),
    )
    shadow = torch.empty(2, 4, 6, 6, device="meta", requires_grad=True)
    y = recompute(lambda x: F.dropout(torch.sin(x)), (shadow,), needs_rng=True)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert shadow.grad is not None and shadow.grad.shape == shadow.shape
