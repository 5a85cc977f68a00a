"""The training engine: an adapted model as a program that computes the same and keeps little for backward.

The program is in memory only. It reads the tensors that train from the model itself, so that an optimizer over the
model's parameters moves both, and nothing of it is in any file.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.errors import UsageError, close_matches
from cadapt.frozen.casting import cast_frozen_weights, evaluate_constants
from cadapt.frozen.expansions import recompute_bottlenecks, recompute_expansions
from cadapt.frozen.folding import fold_frozen_scales, fold_learned_scales, fold_norms
from cadapt.frozen.inline import inline_adapters
from cadapt.frozen.keeping import choose_kept
from cadapt.frozen.lowering import lower
from cadapt.frozen.overwriting import overwrite_sums
from cadapt.frozen.program import Program
from cadapt.frozen.segments import recompute_segments
from cadapt.graph.flatten import compile_graph

Memory = Literal["fast", "low", "min"]
MEMORIES: tuple[Memory, ...] = get_args(Memory)
# multiply–accumulates per kept byte below which memory, not arithmetic, takes a segment's time
_CHEAP = 10.0
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prepared(nn.Module):
    """A program to train by; made by :func:`prepare`.

    Maps pictures ``[B, C, H, W]`` to logits ``[B, classes]``, as the model it was made from does. Train and eval mode
    are the model's.
    """

    def __init__(self, program: Program, *, channels_last: bool) -> None:
        super().__init__()
        self.root = program.root
        self.channels_last = channels_last
        self._model = (program.model,)  # in a tuple: its modules are the root's
        self._run = compile_graph(program.root, program.graph)
        self.training = program.model.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        # what the model's own forward asks of its mode is asked of the root, whoever set the mode
        self.root.training = self._model[0].training
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self._run(self.root, x)

    def train(self, mode: bool = True) -> Prepared:
        """Set the model's mode, and with it the program's."""
        self._model[0].train(mode)
        self.training = mode
        return self


def prepare(
    model: nn.Module,
    *,
    memory: Memory = "low",
    precision: str = "fp32",
    channels_last: bool = True,
) -> Prepared:
    """Prepare an adapted model for training: the same loss and gradients, from less memory and time.

    Frozen batch norms, layer scales and computed weights are folded into frozen layers, frozen layers keep no input,
    and activations keep what their gradient needs. The frozen tensors' values are those of this moment. Train by
    calling the result; evaluate and save the model.

    Args:
        model: an adapted model, on the device and in the memory format it will train in.
        memory: ``fast`` computes nothing twice but activations; ``low`` computes also the wide middle of MLPs and
            thin segments again; ``min`` keeps only what enters segments, for about a third more time.
        precision: fp32, bf16 or fp16, what autocast will compute in; frozen weights are cast to it once.
        channels_last: bring pictures and frozen kernels to that memory format.

    Raises:
        UsageError: the model is no adapted one, or no such setting.
    """
    if not isinstance(model, AdaptedModel):
        raise UsageError(f"a {type(model).__name__} is no adapted model to prepare", hint="cadapt.insert makes one")
    if memory not in MEMORIES:
        raise UsageError(f"no memory setting '{memory}'", hint=close_matches(memory, MEMORIES))
    if precision not in ("fp32", *_HALVES):
        raise UsageError(f"no precision '{precision}'", hint=close_matches(precision, ("fp32", *_HALVES)))
    program = build(model)
    if memory == "low":
        recompute_segments(program, most_macs=_CHEAP)
    if memory != "fast":
        recompute_expansions(program)
        recompute_bottlenecks(program)
    if memory == "min":
        recompute_segments(program)
    if precision in _HALVES:
        cast_frozen_weights(program, _HALVES[precision])
    program.settle()
    if channels_last:
        _lay_out(program.own)
    return Prepared(program, channels_last=channels_last)


def build(model: AdaptedModel) -> Program:
    """Make a model's program and run the passes over it."""
    program = Program(model)
    inline_adapters(program)
    program.measure()
    lower(program)
    program.measure()
    fold_learned_scales(program)
    fold_norms(program)
    fold_frozen_scales(program)
    evaluate_constants(program)
    program.measure()
    choose_kept(program)
    overwrite_sums(program)
    return program


def _lay_out(own: nn.Module) -> None:
    for name, tensor in list(own.named_buffers()):
        if tensor.ndim == 4:
            setattr(own, name, tensor.contiguous(memory_format=torch.channels_last))
