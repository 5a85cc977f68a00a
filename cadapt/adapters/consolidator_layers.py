"""The modules of Consolidator: grouped branches as they train, and the sparse matrix that a file holds.

Both are the same map Σ_b G_b P_b x + Σ_b β_b. Which entries of its matrix can be non-zero follows from the groups and
the shuffle alone, so that a file needs values and no indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional

from cadapt.adapters.conv_geometry import Geometry
from cadapt.adapters.conv_reach import under_centre
from cadapt.site import Pair

DEFAULT_GROUPS = 384


def shared_groups(in_channels: int, out_channels: int) -> list[int]:
    """Every number of groups that inputs and outputs both divide into, largest first."""
    common = math.gcd(in_channels, out_channels)
    return [number for number in range(common, 0, -1) if common % number == 0]


def find_groups(in_channels: int, out_channels: int, given: Sequence[int]) -> tuple[int, ...]:
    """The given groups, or where there are none those of one branch: 384, or the nearest number below that divides."""
    fitting = shared_groups(in_channels, out_channels)
    return tuple(given) or (next(number for number in fitting if number <= DEFAULT_GROUPS),)


def columns_of(in_channels: int, out_channels: int, groups: int, shuffle: bool) -> torch.Tensor:
    """Which inputs each output of G P reads, ``[D, C/g]`` on the CPU, in the order of G's weights.

    Output o is of group k = o // (D/g), which reads Px at k·c … k·c + c − 1 for c = C/g. With the shuffle
    (Px)[i·g + a] = x[a·c + i]; without it P is the identity.
    """
    size = in_channels // groups
    # on the CPU even where a model is built without data: the number of values depends on them
    outputs = torch.arange(out_channels, device="cpu") // (out_channels // groups)
    places = outputs[:, None] * size + torch.arange(size, device="cpu")
    return (places % groups) * size + places // groups if shuffle else places


def pattern_of(in_channels: int, out_channels: int, groups: int, shuffle: bool) -> torch.Tensor:
    """Where the matrix of G P can be non-zero: booleans ``[D, C]`` on the CPU."""
    empty = torch.zeros(out_channels, in_channels, dtype=torch.bool, device="cpu")
    return empty.scatter(1, columns_of(in_channels, out_channels, groups, shuffle), True)


class Branch(nn.Module):
    """DropPath_p(G P x + β), one term of the sum of arXiv 2305.00603.

    Maps ``[…, C]`` to ``[…, D]``, or with a ``stride`` maps ``[B, C, H, W]`` to ``[B, D, H', W']`` as a 1×1 conv of
    that stride does. ``weight`` is ``[D, C/g]``: output o is of group o // (D/g), which reads C/g channels of Px.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, *, shuffle: bool, drop_path: float, stride: Pair | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels // groups))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.drop_path = DropPath(drop_path)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.shuffle, self.stride = groups, shuffle, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the term; shapes as the class says."""
        if self.stride is None:
            term = self._on_last(x)
        else:
            if self.shuffle:
                x = torch.unflatten(x, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
            kernel = self.weight[:, :, None, None]
            term = functional.conv2d(x, kernel, self.bias, stride=self.stride, groups=self.groups)
        dropped: torch.Tensor = self.drop_path(term)
        return dropped

    def _on_last(self, x: torch.Tensor) -> torch.Tensor:
        grouped = torch.unflatten(x, -1, (self.groups, -1))
        if self.shuffle:
            # laid out [g, c], x is x[a, i]; its transpose, read in order, is Px
            grouped = torch.unflatten(grouped.transpose(-1, -2).flatten(-2), -1, (self.groups, -1))
        weight = torch.unflatten(self.weight, 0, (self.groups, -1))
        term = torch.einsum("...gc,gdc->...gd", grouped, weight).flatten(-2)
        # in the term's dtype: under autocast an fp32 bias would drag all that follows the joint back to fp32
        return term + self.bias.to(term.dtype)

    def pattern(self) -> torch.Tensor:
        """Where its matrix can be non-zero; see :func:`pattern_of`."""
        return pattern_of(self.in_channels, self.out_channels, self.groups, self.shuffle)

    def columns(self) -> torch.Tensor:
        """Which inputs its weights meet; see :func:`columns_of`."""
        columns = columns_of(self.in_channels, self.out_channels, self.groups, self.shuffle)
        return columns.to(self.weight.device)

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """G P as one matrix ``[D, C]`` in fp64."""
        weight = self.weight.double()
        return weight.new_zeros(self.out_channels, self.in_channels).scatter(1, self.columns(), weight)


class Consolidator(nn.Module):
    """Σ_b DropPath_p(G_b P_b x + β_b), arXiv 2305.00603; shapes as :class:`Branch` says.

    Drop-path is drawn per sample, that is per entry of the first dimension, for each branch by itself. Where the base
    folds windows into the batch (Swin's qkv and proj), a sample is one window of one picture. ``geometry`` is that of a
    conv with a larger kernel, beside which the branches read what lies under its centre tap.
    Parameters: Σ_b D·C/g_b + D.
    """

    def __init__(self, branches: Iterable[Branch], *, geometry: Geometry | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.geometry = geometry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x)."""
        if self.geometry is not None:
            x = under_centre(x, self.geometry)
        first, *others = self.branches
        delta: torch.Tensor = first(x)
        for branch in others:
            delta = delta + branch(x)
        return delta

    @torch.no_grad()
    def summed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ G_b P_b ``[D, C]`` and Σ β_b ``[D]``, in fp64."""
        branches: Any = self.branches
        matrix, bias = branches[0].matrix(), branches[0].bias.double()
        for branch in branches[1:]:
            matrix, bias = matrix + branch.matrix(), bias + branch.bias.double()
        return matrix, bias


class StoredConsolidator(nn.Module):
    """The branches summed into one sparse matrix and one bias: DropPath_p(S x + β), shapes as :class:`Branch` says.

    ``values`` are the entries of S where at least one branch can be non-zero, row by row; where they lie is computed
    from the groups and is in no file. It evaluates at the cost of a dense layer until it is merged. Parameters: those
    entries + D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: Sequence[int],
        *,
        shuffle: bool,
        drop_path: float,
        stride: Pair | None,
        geometry: Geometry | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.shuffle, self.stride = tuple(groups), shuffle, stride
        self.geometry = geometry
        places = self._find_places()
        self.values = nn.Parameter(torch.zeros(len(places)))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.drop_path = DropPath(drop_path)
        # no buffer: a file would hold it
        self.places = places.to(self.values.device)

    def _find_places(self) -> torch.Tensor:
        union = torch.zeros(self.out_channels, self.in_channels, dtype=torch.bool, device="cpu")
        for number in self.groups:
            union |= pattern_of(self.in_channels, self.out_channels, number, self.shuffle)
        return union.flatten().nonzero().flatten()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredConsolidator:
        """Follow the parameters to another device; from the meta device there is nothing to copy."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.places.device != self.values.device:
            self.places = self._find_places().to(self.values.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ(x)."""
        if self.geometry is not None:
            x = under_centre(x, self.geometry)
        matrix = self._dense(self.values)
        if self.stride is None:
            delta = functional.linear(x, matrix, self.bias)
        else:
            delta = functional.conv2d(x, matrix[:, :, None, None], self.bias, stride=self.stride)
        dropped: torch.Tensor = self.drop_path(delta)
        return dropped

    def _dense(self, values: torch.Tensor) -> torch.Tensor:
        empty = values.new_zeros(self.out_channels * self.in_channels)
        return torch.unflatten(empty.index_copy(0, self.places, values), 0, (self.out_channels, self.in_channels))

    @torch.no_grad()
    def summed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """S ``[D, C]`` and β ``[D]``, in fp64."""
        return self._dense(self.values.double()), self.bias.double()

    @torch.no_grad()
    def fill(self, matrix: torch.Tensor, bias: torch.Tensor) -> None:
        """Take up a matrix ``[D, C]`` whose non-zeros lie within the pattern, and a bias ``[D]``, rounded once."""
        self.values.copy_(matrix.flatten()[self.places])
        self.bias.copy_(bias)
