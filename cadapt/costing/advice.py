"""What a user is told of a run's memory before it starts: how much it will take, and what to do where it will not fit.

It is advice and nothing is refused: a forecast is an estimate, and systems swap, compress and free.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cadapt.costing.run_memory import MemoryForecast, StepSetting, fitting_batch, forecast
from cadapt.errors import CadaptError


def memory_notices(model: nn.Module, setting: StepSetting, *, beside: Sequence[nn.Module] = ()) -> tuple[str, ...]:
    """Return what to tell of the memory that training will take, a line each; arguments as ``forecast`` takes them.

    A model that cannot be counted is no reason not to train it: then that is what is told.
    """
    try:
        known = forecast(model, setting, beside=beside)
        fitting = fitting_batch(model, setting, known, beside=beside) if known.fits is False else known
    except CadaptError as error:
        return (f"the memory that this takes is unknown: {error.message}",)
    return (tell_memory(known, fitting),)


def tell_memory(known: MemoryForecast, fitting: MemoryForecast | None) -> str:
    """Return a line on a forecast; ``fitting`` is one that fits, or None where none is known to."""
    takes = f"{_size(known.total_bytes)} of memory on {known.device}"
    free = "" if known.free_bytes is None else f"{_size(known.free_bytes + known.resident_bytes)}"
    if known.fits is not False:
        kept = f"{_size(known.activation_bytes)} of it activations"
        return f"batches of {known.batch_size} take about {takes}, {kept}" + (f"; {free} are at hand" if free else "")
    line = f"batches of {known.batch_size} will hardly fit: they take about {takes}, where {free} are at hand"
    if fitting is None:
        return f"{line}, and no batch does: try a smaller model or image size"
    options = f"--batch-size {fitting.batch_size} --accumulate {fitting.accumulate}"
    return f"{line}; {options} takes {_size(fitting.total_bytes)}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
