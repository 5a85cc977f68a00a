"""Which scheme meets which tiny base in the contract tests; schemes are discovered, so that new ones join unasked."""

from __future__ import annotations

import functools
from dataclasses import fields

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.adapters import SCHEMES, get_scheme
from cadapt.backbone import Backbone
from cadapt.errors import CadaptError
from cadapt.plan import Plan
from cadapt.planning import Survey, plan_insertions, with_head
from cadapt.surgery import operate
from tests.models import BASES, surveyed

ALL_CASES = [(trait, scheme) for trait in BASES for scheme in SCHEMES]

# schemes that add something from the start by their paper's own definition
NO_IDENTITY: frozenset[str] = frozenset()


def starts_as_identity(scheme: str) -> bool:
    """Whether a scheme promises that the model computes the base's outputs until it is trained."""
    defaults = {item.name: item.default for item in fields(get_scheme(scheme).config)}
    return scheme not in NO_IDENTITY and defaults.get("init", "zero") == "zero"


@functools.cache
def planned(trait: str, scheme: str) -> Plan | CadaptError:
    """The scheme's plan for a tiny base, or its refusal."""
    backbone, sites = surveyed(trait)
    try:
        return plan_insertions(backbone, scheme, seed=3, surveyed=sites)
    except CadaptError as refusal:
        return refusal


def first_fitting(scheme: str, traits: tuple[str, ...]) -> str:
    """The first of these bases that the scheme can adapt."""
    return next(trait for trait in (*traits, *BASES) if isinstance(planned(trait, scheme), Plan))


def adapt(trait: str, scheme: str, classes: int | None = None) -> tuple[Backbone, Survey, AdaptedModel]:
    """A tiny base, its sites, and the model adapted by a scheme that fits it, with a fresh head where asked."""
    backbone, sites = surveyed(trait)
    plan = planned(trait, scheme)
    assert isinstance(plan, Plan), plan
    if classes is not None:
        plan = with_head(plan, backbone, classes)
    return backbone, sites, operate(backbone, plan, sites)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model by name, as bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def train_mode(model: nn.Module, scheme: str) -> nn.Module:
    """Put a plain base in the mode that the scheme's batch-norm policy gives the adapted one."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and get_scheme(scheme).bn_policy == "frozen":
            module.training = False
    return model


def step(model: nn.Module, images: torch.Tensor, lr: float = 0.1) -> dict[str, torch.Tensor | None]:
    """Take one SGD step on a loss that reaches every logit, gradients clipped to norm 1; return them by name."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = torch.linspace(-1.0, 1.0, model(images).shape[1], dtype=images.dtype)
    (model(images) * weights).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in trainable.items()}
    # adapters with noise on dozens of layers can give logits in the hundreds: unclipped, the step would overflow
    norm = torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm()
    with torch.no_grad():
        for name, grad in grads.items():
            if grad is not None:
                trainable[name].sub_(lr / max(1.0, float(norm)) * grad)
    return grads
