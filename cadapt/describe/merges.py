"""Which adapters of a plan would fold into the base, found by asking each scheme's own rule before anything is trained.

The base has no weights here, and a rule reads some: it is asked about stand-ins with made-up values, one for all sites
that differ in their widths only. What a merge is worth, ``merge-report`` measures on the trained adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from cadapt.adapters import Refusal, get_scheme
from cadapt.merging.folding import ask_fold
from cadapt.merging.sites import find_obstacle
from cadapt.meta import meta_copy
from cadapt.plan import Insertion, Plan
from cadapt.planning import Survey
from cadapt.seeding import seeded

# neither zero nor one, which would be special, nor negative, which no variance is
_VALUE = 0.5


@dataclass(frozen=True, kw_only=True)
class MergeReason:
    """Why a number of adapters do not fold into the base."""

    reason: str
    adapters: int


class MergeRules:
    """The merge rules of all schemes, asked about one base; what was found for a layer once is kept.

    Args:
        model: the base, with or without weights; it is left as it was.
        surveyed: its sites.
    """

    def __init__(self, model: nn.Module, surveyed: Survey) -> None:
        self._graph: fx.Graph = surveyed.graph
        self._modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._outputs = {(item.site.kind, item.site.path, item.site.call): item.output for item in surveyed.located}
        self._obstacles: dict[str, str | None] = {}
        self._stand_ins: dict[str, nn.Module] = {}

    def ask(self, plan: Plan) -> tuple[str | None, ...]:
        """For each adapter of a plan None where it would fold into the base, else the reason why not.

        Of sites that differ in their widths only one is asked about, the one with the fewest weights: a reason that
        names a number names that one's.
        """
        alike: dict[Hashable, list[Insertion]] = {}
        for insertion in plan.insertions:
            alike.setdefault(self._likeness(insertion), []).append(insertion)
        rules = {key: self._ask_rule(min(group, key=self._weights)) for key, group in alike.items()}
        staying: set[fx.Node] = set()
        reasons = []
        for insertion in plan.insertions:
            site = insertion.site
            output = self._outputs[site.kind, site.path, site.call]
            reason = self._obstacle(site.path) or rules[self._likeness(insertion)]
            if output in staying:
                reason = "another adapter that joined here before it stays"
            if reason is not None:
                staying.add(output)
            reasons.append(reason)
        return tuple(reasons)

    def _obstacle(self, path: str) -> str | None:
        if path not in self._obstacles:
            self._obstacles[path] = find_obstacle(path, self._modules, self._graph)
        return self._obstacles[path]

    def _likeness(self, insertion: Insertion) -> Hashable:
        """All that a rule may look at but the widths and the grid."""
        site, layer = insertion.site, self._modules.get(insertion.site.path)
        return (
            (insertion.scheme, insertion.form, insertion.settings),
            (site.kind, site.layout, site.operator, site.activation, site.prefix_tokens > 0),
            (site.kernel, site.stride, site.padding, site.dilation, _grouping(site.groups, site.in_channels)),
            (site.in_channels == site.out_channels, site.in_shape == site.out_shape),
            () if layer is None else tuple(map(type, layer.modules())),
            getattr(layer, "padding_mode", None),
            getattr(layer, "bias", None) is None,
        )

    def _weights(self, insertion: Insertion) -> int:
        layer = self._modules.get(insertion.site.path)
        return 0 if layer is None else sum(item.numel() for item in layer.parameters())

    def _ask_rule(self, insertion: Insertion) -> str | None:
        method = get_scheme(insertion.scheme)
        with seeded(0):
            adapter = method.build(insertion.site, insertion.form, method.configure(insertion.config))
        # adapters start at zero, and a rule may take a zero that training would not leave
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(_VALUE)
        outcome = ask_fold(insertion, adapter.eval(), self._stand_in(insertion.site.path))
        return outcome.reason if isinstance(outcome, Refusal) else None

    def _stand_in(self, path: str) -> nn.Module | None:
        if path not in self._modules:
            return None
        if path not in self._stand_ins:
            self._stand_ins[path] = _fill(meta_copy(self._modules[path])).eval()
        return self._stand_ins[path]


def _grouping(groups: int, channels: int) -> str:
    return "none" if groups == 1 else "each" if groups == channels else "some"


def _fill(twin: nn.Module) -> nn.Module:
    """Give every tensor of a twin one value throughout, which takes no memory however large the layer."""
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_constant(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _constant(buffer)
    return twin


def _constant(like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_VALUE if like.is_floating_point() else 0, dtype=like.dtype).expand(like.shape)


def count_reasons(reasons: Sequence[str | None]) -> tuple[MergeReason, ...]:
    """How many adapters each reason keeps from folding, in the order of the reasons.

    >>> count_reasons(["its ReLU is not linear", None, "its ReLU is not linear"])
    (MergeReason(reason='its ReLU is not linear', adapters=2),)
    """
    counts = Counter(reason for reason in reasons if reason is not None)
    return tuple(MergeReason(reason=reason, adapters=number) for reason, number in counts.items())
