"""A training step in one situation, and how two of them differ: what the engine's sweep compares.

A situation is a batch, a size and a mode; a step gives the loss, the gradients and the bytes that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cadapt.adapted import AdaptedModel

_DIGIT = 2.0**-52


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A batch and a mode in which a step is taken; ``stepped``: behind one step of SGD."""

    title: str
    batch: int = 2
    more: int = 0
    training: bool = True
    stepped: bool = False


SITUATIONS = (
    Situation(title="train"),
    Situation(title="another batch", batch=3),
    Situation(title="another size", more=32),
    Situation(title="eval", training=False),
    Situation(title="second step", stepped=True),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step gave: loss, gradients by name, and the bytes autograd kept."""

    loss: float
    gradients: Mapping[str, torch.Tensor | None]
    kept_bytes: int


def take_step(model: AdaptedModel, run: nn.Module, situation: Situation, jitter: int = 0) -> Step:
    """One forward and backward pass of a model, through itself or what was prepared of it.

    Args:
        model: the model, whose gradients are taken.
        run: what maps pictures to its logits.
        situation: batch, size and mode.
        jitter: where it is not 0, seeds a change of each pixel by about the last digit of fp64.
    """
    channels, height, width = model.preprocessing.input_size
    shape = (situation.batch, channels, height + situation.more, width + situation.more)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    images = images.to(next(model.parameters()).dtype)
    if jitter:
        images *= 1 + _DIGIT * torch.randn(shape, generator=torch.Generator().manual_seed(jitter)).double()
    run.train(situation.training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    outputs, kept = count_kept(lambda: run(images), (model, run))
    logits = torch.cat([outputs] if isinstance(outputs, torch.Tensor) else list(outputs), 1)
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
    # no term cancels another, which would leave the loss to rounding
    loss = (logits * weights).square().sum()
    loss.backward()
    gradients = {
        key: None if item.grad is None else item.grad.double()
        for key, item in model.named_parameters()
        if item.requires_grad
    }
    reached = [key for key, item in model.named_parameters() if item.grad is not None and not item.requires_grad]
    assert not reached, f"gradients of frozen tensors: {reached[:3]}"
    return Step(loss=float(loss.detach()), gradients=gradients, kept_bytes=kept)


def count_kept(forward: Callable[[], Any], modules: tuple[nn.Module, ...]) -> tuple[Any, int]:
    """What a forward returns, and the bytes of the storages that autograd keeps, the modules' own left out."""
    own = {item.untyped_storage().data_ptr() for part in modules for item in (*part.parameters(), *part.buffers())}
    found: dict[int, int] = {}
    held = []  # so that no address is given out again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    return result, sum(count for address, count in found.items() if address not in own)


def differences(step: Step, plain: Step, tolerance: float, of_itself: float) -> tuple[float, list[str]]:
    """The worst error, of the loss or of a gradient relative to the largest of all, and what is wrong.

    Args:
        step: the step that is judged.
        plain: the one that is right.
        tolerance: of that error, and of the loss.
        of_itself: how many times the tolerance a gradient may be off, relative to its own largest element.
    """
    top = max(float(item.abs().max()) for item in plain.gradients.values() if item is not None)
    problems, errors = [], [abs(step.loss - plain.loss) / abs(plain.loss)]
    if not errors[0] <= tolerance:
        problems.append(f"loss {step.loss!r}, expected {plain.loss!r}")
    for key, wanted in plain.gradients.items():
        got = step.gradients[key]
        if got is None or wanted is None:
            given = wanted if got is None else got
            # none and zero are one to an optimizer without weight decay
            if given is not None and bool(given.any()):
                problems.append(f"{key}: {'no' if got is None else 'an unexpected'} gradient")
            continue
        error = float((got - wanted).abs().max())
        errors.append(error / top)
        own = max(float(wanted.abs().max()), 1e-6 * top)
        if not (error <= tolerance * top and error <= of_itself * tolerance * own):
            problems.append(f"{key}: off by {error / own:.0e} of itself, {error / top:.0e} of the largest")
    return max(errors), problems[:3] + [f"and {len(problems) - 3} more"] * (len(problems) > 3)
