"""Whether adapters read and join where they should: an adapted model beside hooks on its untraced base.

Identity at insertion cannot tell: a zero adds nothing wherever it stands. Here awake adapters are called by forward
hooks on the base's own modules, by the path and call of their sites; the graph, the finder and the splicer have no part
in it. Sites that are no module call (a sum of convs, a trimmed attention branch, a dense layer's joint) cannot be
hooked; their adapters are silenced, and what is compared is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.plan import Insertion
from cadapt.surgery import adapter_path

# the same operations in the same order; a wrong tensor differs by as much as the adapters do
_MOST_OF_EFFECT = 1e-3


@dataclass
class _Calls:
    """One module's adapters by the call they are for, and the calls seen in this forward."""

    adapters: dict[int, tuple[Insertion, nn.Module]] = field(default_factory=dict)
    seen: int = 0
    given: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def compare_with_hooks(model: AdaptedModel, base: nn.Module, images: torch.Tensor) -> tuple[int, list[str]]:
    """How many adapters could be hooked, and what is wrong with them.

    Args:
        model: the adapted model in eval mode, its adapters awake; those that cannot be hooked are silent afterwards.
        base: its base in eval mode; it is left as it was.
        images: a batch.
    """
    hooked = _hookable(model, base, images)
    for insertion in model.plan.insertions:
        if insertion not in hooked:
            model.get_submodule(adapter_path(insertion)).get_parameter("alpha").zero_()
    if not hooked:
        return 0, []
    plain, seen = base(images), model(images)
    with _hooks(model, base, hooked):
        wanted = base(images)
    effect, difference = float((wanted - plain).abs().max()), float((seen - wanted).abs().max())
    if difference <= _MOST_OF_EFFECT * effect:
        return len(hooked), []
    return len(hooked), [f"hooks on the base differ by {difference:.2g}, where adapters do {effect:.2g}"]


def _hookable(model: AdaptedModel, base: nn.Module, images: torch.Tensor) -> list[Insertion]:
    """The insertions whose sites are calls of one module, from its first argument to its one output."""
    modules = dict(base.named_modules())
    shapes: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    handles = []

    def note(path: str, given: tuple[object, ...], output: object) -> None:
        call = counts.get(path, 0)
        counts[path] = call + 1
        if given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
            shapes[path, call] = tuple(given[0].shape[1:]), tuple(output.shape[1:])

    # a module that was traced through may do more than its site: RepVGG's sum of convs, before its activation
    called = {str(node.target) for node in model.base_graph.nodes if node.op == "call_module"}
    candidates = [
        item
        for item in model.plan.insertions
        if _is_module(item, modules) and (item.site.kind == "block" or item.site.path in called)
    ]
    for path in {item.site.path for item in candidates}:
        hook = modules[path].register_forward_hook
        handles.append(hook(lambda _, given, output, path=path: note(path, given, output)))
    base(images)
    for handle in handles:
        handle.remove()
    return [
        item
        for item in candidates
        if shapes.get((item.site.path, item.site.call)) == (item.site.in_shape, item.site.out_shape)
    ]


def _is_module(insertion: Insertion, modules: dict[str, nn.Module]) -> bool:
    site = insertion.site
    module = modules.get(site.path)
    whole = module is not None and type(module).__name__ == site.operator
    # a plain net's block is a conv with what follows it
    return whole and site.kind in ("conv", "downsample", "block") and not (site.kind == "block" and _is_leaf(module))


def _is_leaf(module: nn.Module | None) -> bool:
    return module is None or not any(True for _ in module.children())


@contextmanager
def _hooks(model: AdaptedModel, base: nn.Module, insertions: list[Insertion]) -> Iterator[None]:
    """While it is on, modules of the base add what their adapters give."""
    calls: dict[str, _Calls] = {}
    for insertion in insertions:
        adapter = model.get_submodule(adapter_path(insertion))
        calls.setdefault(insertion.site.path, _Calls()).adapters[insertion.site.call] = insertion, adapter

    def keep(state: _Calls, given: tuple[torch.Tensor, ...]) -> None:
        state.given.append(given[0].clone())

    def add(state: _Calls, output: torch.Tensor) -> torch.Tensor:
        given, call = state.given.pop(), state.seen
        state.seen += 1
        if call not in state.adapters:
            return output
        insertion, adapter = state.adapters[call]
        return output + adapter(given if insertion.form == "parallel" else output)

    handles = []
    for path, state in calls.items():
        module = base.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda _, given, state=state: keep(state, given)))
        handles.append(module.register_forward_hook(lambda _, given, output, state=state: add(state, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
