"""One adapter's stand-in: what is to be added to the weights of its hosts so that the model can do without it.

The target is not Δ alone but all that is missing at the joint to what the unmerged model has there: what earlier folds
left wrong upstream is so made up for, as far as these layers can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from cadapt.adapted import AdaptedModel
from cadapt.merging.fitted.activity import Activity
from cadapt.merging.fitted.hosts import Host, Joint
from cadapt.merging.fitted.options import Batches
from cadapt.merging.fitted.ridge import Moments, Solution, polish, share_explained
from cadapt.merging.fitted.rows import Places, draw_places, grid_of, pick, rows_of
from cadapt.merging.fitted.watch import values_of, watch_values

_LEAST_ROWS, _MOST_ROWS, _ROWS_PER_REGRESSOR = 8192, 40_000, 4
_MOST_KEPT_ROWS = 12_000
# of the moments of several adapters
_BYTES_AT_ONCE = 3_000_000_000
_HELD_OUT = 4  # every fourth picture
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is added to one layer's weight and bias, in fp64."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An adapter on real pictures: the best stand-in, by the layer's path (empty without hosts), and the figures.

    ``r2`` is on held-out pictures, None without hosts; ``relative_size`` is ‖Δ‖/‖h‖; ``linear_share`` as
    :class:`Activity` says.
    """

    changes: dict[str, Change]
    r2: float | None
    relative_size: float
    linear_share: float | None


@torch.no_grad()
def measure(
    work: AdaptedModel,
    joints: Sequence[Joint],
    batches: Batches,
    pictures: int,
    unmerged: tuple[AdaptedModel, Sequence[Joint]] | None = None,
) -> Iterator[Measured]:
    """Measure adapters and fit their stand-ins, in one pass over the pictures where memory allows.

    Args:
        work: the model as it is by now, in fp32.
        joints: of the adapters.
        batches: the pictures; labels are not looked at.
        pictures: how many they are.
        unmerged: the model that the target is taken from and the same adapters' joints in it; None where nothing was
            folded yet.
    """
    for group in _grouped(joints):
        gauges = [_Gauge(work, joints[index], pictures) for index in group]
        for images, _ in batches:
            totals: dict[int, torch.Tensor] = {}
            if unmerged is not None:
                there = {unmerged[1][index].total: place for place, index in enumerate(group)}
                found = values_of(unmerged[0], there, images)
                totals = {place: found[node] for node, place in there.items()}
            with ExitStack() as stack:
                for gauge in gauges:
                    stack.enter_context(gauge.activity.watching())
                _run(work, gauges, images, totals)
        for gauge in gauges:
            yield gauge.result()


def _run(work: AdaptedModel, gauges: Sequence[_Gauge], images: torch.Tensor, totals: dict[int, torch.Tensor]) -> None:
    """Run a batch; each gauge takes its values as soon as they are there, and what nobody waits for is let go."""
    values: dict[fx.Node, torch.Tensor] = {}
    waiting = dict(enumerate(gauges))

    def take(node: fx.Node, value: torch.Tensor) -> None:
        values[node] = value
        for place in [place for place, gauge in waiting.items() if gauge.nodes <= values.keys()]:
            joint = gauges[place].joint
            total = totals.get(place)
            gauges[place].add(values, values[joint.output] + values[joint.delta] if total is None else total)
            del waiting[place]
        awaited = {node for gauge in waiting.values() for node in gauge.nodes}
        for done in values.keys() - awaited:
            del values[done]

    watch_values(work, {node for gauge in gauges for node in gauge.nodes}, images, take)


def _grouped(joints: Sequence[Joint]) -> Iterator[list[int]]:
    """The joints' indices in runs whose moments fit into memory at once."""
    group: list[int] = []
    held = 0
    for index, joint in enumerate(joints):
        regressors = sum(host.node.meta["host"].weight[0].numel() for host in joint.hosts)
        need = 8 * regressors**2 * (int(getattr(joint.hosts[0].node.meta["host"], "groups", 1)) if joint.hosts else 0)
        if group and held + need > _BYTES_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(index)
        held += need
    if group:
        yield group


class _Gauge:
    """The running sums of one adapter."""

    def __init__(self, work: AdaptedModel, joint: Joint, pictures: int) -> None:
        self.joint = joint
        self.activity = Activity(work.get_submodule(joint.path))
        self.layers: list[Any] = [work.get_submodule(host.path) for host in joint.hosts]
        self.channels_first = bool(self.layers) and isinstance(self.layers[0], nn.Conv2d)
        self.nodes = {joint.delta, joint.output, *(host.node.all_input_nodes[0] for host in joint.hosts)}
        if joint.before is not None:
            self.nodes.add(joint.before)
        self.delta = self.output = 0.0
        self.seen = 0
        self.generator = torch.Generator().manual_seed(0)
        self.fitted: list[tuple[torch.Tensor, ...]] = []
        self.held: list[tuple[torch.Tensor, ...]] = []
        if self.layers:
            self.groups = int(getattr(self.layers[0], "groups", 1))
            regressors = sum(layer.weight[0].numel() for layer in self.layers)
            outputs = self.layers[0].weight.shape[0]
            self.moments = Moments(self.groups, regressors, outputs // self.groups)
            wanted = min(max(_ROWS_PER_REGRESSOR * regressors, _LEAST_ROWS), _MOST_ROWS)
            if joint.before is not None:  # these rows are kept
                wanted = min(wanted, _MOST_KEPT_ROWS)
            self.per_picture = max(1, -(-wanted // max(1, pictures)))

    def add(self, values: dict[Any, torch.Tensor], total: torch.Tensor) -> None:
        """Take up a batch: the values of the work's nodes, and the reference's sum at the joint."""
        joint = self.joint
        output = values[joint.output]
        self.delta += float(values[joint.delta].square().sum(dtype=torch.float64))
        self.output += float(output.square().sum(dtype=torch.float64))
        if not self.layers:
            return
        wanted = self._in_host(total - output)
        is_held = (torch.arange(len(wanted)) + self.seen) % _HELD_OUT == _HELD_OUT - 1
        self.seen += len(wanted)
        for mask, keep in ((is_held, self.held), (~is_held, self.fitted)):
            if not bool(mask.any()):
                continue
            places = draw_places(
                grid_of(wanted[mask], channels_first=self.channels_first), self.per_picture, self.generator
            )
            places = Places(picture=mask.nonzero().flatten()[places.picture], where=places.where)
            sample = self._sample(values, total, wanted, places)
            if keep is self.held or joint.before is not None:
                keep.append(sample)
            if keep is self.fitted:
                self.moments.add(sample[0], self._split(self._target(sample)))

    def _in_host(self, value: torch.Tensor) -> torch.Tensor:
        """A value at the joint in the layout of the hosts' output."""
        for axes in self.joint.hosts[0].axes:
            value = value.permute(axes) if axes else value.flatten(1, 2)
        return value

    def _sample(
        self, values: dict[Any, torch.Tensor], total: torch.Tensor, wanted: torch.Tensor, places: Places
    ) -> tuple[torch.Tensor, ...]:
        """Rows ``[groups, N, D]``, what is missing ``[N, O]``, and with a ReLU what is before it and the sum behind."""
        rows = [
            rows_of(layer, values[host.node.all_input_nodes[0]], places)
            for host, layer in zip(self.joint.hosts, self.layers, strict=True)
        ]
        kept = [torch.cat(rows, dim=2), pick(wanted, places, channels_first=self.channels_first)]
        if self.joint.before is not None:
            kept += [
                pick(value, places, channels_first=self.channels_first) for value in (values[self.joint.before], total)
            ]
        return tuple(kept)

    def _target(self, sample: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the linear map is to give: behind a ReLU, nothing where the unit is off."""
        return sample[1] if len(sample) == 2 else sample[1] * (sample[2] > 0)

    def _split(self, target: torch.Tensor) -> torch.Tensor:
        return target.reshape(len(target), self.groups, -1).transpose(0, 1)

    def result(self) -> Measured:
        """Solve, and judge the solution on the held-out pictures."""
        size = math.sqrt(self.delta / self.output) if self.output else 0.0
        share = self.activity.linear_share()
        if not self.layers or not self.moments.rows:
            return Measured(changes={}, r2=None, relative_size=size, linear_share=share)
        held = _together(self.held)
        solution = self._masked(self.moments.solve(held[0], self._split(self._target(held))))
        error = self._left(solution, held)
        if self.joint.before is not None:
            rows, _, before, total = _together(self.fitted)
            finer = self._masked(polish(solution, rows, before, total))
            finer_error = self._left(finer, held)
            if float(finer_error.square().sum()) < float(error.square().sum()):
                solution, error = finer, finer_error
        changes = self._changes(solution)
        # no bias gives the mean of what is added behind a ReLU
        r2 = share_explained(held[1], error, centred=self.joint.before is None)
        return Measured(changes=changes, r2=r2, relative_size=size, linear_share=share)

    def _left(self, solution: Solution, sample: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What is still missing behind the joint, ``[N, O]``."""
        given = solution.predict(sample[0]).transpose(0, 1).flatten(1)
        if len(sample) == 2:
            return sample[1].double() - given
        return sample[3].double() - (sample[2].double() + given).relu()

    def _masked(self, solution: Solution) -> Solution:
        """Without what a channel that its host hardly reaches would have to give."""
        weight, start = solution.weight.clone(), 0
        outputs = weight.shape[1]
        for host, layer in zip(self.joint.hosts, self.layers, strict=True):
            end = start + layer.weight[0].numel()
            weight[:, :, start:end] *= _reached(host).reshape(self.groups, outputs, 1)
            start = end
        bias = solution.bias * _reached(self.joint.hosts[0]).reshape(self.groups, outputs)
        return Solution(weight=weight, bias=bias)

    def _changes(self, solution: Solution) -> dict[str, Change]:
        changes, start = {}, 0
        for index, (host, layer) in enumerate(zip(self.joint.hosts, self.layers, strict=True)):
            end = start + layer.weight[0].numel()
            divisor = torch.where(_reached(host), host.scale, 1.0)
            weight = solution.weight[:, :, start:end].flatten(0, 1) / divisor[:, None]
            bias = solution.bias.flatten() / divisor if index == 0 else torch.zeros_like(divisor)
            changes[host.path] = Change(weight=weight.reshape(layer.weight.shape), bias=bias)
            start = end
        return changes


def _reached(host: Host) -> torch.Tensor:
    return host.scale.abs() > _SMALLEST_SCALE * host.scale.abs().max()


def _together(samples: Iterable[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    rows, *others = zip(*samples, strict=True)
    return (torch.cat(rows, dim=1), *(torch.cat(items) for items in others))
