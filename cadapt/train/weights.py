"""The tensors a run changes: the trainable parameters, the buffers beside them, and the parameters' moving average.

Everything saved and restored goes through here. The frozen backbone, hundreds of times larger, is never copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cadapt.errors import RefusedError, UsageError


def tensor_file(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """Return a ``.safetensors`` file's bytes, with the record as JSON in its metadata, under ``training``."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"training": json.dumps(record)})


class Learnt:
    """The tensors of a model that training changes, captured and restored by name.

    These are the parameters that require a gradient, and the persistent buffers of modules that ``model.train()``
    puts into training mode: a frozen BatchNorm, which stays in evaluation mode, is left out. The model must be in
    training mode when this is made.

    Raises:
        UsageError: no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        if not self.parameters:
            raise UsageError("the model has nothing to train: no parameter requires a gradient")
        persistent = model.state_dict(keep_vars=True).keys()
        training = {name for name, module in model.named_modules() if module.training}
        self._buffers = [
            name for name, _ in model.named_buffers() if name in persistent and name.rpartition(".")[0] in training
        ]

    def capture(self) -> dict[str, Tensor]:
        """Return copies of the tensors on the CPU, by name."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`capture` returned back into the model.

        Raises:
            RefusedError: the model learns other tensors than the captured one did.
        """
        targets = self._tensors()
        for name in sorted(targets.keys() ^ tensors.keys()):
            where = "the model" if name in targets else "the saved run"
            raise RefusedError(f"the saved run is of another model: tensor '{name}' is only in {where}")
        for name, target in targets.items():
            saved, expected = tuple(tensors[name].shape), tuple(target.shape)
            if saved != expected:
                raise RefusedError(
                    f"the saved run is of another model: '{name}' has shape {saved}, expected {expected}"
                )
            target.copy_(tensors[name])

    def first_broken(self) -> str | None:
        """Return the name of a trainable tensor with a value that is not finite, if there is one."""
        for name, tensor in self.parameters.items():
            if not torch.isfinite(tensor).all():
                return name
        return None

    def _tensors(self) -> dict[str, Tensor]:
        # looked up each time: a module may replace its buffer rather than write into it
        return {**self.parameters, **{name: self._model.get_buffer(name) for name in self._buffers}}


class Average:
    """Exponential moving average of the trainable parameters, by timm's ``ModelEmaV3`` over just those.

    Args:
        parameters: the model's trainable parameters.
        decay: the largest decay; the first steps use less (``1 - (1 + step) ** (-2/3)``), so that short runs and
            adapters that start at zero are not held back by their initial values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters.values())
        # A ParameterList shares the parameters; ModelEmaV3 copies only what it is given.
        self._source = nn.ParameterList(self._parameters)
        self._average = ModelEmaV3(self._source, decay=decay, use_warmup=True)
        self._averaged = list(self._average.module.parameters())

    def update(self, steps_done: int) -> None:
        """Take in the parameters after ``steps_done`` optimizer steps."""
        self._average.update(self._source, step=steps_done)

    def state(self) -> list[Tensor]:
        """Return copies of the averages on the CPU, in the parameters' order."""
        return [tensor.detach().to("cpu", copy=True) for tensor in self._averaged]

    @torch.no_grad()
    def load_state(self, state: list[Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        for averaged, saved in zip(self._averaged, state, strict=True):
            averaged.copy_(saved)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold the averages; its own values come back at the end."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        with torch.no_grad():
            for parameter, averaged in zip(self._parameters, self._averaged, strict=True):
                parameter.copy_(averaged)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    parameter.copy_(value)
