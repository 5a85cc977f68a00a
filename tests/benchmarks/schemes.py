"""What a step keeps for backward under every scheme of cadapt, on every model: a table of bytes, with no timing.

Counted on real tensors of one and of two images, and extended in a straight line to the batch asked for: what a step
keeps is a part per step (standardised or cast weights) and a part per image, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import cadapt
from tests.benchmarks.case import Case, make_batches, make_model
from tests.benchmarks.contenders import CONTENDERS, Contender, Trained, make_runner_of, prepared
from tests.benchmarks.grid import count, release, report_failure
from tests.benchmarks.report import MEBIBYTE, group_by_case
from tests.benchmarks.unavailable import Unavailable

Row = dict[str, Any]


def count_schemes(case: Case) -> list[Row]:
    """Return a row for each scheme on a case: bytes of full fine-tuning, of the scheme, and of it with the engine.

    A scheme that does not fit the model has the ``reason`` for it; one that breaks is reported as in the other runs.
    """
    rows = []
    small = [replace(case, batch=images) for images in (1, 2)]
    model = make_model(small[0])
    full = _extended(CONTENDERS["full"], small, model, case.batch)
    for scheme in sorted(cadapt.SCHEMES):
        print(f"{case.model}, {scheme}", file=sys.stderr, flush=True)
        row: Row = {**case.to_json(), "scheme": scheme, "full_bytes": full}
        try:
            row["plain_bytes"] = _extended(_under(scheme, engine=False), small, model, case.batch)
            row["engine_bytes"] = _extended(_under(scheme, engine=True), small, model, case.batch)
        except (Unavailable, cadapt.CadaptError) as reason:
            row.update(status="unavailable", reason=str(reason))
        except Exception as error:
            row.update(status="failed", reason=report_failure(error))
        else:
            row["status"] = "ok"
        rows.append(row)
        release()
    return rows


def render_schemes(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table in MiB, one section for each model."""
    parts = []
    for case, by_scheme in group_by_case(rows, "scheme").items():
        of_model = list(by_scheme.values())
        first = of_model[0]
        lines = [
            f"## {case[0]}: kept for backward, batch {first['batch']}, {first['size']} px, {first['precision']}",
            "",
            f"Full fine-tuning keeps {first['full_bytes'] / MEBIBYTE:.1f} MiB. Extended from one and two images.",
            "",
            "| scheme | plain MiB | engine MiB | engine of plain | engine of full |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(_line(row) for row in of_model),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    plain, engine = row.get("plain_bytes"), row.get("engine_bytes")
    if plain is None:
        return f"| {row['scheme']} | {row['reason']} | | | |"
    if engine is None:
        return f"| {row['scheme']} | {plain / MEBIBYTE:.1f} | {row['reason']} | | |"
    shares = (f"1/{whole / engine:.1f}" if engine else "–" for whole in (plain, row["full_bytes"]))
    return f"| {row['scheme']} | {plain / MEBIBYTE:.1f} | {engine / MEBIBYTE:.1f} | {' | '.join(shares)} |"


def _extended(contender: Contender, cases: Sequence[Case], model: nn.Module, batch: int) -> int:
    """The bytes at ``batch`` images, from those at one and at two."""
    one, two = (_bytes(contender, case, model) for case in cases)
    return one + (batch - 1) * (two - one)


def _bytes(contender: Contender, case: Case, model: nn.Module) -> int:
    runner = make_runner_of(contender, case, model)
    images = make_batches(case, 1)[0]
    with torch.no_grad():
        runner.loss(*images)
    found: int = count(runner, images)["bytes"]
    return found


def _under(scheme: str, *, engine: bool) -> Contender:
    def build(model: nn.Module, case: Case) -> Trained:
        adapted = cadapt.insert(model.train(), scheme, img_size=case.size).train()
        adapted = adapted.to(memory_format=torch.channels_last)
        return prepared(adapted, precision=case.precision) if engine else Trained(model=adapted, forward=adapted)

    return Contender(name=scheme, what=scheme, build=build, channels_last=True)
