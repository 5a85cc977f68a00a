"""How long exported models take in onnxruntime, compared in paired runs so that a shared machine's noise cancels.

Every turn times every model on the same input, in random order; what is reported is each model's time over the base's
in the same turn. Timing and statistics are apart: the latter can be judged on made-up numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from cadapt.merging.report import Latency
from cadapt.preprocessing import Preprocessing

BASE = "base"
SECONDS = 20.0
TURNS = 400


def compare_models(
    models: Mapping[str, nn.Module],
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = SECONDS,
    on_progress: Callable[[str], None] | None = None,
) -> Latency:
    """Export models to ONNX, each verified against torch, and measure them against each other.

    Args:
        models: by name; one of them ``base``, which the others are compared to. :func:`cadapt.merging.forms.forms_of`
            gives those of a merge.
        preprocessing: input size, means and deviations.
        classes: class names in the order of all models' outputs.
        batch_size: pictures at once.
        threads: of onnxruntime within an operator; None for as many as torch uses.
        seconds: the most to spend on measuring; the exports come on top.
        on_progress: called with a line of what is being done.

    Raises:
        UsageError: there is no ``base``, or a number is below 1.
        CadaptError: a package is missing, or a model cannot be exported.
    """
    raise NotImplementedError


def measure_latency(
    models: Mapping[str, bytes],
    *,
    input_size: tuple[int, int, int],
    batch_size: int = 1,
    turns: int = TURNS,
    threads: int | None = None,
    seconds: float = SECONDS,
) -> Latency:
    """Measure ONNX files against each other, by their bytes as :func:`cadapt.export.onnx_bytes` gives them."""
    raise NotImplementedError
