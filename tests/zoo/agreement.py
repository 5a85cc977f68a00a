"""One adapted real model beside its base and beside the same adapters hooked into the untraced base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cadapt.adapted import AdaptedModel, disabled
from cadapt.backbone import describe_model
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.surgery import adapter_path, operate
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.hooks import expected_paths, hooked
from tests.zoo.livened import cached_base, make_images, wake


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was seen. Errors are relative: to the largest logit, and to the largest entry of each gradient.

    ``identical`` says that with zero-initialised adapters all outputs are the base's bit for bit, in eval and train
    mode. ``effect`` is how far awake adapters move the logits, relative to the largest.
    """

    sites: int
    trainable: int
    formula: int
    sites_as_expected: bool
    identical: bool
    off_identical: bool
    eval_error: float
    train_error: float
    gradient_error: float
    weakest_gradient: float
    effect: float


def compare(name: str, scheme: str) -> Agreement:
    """Insert a scheme into a model, and compare with the base, then, awake, with hooks; a batch of 2."""
    architecture, base, images = ARCHITECTURES[name], cached_base(name), make_images(name, 2)
    model = _adapted(base, scheme, architecture.side)
    identical = torch.equal(_outputs(model, images), _outputs(base, images)) and torch.equal(
        _outputs(_train_mode(model), images), _outputs(_train_mode(copy.deepcopy(base)), images)
    )
    wake(model.adapters)
    model.eval()
    tensors = _adapter_tensors(model)
    reference = _with_trainable_classifier(hooked(architecture, base, scheme, tensors))
    pristine, expected, actual = (_outputs(item, images) for item in (base, reference, model))
    with disabled(model):
        off = torch.equal(_outputs(model, images), pristine)
    own, wanted = _train_step(model, images), _train_step(reference, images)
    gradients = _paired_gradients(model, reference, tensors)
    found = sorted((item.site.path, item.site.kind) for item in model.plan.insertions)
    return Agreement(
        sites=len(found),
        trainable=sum(item.numel() for item in model.parameters() if item.requires_grad),
        formula=sum(_formula(item) for item in tensors.values())
        + sum(p.numel() for p in _classifier(base).parameters()),
        sites_as_expected=found == sorted(expected_paths(architecture, base, scheme)),
        identical=identical,
        off_identical=off,
        eval_error=_relative(actual, expected),
        train_error=_relative(own, wanted),
        gradient_error=max(_relative(*pair) for pair in gradients.values()),
        weakest_gradient=min(float(pair[1].abs().max()) for pair in gradients.values()),
        effect=_relative(actual, pristine),
    )


def _adapted(base: nn.Module, scheme: str, side: int) -> AdaptedModel:
    """A base with the scheme's adapters and a trainable copy of its own classifier."""
    backbone = describe_model(base, side)
    surveyed = survey(backbone)
    plan = with_head(plan_insertions(backbone, scheme, surveyed=surveyed), backbone, None)
    return operate(backbone, plan, surveyed)


@torch.no_grad()
def _outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    result: torch.Tensor = model(images)
    return result


def _train_mode(model: nn.Module) -> nn.Module:
    """Train mode with the batch norms' statistics kept, as the default policy has it."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def _train_step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in train mode, after the gradients of a loss on them were left in the parameters."""
    _train_mode(model)
    torch.manual_seed(3)
    logits = model(images)
    functional.cross_entropy(logits, torch.tensor([1, 7])).backward()
    result: torch.Tensor = logits.detach()
    return result


def _adapter_tensors(model: AdaptedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the adapters' parameters by the site's path."""
    return {
        insertion.site.path: {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.get_submodule(adapter_path(insertion)).named_parameters()
        }
        for insertion in model.plan.insertions
    }


def _classifier(model: nn.Module) -> nn.Module:
    classifier: nn.Module = model.get_classifier()  # type: ignore[operator]
    return classifier


def _with_trainable_classifier(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    _classifier(model).requires_grad_(True)
    return model


def _paired_gradients(
    model: AdaptedModel, reference: nn.Module, tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every trainable tensor's gradient in the adapted model, and that by hooks."""
    pairs = {}
    for insertion in model.plan.insertions:
        adapter = dict(model.get_submodule(adapter_path(insertion)).named_parameters())
        wanted = tensors[insertion.site.path]
        assert adapter.keys() == wanted.keys(), insertion.site.path
        pairs |= {f"{insertion.site.path}:{key}": (adapter[key].grad, wanted[key].grad) for key in adapter}
    head = dict(model.get_submodule("adapters.head.classifier").named_parameters())
    pairs |= {f"head:{key}": (head[key].grad, item.grad) for key, item in _classifier(reference).named_parameters()}
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(pairs) == trainable, f"{trainable} trainable tensors, {len(pairs)} compared"
    missing = [key for key, pair in pairs.items() if pair[0] is None or pair[1] is None]
    assert not missing, f"no gradient: {missing}"
    return pairs  # type: ignore[return-value]


def _formula(tensors: Mapping[str, torch.Tensor]) -> int:
    """C_in·K² + w + w·C_out + 2·C_out, from METHODS' definition and the shapes of α and the first bias."""
    width, outputs = len(tensors["depthwise.bias"]), tensors["alpha"].numel()
    per_group, kernel = tensors["depthwise.weight"].shape[1], tensors["depthwise.weight"].shape[-1]
    return per_group * width * kernel**2 + width + width * outputs + 2 * outputs


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())
