"""The contenders of the benchmark: ways to train the same model, each taking the same kind of step.

A contender is a name, what it does to a fresh copy of the model, and the memory format that it trains in. All use the
same loss, precision and fused AdamW, so that none pays for a slow optimizer that another has not.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional

import cadapt
from tests.benchmarks.case import Case
from tests.benchmarks.lora_peft import add_lora
from tests.benchmarks.paper_adapter import add_paper_adapters
from tests.benchmarks.places import classifier_of, freeze_all_but_classifier
from tests.benchmarks.unavailable import Unavailable

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


@dataclass(kw_only=True)
class Trained:
    """A model ready to be trained: ``model`` holds the parameters, ``forward`` maps images to logits."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    note: str = ""
    # what else holds parameters or buffers of its own
    also: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train; ``build`` turns a model of its own into what is trained.

    ``twin`` names the contender that this one repeats in another memory format.
    """

    name: str
    what: str
    build: Callable[[nn.Module, Case], Trained]
    channels_last: bool = False
    compiled: bool = False
    twin: str | None = None


@dataclass(kw_only=True)
class Runner:
    """Takes the steps of one contender on one case."""

    contender: Contender
    case: Case
    trained: Trained
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step and return its loss; ``images`` are in the default memory format."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the smoothed cross-entropy, from a forward pass in the case's precision."""
        if self.contender.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            logits = self.trained.forward(images)
        return functional.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that holds parameters and buffers."""
        return (self.trained.model, *self.trained.also)


def make_runner(name: str, case: Case, model: nn.Module) -> Runner:
    """Build a contender by its name, as :func:`make_runner_of`."""
    return make_runner_of(CONTENDERS[name], case, model)


def make_runner_of(contender: Contender, case: Case, model: nn.Module) -> Runner:
    """Build a contender on a copy of ``model``.

    Raises:
        Unavailable: it cannot run there; the message says why.
    """
    own = copy.deepcopy(model)
    if contender.twin is not None and not _has_maps(own):
        raise Unavailable(f"a model of tokens has no maps to lay out: see '{contender.twin}'")
    if contender.channels_last:
        own = own.to(memory_format=torch.channels_last)
    # adapters draw their weights
    torch.manual_seed(0)
    trained = contender.build(own, case)
    if contender.channels_last:
        trained.model.to(memory_format=torch.channels_last)
    groups = param_groups_weight_decay(trained.model, WEIGHT_DECAY)
    groups = [group for group in groups if group["params"]]
    return Runner(
        contender=contender,
        case=case,
        trained=trained,
        optimizer=torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True),
    )


def _has_maps(model: nn.Module) -> bool:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def _full(model: nn.Module, case: Case) -> Trained:
    """All parameters, batch norms with batch statistics."""
    model.requires_grad_(True).train()
    return Trained(model=model, forward=model)


def _full_compiled(model: nn.Module, case: Case) -> Trained:
    trained = _full(model, case)
    trained.forward = torch.compile(model)
    return trained


def _linear(model: nn.Module, case: Case) -> Trained:
    """The classifier alone; nothing requires gradients before it, so autograd keeps nothing of the backbone."""
    freeze_all_but_classifier(model)
    model.eval()
    classifier_of(model).train()
    return Trained(model=model, forward=model)


def _paper(model: nn.Module, case: Case) -> Trained:
    add_paper_adapters(model, case.model)
    _train_with_frozen_norms(model)
    return Trained(model=model, forward=model)


def _lora(model: nn.Module, case: Case) -> Trained:
    adapted, note = add_lora(model, case.model)
    _train_with_frozen_norms(adapted)
    return Trained(model=adapted, forward=adapted, note=note)


def _cadapt(model: nn.Module, case: Case) -> nn.Module:
    adapted = cadapt.insert(model.train(), "conv-par", img_size=case.size).train()
    # as `cadapt train` lays models out, the adapters too
    return adapted.to(memory_format=torch.channels_last)


def _plain(model: nn.Module, case: Case) -> Trained:
    adapted = _cadapt(model, case)
    return Trained(model=adapted, forward=adapted)


def _engine(**options: Any) -> Callable[[nn.Module, Case], Trained]:
    def build(model: nn.Module, case: Case) -> Trained:
        return prepared(_cadapt(model, case), precision=case.precision, **options)

    return build


def _engine_compiled(model: nn.Module, case: Case) -> Trained:
    trained = prepared(_cadapt(model, case), precision=case.precision)
    trained.forward = torch.compile(trained.forward)
    return trained


def prepared(adapted: nn.Module, **options: Any) -> Trained:
    """Put cadapt's engine for frozen backbones around an adapted model.

    Raises:
        Unavailable: this tree has no such engine.
    """
    prepare = None
    if importlib.util.find_spec("cadapt.frozen") is not None:
        prepare = getattr(importlib.import_module("cadapt.frozen"), "prepare", None)
    if prepare is None:
        raise Unavailable("this tree has no cadapt.frozen.prepare")
    forward = prepare(adapted, **options)
    also = (forward,) if isinstance(forward, nn.Module) else ()
    return Trained(model=adapted, forward=forward, also=also)


def _train_with_frozen_norms(model: nn.Module) -> None:
    """Train mode, but frozen batch norms keep their statistics: the same function as cadapt's, and the cheaper one."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


_ALL = (
    Contender(name="full", what="full fine-tuning", build=_full),
    Contender(name="full-cl", what="full fine-tuning, channels_last", build=_full, channels_last=True, twin="full"),
    Contender(name="linear", what="linear probing", build=_linear),
    Contender(name="linear-cl", what="linear probing, channels_last", build=_linear, channels_last=True, twin="linear"),
    Contender(name="paper", what="the paper's conv-par", build=_paper),
    Contender(
        name="paper-cl", what="the paper's conv-par, channels_last", build=_paper, channels_last=True, twin="paper"
    ),
    Contender(name="lora", what="PEFT LoRA r=8", build=_lora),
    Contender(name="lora-cl", what="PEFT LoRA r=8, channels_last", build=_lora, channels_last=True, twin="lora"),
    Contender(name="plain", what="cadapt without the engine", build=_plain, channels_last=True),
    Contender(name="engine", what="cadapt with the engine", build=_engine(), channels_last=True),
    Contender(name="engine-fast", what="cadapt, engine, memory fast", build=_engine(memory="fast"), channels_last=True),
    Contender(
        name="engine-min", what="cadapt, engine, memory min", build=_engine(memory="min"), channels_last=True
    ),  # fmt: skip
    Contender(
        name="full-compile",
        what="full fine-tuning, compiled",
        build=_full_compiled,
        channels_last=True,
        compiled=True,
    ),
    Contender(
        name="engine-compile",
        what="cadapt, engine, compiled",
        build=_engine_compiled,
        channels_last=True,
        compiled=True,
    ),
)
CONTENDERS = {contender.name: contender for contender in _ALL}
