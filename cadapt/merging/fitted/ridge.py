"""Ridge least squares from streamed statistics: the kernel that gives most of Δ from what the hosts read.

In fp64, with an intercept: min ‖X Bᵀ + b − T‖² + λ tr(B Bᵀ), solved from XᵀX and XᵀT alone, group by group. λ and
the R² that is reported come from rows of other pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# of the mean square of a regressor, strongest first; the least keeps the solution finite where regressors repeat
_RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-8)

_ROUNDING = 1e-10


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Weights ``[groups, O, D]`` and intercept ``[groups, O]``, in fp64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def predict(self, rows: torch.Tensor) -> torch.Tensor:
        """T for rows ``[groups, N, D]``: ``[groups, N, O]``."""
        return rows.double() @ self.weight.transpose(1, 2) + self.bias[:, None]


class Moments:
    """Sums over rows: their number, ΣX, ΣT, XᵀX and XᵀT, per group."""

    def __init__(self, groups: int, regressors: int, outputs: int) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros((groups, *shape), dtype=torch.float64)

        self.rows = 0
        self.sum_x, self.sum_t = zeros(regressors), zeros(outputs)
        self.xx, self.xt = zeros(regressors, regressors), zeros(regressors, outputs)

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Take up rows ``[groups, N, D]`` and targets ``[groups, N, O]``."""
        x, t = x.double(), t.double()
        self.rows += x.shape[1]
        self.sum_x += x.sum(dim=1)
        self.sum_t += t.sum(dim=1)
        self.xx.baddbmm_(x.transpose(1, 2), x)
        self.xt.baddbmm_(x.transpose(1, 2), t)

    def solve(self, x: torch.Tensor, t: torch.Tensor) -> Solution:
        """The solution whose ridge does best on other rows ``[groups, N, D]`` and targets ``[groups, N, O]``."""
        mean_x, mean_t = self.sum_x / self.rows, self.sum_t / self.rows
        xx = self.xx / self.rows - mean_x[:, :, None] * mean_x[:, None, :]
        xt = self.xt / self.rows - mean_x[:, :, None] * mean_t[:, None, :]
        # what is left of sums that cancel is no variance
        noise = _ROUNDING * (self.xx / self.rows).diagonal(dim1=1, dim2=2).mean(dim=1)
        unit = xx.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(0) + noise + torch.finfo(torch.float64).tiny
        best: tuple[float, Solution] | None = None
        for ridge in _RIDGES:
            shifted = xx + torch.diag_embed((ridge * unit)[:, None].expand(-1, xx.shape[1]))
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if bool(failed.any()):
                continue
            weight = torch.cholesky_solve(xt, factor).transpose(1, 2)
            bias = mean_t - (weight @ mean_x[:, :, None])[:, :, 0]
            found = Solution(weight=weight, bias=bias)
            error = float((found.predict(x) - t.double()).square().sum())
            if best is not None and error >= best[0]:
                break  # from the strongest on, it does better up to one and then worse
            best = error, found
        if best is None:  # nothing moves: the mean is all there is
            return Solution(weight=torch.zeros_like(xt.transpose(1, 2)), bias=mean_t)
        return best[1]


def share_explained(wanted: torch.Tensor, left: torch.Tensor, *, centred: bool) -> float:
    """R²: 1 − ‖left‖²/‖wanted‖² for tensors ``[N, O]``, the wanted about its mean if ``centred``; 0 if it is zero."""
    wanted = wanted.double()
    whole = float((wanted - wanted.mean(dim=0) if centred else wanted).square().sum())
    return 1 - float(left.double().square().sum()) / whole if whole else 0.0


def polish(
    start: Solution, x: torch.Tensor, before: torch.Tensor, wanted: torch.Tensor, *, steps: int = 12
) -> Solution:
    """Bring relu(a + X Bᵀ + b) nearer to y, where the hosts end in front of a ReLU.

    Each step solves least squares for what is left where a unit is on, with the moments of all rows as the curvature:
    they are never less than those of the rows where it is on, so that no step goes too far.

    Args:
        start: the solution for the linear case, of one group.
        x: rows ``[1, N, D]``.
        before: a, ``[N, O]``.
        wanted: y, ``[N, O]``.
        steps: how many.
    """
    ones = torch.ones((x.shape[1], 1), dtype=torch.float64)
    design = torch.cat([x[0].double(), ones], dim=1)
    curvature = design.T @ design
    curvature.diagonal().add_(1e-4 * curvature.diagonal().mean())
    factor = torch.linalg.cholesky(curvature)
    beta = torch.cat([start.weight[0], start.bias[0][:, None]], dim=1)
    best, least = beta, float("inf")
    for _ in range(steps):
        inside = before.double() + design @ beta.T
        left = (inside.relu() - wanted.double()) * (inside > 0)
        error = float((inside.relu() - wanted.double()).square().sum())
        if error < least:
            best, least = beta, error
        beta = beta - torch.cholesky_solve(design.T @ left, factor).T
    return Solution(weight=best[None, :, :-1], bias=best[None, :, -1])
