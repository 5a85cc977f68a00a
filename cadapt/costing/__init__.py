"""What a model costs: its parameters, multiply–accumulates and the bytes that training it keeps for backward.

Everything is counted on twins without data (:mod:`cadapt.meta`, :mod:`cadapt.costing.rehearsal`), so that any model is
counted in about a second and none is touched. ``cadapt.cost`` and the comparison of schemes are built on it, and the
forecast of a run's memory (:mod:`cadapt.costing.run_memory`).

Convention ``macs`` counts the multiply–accumulates of convolutions, linear layers, matrix products and attention, and
nothing else. ``paper`` is the counter of the Conv-Adapter paper (arXiv 2208.07463, table 10), which adds one for each
output of a convolution with a bias and of a ReLU (PReLU, ReLU6, ELU and leaky ReLU too), and two for each output of a
batch or group norm; it adds nothing for linear biases, GELU, SiLU, layer norms, scales and sums. It gives 4.12 G for
ResNet-50 BiT and 15.36 G for ConvNeXt-B at 224 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from cadapt.costing.advice import memory_notices
from cadapt.costing.operations import CONVENTIONS, Convention, count_macs
from cadapt.costing.rehearsal import check_shape
from cadapt.costing.run_memory import MemoryForecast, StepSetting, fitting_batch, forecast
from cadapt.costing.step import StepBytes, count_activations, measure_step
from cadapt.errors import UsageError, close_matches
from cadapt.meta import meta_copy

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Cost",
    "MemoryForecast",
    "StepBytes",
    "StepSetting",
    "cost",
    "count_activations",
    "fitting_batch",
    "forecast",
    "measure_step",
    "memory_notices",
]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs at one input size.

    ``macs`` are multiply–accumulates of one image's forward pass in eval mode, by ``convention``. ``activation_bytes``
    are what autograd keeps for backward from one forward pass in train mode over a batch of ``batch`` images, in the
    model's own precision on a CPU: the input where a layer needs it, and standardised copies of weights, but not
    parameters or buffers. It is 0 where ``training`` is false.
    """

    parameters: int
    trainable_parameters: int
    macs: int
    activation_bytes: int
    input_size: tuple[int, int, int]
    batch: int
    training: bool
    convention: Convention

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {**asdict(self), "input_size": list(self.input_size)}


def cost(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    batch: int = 1,
    training: bool = True,
    convention: Convention = "macs",
) -> Cost:
    """Count what a model costs, on a twin without data; the model itself is not run, moved or changed.

    ``convention`` is ``macs`` or ``paper``; the module's text says what each counts.

    What activation checkpointing keeps, and what a custom autograd function keeps without ``save_for_backward``,
    is not seen.

    Args:
        model: any module that maps images to a tensor or to tensors.
        input_size: channels, height and width of one image, in pixels.
        batch: images in a training step, for ``activation_bytes``.
        training: whether to count ``activation_bytes``.
        convention: how to count ``macs``.

    Raises:
        UsageError: the input size, the batch or the convention makes no sense.
        CadaptError: the forward pass fails, or needs values where a twin has only shapes; it names the operator.

    >>> cost(nn.Conv2d(3, 8, 3, bias=False), (3, 10, 10)).macs
    13824
    """
    if convention not in CONVENTIONS:
        raise UsageError(f"unknown counting convention '{convention}'", hint=close_matches(convention, CONVENTIONS))
    size = check_shape(input_size, batch)
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        activation_bytes=count_activations(model, size, batch=batch) if training else 0,
        macs=count_macs(meta_copy(model), size, convention),
        input_size=size,
        batch=batch,
        training=training,
        convention=convention,
    )
