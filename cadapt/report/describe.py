"""What ``cadapt inspect`` shows: a model and its schemes, an adapter file's header, a checkpoint, an ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cadapt.report.console import amount, count, literal, new_table, number_of, stderr_console
from cadapt.report.schemes import show_schemes
from cadapt.report.training_record import tell_training

if TYPE_CHECKING:
    from cadapt.bundle import Header
    from cadapt.describe.model import ModelSummary
    from cadapt.plan import Plan
    from cadapt.site import Site

_LONGEST = 1000
# every layer with weights is one: hundreds, and nothing is told of them but their place
_UNLISTED = "layer"


def show_model(summary: ModelSummary, *, sites: bool, only_schemes: bool = False) -> None:
    """Show stages and schemes, and with ``sites`` the places where adapters can join; or, of all this, the schemes."""
    console = stderr_console()
    size = "×".join(map(str, summary.input_size))
    console.print(
        f"[bold]{literal(summary.name)}[/]: {count(summary.parameters)} parameters, "
        f"{summary.macs / 1e9:.2f} GMAC at {size}"
    )
    if not only_schemes:
        _show_structure(summary)
    if sites:
        console.print(_site_table(summary))
        layers = sum(site.kind == _UNLISTED for site in summary.sites)
        if layers:
            console.print(f"and {number_of(layers, f'{_UNLISTED} site')}: --json lists them", style="dim")
    show_schemes(summary.schemes, summary.activation_batch)
    if not only_schemes:
        console.print(f"all schemes: cadapt inspect {literal(summary.name)} --schemes", style="dim")


def _show_structure(summary: ModelSummary) -> None:
    console = stderr_console()
    counts = Counter(site.kind for site in summary.sites)
    console.print("sites: " + (", ".join(f"{number} {kind}" for kind, number in counts.items()) or "none"))
    if summary.stages:
        table = new_table("stage", "path", "blocks>", "convs>", "gives")
        for stage in summary.stages:
            shape = "×".join(map(str, stage.out_shape))
            table.add_row(str(stage.index), literal(stage.path), str(stage.blocks), str(stage.convs), shape)
        console.print(table)


def _site_table(summary: ModelSummary) -> Any:
    columns = ("site", "kind", "in", "out", "layout", "K", "adapter's K")
    table = new_table(*columns, "stride>", "groups>", "σ", "stage>", "operator")
    for site in (site for site in summary.sites if site.kind != _UNLISTED):
        table.add_row(
            literal(site.name),
            site.kind,
            "×".join(map(str, site.in_shape)),
            "×".join(map(str, site.out_shape)),
            site.layout,
            shown_kernel(site.kernel),
            _adapter_kernels(summary, site),
            str(site.stride[0]),
            str(site.groups),
            site.activation,
            "" if site.stage is None else str(site.stage),
            site.operator,
        )
    return table


def shown_kernel(kernel: Sequence[int] | None) -> str:
    """A kernel as people write it: ``3×3``; nothing for None."""
    return "" if kernel is None else "×".join(map(str, kernel))


def _adapter_kernels(summary: ModelSummary, site: Site) -> str:
    """The kernels of the adapters that schemes put at a site: one where all agree, else which scheme has which."""
    schemes: dict[str, list[str]] = {}
    for scheme in summary.schemes:
        for adapter in scheme.adapters:
            # a stage may bear the name of its only block: what is adapted tells them apart
            if adapter.site == site.name and adapter.kind == site.kind:
                schemes.setdefault(shown_kernel(adapter.kernel), []).append(scheme.name)
    if len(schemes) == 1:
        return next(iter(schemes))
    return ", ".join(f"{kernel} {'/'.join(names)}" for kernel, names in schemes.items())


def show_header(header: Header, name: str) -> None:
    """Show everything an adapter file says about itself."""
    plan, console = header.plan, stderr_console()
    base = plan.base
    origin = base.checkpoint or (f"random weights, seed {base.seed}" if base.source == "random" else base.source)
    rows = {
        "scheme": plan.scheme + "".join(f" {key}={value}" for key, value in plan.settings.items()),
        "base": f"{base.name} ({origin}), {count(base.parameters)} parameters, SHA-256 {base.sha256[:16]}…",
        "adapters": f"{len(plan.insertions)}",
        **_changes(plan),
        "tensors": f"{len(header.tensors)}, {amount(sum(item.bytes for item in header.tensors.values()))}",
        "head": "none yet: cadapt train adds it"
        if plan.head is None
        else number_of(plan.head.num_classes, "class", "classes"),
        "classes": ", ".join(header.classes[:20]) + (" …" if len(header.classes) > 20 else "") or "none yet",
        "batch norm": plan.bn_policy,
        "input": "×".join(map(str, header.preprocessing.input_size))
        + f", mean {list(header.preprocessing.mean)}, std {list(header.preprocessing.std)}, "
        f"{header.preprocessing.interpolation}, crop {header.preprocessing.crop_pct:g}",
        "format": f"version {header.format_version}, written by cadapt {header.cadapt_version}",
        "size": amount(header.file_bytes),
    }
    console.print(f"[bold]{literal(name)}[/]: an adapter")
    table = new_table("", "")
    table.show_header = False
    for key, value in rows.items():
        table.add_row(key, literal(value))
    for key, value in tell_training(header.training).items():
        table.add_row(literal(key), literal(value))
    console.print(table)


def _changes(plan: Plan) -> dict[str, str]:
    """The tensors of the base that a plan changes, where it does."""
    found = {}
    if plan.deltas:
        found["differences"] = f"learned for {number_of(len(plan.deltas), 'tensor')} of the base"
    if plan.trainable:
        found["trained"] = f"{number_of(len(plan.trainable), 'tensor')} of the base's own"
    return found


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Show a record of simple facts, a line each."""
    console = stderr_console()
    console.print(f"[bold]{literal(title)}[/]")
    table = new_table("", "")
    table.show_header = False
    for key, value in facts.items():
        name = key.replace("_", " ")
        # a record within: what a file says of itself, under names of its own
        rows = (
            {f"{name}: {inner}": item for inner, item in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        for label, item in rows.items():
            shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
            table.add_row(literal(label), literal(shown[:_LONGEST] + ("…" if len(shown) > _LONGEST else "")))
    console.print(table)
