"""What ``cadapt insert`` shows: the plan before, the proof after."""

from __future__ import annotations

from cadapt.adapted import ADAPTERS, AdaptedModel
from cadapt.describe.adapters import kernel_of
from cadapt.plan import Insertion
from cadapt.report.console import amount, count, literal, new_table, percent, stderr_console
from cadapt.report.describe import shown_kernel
from cadapt.surgery import adapter_path
from cadapt.verify import InsertionCheck


def show_plan(model: AdaptedModel) -> None:
    """Show what goes where, with the parameters of each adapter."""
    plan = model.plan
    console = stderr_console()
    console.print(f"[bold]{literal(plan.scheme)}[/] on {literal(plan.base.name)} ({plan.base.source}), "
                  f"input {'×'.join(map(str, model.preprocessing.input_size))}")  # fmt: skip
    if plan.insertions:
        table = new_table("site", "kind", "form", "in", "out", "K>", "stride>", "σ", "parameters>")
        for insertion in plan.insertions:
            table.add_row(*_row(model, insertion))
        console.print(table)
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    share = trained / max(1, plan.base.parameters)
    adapters = sum(item.numel() for name, item in model.named_parameters() if name.startswith(f"{ADAPTERS}."))
    tuned = f", {count(trained - adapters)} of the base's own" if plan.trainable else ""
    console.print(
        f"{len(plan.insertions)} adapters, {count(trained)} trainable parameters ({percent(share)} of the backbone's "
        f"{count(plan.base.parameters)}{tuned}), besides the head that training adds"
    )


def _row(model: AdaptedModel, insertion: Insertion) -> tuple[str, ...]:
    site = insertion.site
    adapter = model.get_submodule(adapter_path(insertion))
    return (
        literal(site.name),
        site.kind,
        insertion.form,
        "×".join(map(str, site.in_shape)),
        "×".join(map(str, site.out_shape)),
        shown_kernel(kernel_of(adapter)),
        str(site.stride[0]),
        site.activation,
        count(sum(item.numel() for item in adapter.parameters())),
    )


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
