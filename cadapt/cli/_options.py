"""Options that several commands share, named and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapter = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", metavar="FILE", help="The adapter file; - for stdin. Else a pipe, else adapter.safetensors."
    ),
]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write; - for stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="The base's weights: .safetensors, .pth or .bin."),
]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cuda:1, mps or cpu [the best there is].")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16 [bf16 on a GPU that has it].")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read pictures.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Drop unreadable pictures, counted, in place of stopping.")]
