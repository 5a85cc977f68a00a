"""What ``cadapt insert`` shows: the plan before, the proof after."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.describe.adapters import kernel_of
from cadapt.plan import Insertion, Plan
from cadapt.report.console import amount, count, literal, new_table, number_of, percent, stderr_console
from cadapt.report.describe import shown_kernel
from cadapt.surgery import adapter_path
from cadapt.verify import InsertionCheck

_Item = TypeVar("_Item")
# more rows than this are read by nobody: equal adapters then share one
_MOST_ROWS = 24
_RIGHT_ALIGNED = ("number", "K", "stride", "parameters")


def show_plan(model: AdaptedModel) -> None:
    """Show what goes where, with the parameters of each adapter; where there are many, equal ones in a row."""
    plan = model.plan
    console = stderr_console()
    console.print(f"[bold]{literal(plan.scheme)}[/] on {literal(plan.base.name)} ({plan.base.source}), "
                  f"input {'×'.join(map(str, model.preprocessing.input_size))}")  # fmt: skip
    if plan.insertions:
        _show_rows(_adapter_rows(model), "adapters")
        console.print(f"settings: {literal(_settings(plan))}", style="dim")
    if plan.deltas:
        _show_rows(_difference_rows(model), "tensors")
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    share = trained / max(1, plan.base.parameters)
    console.print(
        f"{_what_is_added(plan)}, {count(trained)} trainable parameters ({percent(share)} of the backbone's "
        f"{count(plan.base.parameters)}{_own(model, trained)}), besides the head that training adds"
    )


def _settings(plan: Plan) -> str:
    """Each scheme's settings, the defaults too."""
    by_scheme = {item.scheme: item.config for item in plan.insertions}
    shown = {
        scheme: ", ".join(f"{key}={_plain(value)}" for key, value in config.items() if value is not None)
        for scheme, config in by_scheme.items()
    }
    several = len(shown) > 1
    return "; ".join(f"{scheme} {text}" if several else text for scheme, text in shown.items() if text) or "none"


def _plain(value: object) -> str:
    return (",".join(map(str, value)) or "by layer") if isinstance(value, list | tuple) else str(value)


def _what_is_added(plan: Plan) -> str:
    parts = [number_of(len(plan.insertions), "adapter")] if plan.insertions or not plan.deltas else []
    if plan.deltas:
        parts.append(f"differences to {number_of(len(plan.deltas), 'tensor')} of the base")
    return " and ".join(parts)


def _own(model: AdaptedModel, trained: int) -> str:
    if not model.plan.trainable:
        return ""
    adapters = sum(item.numel() for name, item in model.named_parameters() if name.startswith(f"{ADAPTERS}."))
    return f", {count(trained - adapters)} of the base's own"


def _show_rows(rows: Sequence[dict[str, str]], what: str) -> None:
    """Show rows as a table: without the columns that are empty throughout, and no more rows than a screen holds."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    table = new_table(*(f"{name}>" if name in _RIGHT_ALIGNED else name for name in columns))
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(literal(row[name]) for name in columns))
    console = stderr_console()
    console.print(table)
    if len(rows) > _MOST_ROWS:
        rest = sum(int(row["number"].removeprefix("×") or 1) for row in rows[_MOST_ROWS:])
        console.print(f"… and {rest} {what} more, of {len(rows) - _MOST_ROWS} kinds: --json lists all", style="dim")


def _adapter_rows(model: AdaptedModel) -> list[dict[str, str]]:
    """A row for each adapter, or where these are many, for each kind that stands at sites of like names."""
    plan = model.plan
    joined = "+" in plan.scheme
    found = [(item.site.name, _cells(model, item, joined=joined)) for item in plan.insertions]
    if len(found) <= _MOST_ROWS:
        return [{"site": name, **cells} for name, cells in found]
    groups = _grouped((_masked(name), tuple(cells.items()), (name, cells)) for name, cells in found)
    return [
        {"site": common_name([name for name, _ in group]), "number": f"×{len(group)}", **group[0][1]}
        for group in groups
    ]


def _cells(model: AdaptedModel, insertion: Insertion, *, joined: bool) -> dict[str, str]:
    """All of an adapter's row but its place; what only convolutions have is left empty for others."""
    site = insertion.site
    adapter = model.get_submodule(adapter_path(insertion))
    kernel = shown_kernel(kernel_of(adapter))
    return {
        "scheme": insertion.scheme if joined else "",
        "kind": site.kind,
        "form": insertion.form,
        "in": "×".join(map(str, site.in_shape)),
        "out": "×".join(map(str, site.out_shape)),
        "K": kernel,
        "stride": str(site.stride[0]) if kernel else "",
        # a scheme whose non-linearity is its own says so in its settings, or has none
        "σ": (insertion.config["activation"] or site.activation) if "activation" in insertion.config else "",
        "parameters": count(sum(item.numel() for item in adapter.parameters())),
    }


def _difference_rows(model: AdaptedModel) -> list[dict[str, str]]:
    """A row for each kind of layer and tensor that gets a learned difference."""
    tensors = []
    for name in model.plan.deltas:
        owner, _, leaf = name.rpartition(".")
        size = model.get_submodule(f"{ADAPTERS}.delta").get_parameter(name.replace(".", "__")).numel()
        tensors.append((f"{type(model.get_submodule(owner)).__name__}.{leaf}", "", (name, size)))
    return [
        {
            "tensor": kind,
            "number": f"×{len(group)}",
            "parameters": count(sum(size for _, size in group)),
            "names": group[0][0] if len(group) == 1 else f"{group[0][0]} … {group[-1][0]}",
        }
        for kind, group in zip(dict.fromkeys(kind for kind, _, _ in tensors), _grouped(tensors), strict=True)
    ]


def _grouped(items: Iterable[tuple[Hashable, Hashable, _Item]]) -> list[list[_Item]]:
    """Items of equal keys together, in the order in which the keys come first."""
    groups: dict[Hashable, list[_Item]] = {}
    for first, second, item in items:
        groups.setdefault((first, second), []).append(item)
    return list(groups.values())


def _masked(name: str) -> str:
    """A name without its items that are numbers: what sites of like names have in common."""
    return ".".join("*" if item.isdecimal() else item for item in name.split("."))


def common_name(names: Sequence[str]) -> str:
    """One pattern for names that differ in the same places.

    >>> common_name(["blocks.0.attn.qkv", "blocks.1.attn.qkv"]), common_name(["layer1.0.conv2"])
    ('blocks.*.attn.qkv', 'layer1.0.conv2')
    """
    items = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(item[0] if len(set(item)) == 1 else "*" for item in items)


def show_check(check: InsertionCheck, output: str, size: int) -> None:
    """Show that the adapted model was compared with the base, and what was written."""
    seen = "bit-identical to the base" if check.identical_on else f"up to {check.max_error:.3g} from the base's logits"
    if not check.reaches:
        stderr_console().print(
            "note: the base mutes these adapters: whatever they learn does not reach its outputs (timm starts the last "
            "norm of residual branches at zero; random weights keep it). Use real weights, or a res- scheme",
            style="yellow",
        )
    where = "stdout" if output == "-" else output
    stderr_console().print(
        f"checked on a random batch of {check.batch}: {seen}; bit-identical with the adapters off\n"
        f"wrote {literal(where)} ({amount(size)})"
    )
