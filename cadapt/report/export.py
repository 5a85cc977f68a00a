"""What ``cadapt export`` shows: what was written, and for ONNX how far onnxruntime is from torch, by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cadapt.report.console import amount, new_table, percent, printable, stderr_console

if TYPE_CHECKING:
    from cadapt.export import ExportReport
    from cadapt.jobs import Shipment


def show_shipped(shipped: Shipment, output: str) -> None:
    """Show what was written, after the checks it passed."""
    if shipped.report is not None:
        show_export(shipped.report)
    where = "stdout" if output == "-" else printable(output)
    stderr_console().print(f"wrote {where} ({amount(len(shipped.data))})", markup=False)


def show_export(report: ExportReport) -> None:
    """Show an export's checks, and what was rewritten to make the graph plain."""
    table = new_table("batch>", "optimisation", "largest error>", "relative>", "same class>")
    for check in report.checks:
        table.add_row(
            str(check.batch),
            check.optimisation,
            f"{check.max_abs_error:.2e}",
            f"{check.relative_error:.2e}",
            percent(check.argmax_agreement, 0),
        )
    console = stderr_console()
    console.print(f"opset {report.opset}, {report.nodes} nodes, against torch in onnxruntime:")
    console.print(table)
    for rule, places in report.rewrites.items():
        console.print(f"rewritten: {rule} in {places} places", markup=False)
