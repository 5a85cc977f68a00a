"""The regression: it finds the map that made the data, streamed as at once, and says honestly when there is none."""

import pytest
import torch

from cadapt.merging.fitted.ridge import Moments, polish, share_explained


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_linear_map_is_found(groups: int) -> None:
    weight, bias = numbers(groups, 4, 6, seed=0), numbers(groups, 4, seed=1)
    x = numbers(groups, 300, 6, seed=2)
    t = x @ weight.transpose(1, 2) + bias[:, None]
    moments = Moments(groups, 6, 4)
    for part in range(0, 200, 50):
        moments.add(x[:, part : part + 50], t[:, part : part + 50])
    found = moments.solve(x[:, 200:], t[:, 200:])
    torch.testing.assert_close(found.weight, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.bias, bias, atol=1e-6, rtol=0)


def test_noise_is_not_explained_on_other_rows() -> None:
    x, t = numbers(1, 200, 40, seed=0), numbers(1, 200, 5, seed=1)
    moments = Moments(1, 40, 5)
    moments.add(x[:, :60], t[:, :60])
    found = moments.solve(x[:, 60:], t[:, 60:])
    left = t[0, 60:] - found.predict(x[:, 60:])[0]
    assert share_explained(t[0, 60:], left, centred=True) < 0.1


def test_dead_and_repeated_regressors_do_no_harm() -> None:
    x = numbers(1, 300, 4, seed=0)
    x = torch.cat([x, x[:, :, :2], torch.zeros(1, 300, 3, dtype=torch.float64)], dim=2)
    t = x[:, :, :4] @ numbers(1, 4, 2, seed=3)
    moments = Moments(1, 9, 2)
    moments.add(x[:, :200], t[:, :200])
    found = moments.solve(x[:, 200:], t[:, 200:])
    assert share_explained(t[0, 200:], (t - found.predict(x))[0, 200:], centred=True) > 0.999999
    assert bool(found.weight.isfinite().all())


def test_regressors_that_never_move_leave_the_mean() -> None:
    moments = Moments(1, 3, 2)
    x, t = torch.ones(1, 20, 3), numbers(1, 20, 2, seed=0)
    moments.add(x, t)
    found = moments.solve(x, t)
    torch.testing.assert_close(found.predict(x).mean(dim=1), t.mean(dim=1), atol=1e-6, rtol=0)


def test_share_explained() -> None:
    wanted = torch.tensor([[1.0], [3.0]])
    assert share_explained(wanted, torch.zeros(2, 1), centred=True) == 1
    assert share_explained(wanted, wanted - 2, centred=True) == 0
    assert share_explained(wanted, wanted, centred=False) == 0
    assert share_explained(torch.zeros(2, 1), torch.ones(2, 1), centred=False) == 0


def test_polishing_recovers_what_a_relu_hides() -> None:
    x, before = numbers(1, 2000, 5, seed=0), numbers(2000, 3, seed=1)
    weight = numbers(1, 3, 5, seed=2)
    wanted = (before + (x @ weight.transpose(1, 2))[0]).relu()
    missing = wanted - before.relu()
    moments = Moments(1, 5, 3)
    moments.add(x, (missing * (before > 0))[None])
    start = moments.solve(x, (missing * (before > 0))[None])

    def error(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return float(((before + (x @ weight.transpose(1, 2))[0] + bias[0]).relu() - wanted).square().mean())

    finer = polish(start, x, before, wanted, steps=60)
    assert error(finer.weight, finer.bias) < 0.02 * error(start.weight, start.bias)
    torch.testing.assert_close(finer.weight, weight, atol=0.1, rtol=0)
