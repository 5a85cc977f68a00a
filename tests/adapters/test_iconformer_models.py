"""iConFormer on whole models against forward hooks on the untraced timm model: logits and all gradients.

In fp64, where a wrong term cannot hide behind the base's own rounding; the adapter alone is held to 1e-6 in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models import ResNet, SwinTransformer, VisionTransformer
from timm.models.resnet import BasicBlock
from torch import nn

import cadapt
from tests.adapters.iconformer_reference import reference
from tests.models import enliven, randomise

Delta = Callable[[torch.Tensor], torch.Tensor]
Hook = Callable[[nn.Module, str, Delta], None]
SIDE = 32


def vit() -> nn.Module:
    return VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, reg_tokens=2,
                             init_values=0.5, drop_path_rate=0.5, num_classes=5)  # fmt: skip


def swin() -> nn.Module:
    return SwinTransformer(img_size=SIDE, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4,
                           drop_path_rate=0.5, num_classes=5)  # fmt: skip


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 12, 16, 24), stem_width=8, num_classes=5)


def beside_vit_mlp(model: nn.Module, path: str, delta: Delta) -> None:
    """Δ of norm2's output, behind the layer scale ``ls2`` and before the drop-path."""
    block, kept = model.get_submodule(path.removesuffix(".mlp")), []
    block.norm2.register_forward_hook(lambda _, __, output: kept.append(output))
    block.ls2.register_forward_hook(lambda _, __, output: output + delta(kept.pop()))


def beside_module(model: nn.Module, path: str, delta: Delta) -> None:
    """Δ of what a module is given, added to what it gives."""
    module, kept = model.get_submodule(path), []
    module.register_forward_pre_hook(lambda _, given: kept.append(given[0].clone()))
    module.register_forward_hook(lambda _, __, output: output + delta(kept.pop()))


CASES = [
    pytest.param(
        vit,
        beside_vit_mlp,
        {f"blocks.{index}.mlp": {"layout": "NLC", "grid": (4, 4), "prefix": 3} for index in range(2)},
        id="vit-with-registers",
    ),
    pytest.param(
        swin,
        beside_module,
        {f"layers.{index}.blocks.0.mlp": {"layout": "NLC", "grid": (8 >> index, 8 >> index)} for index in range(2)},
        id="swin",
    ),
    pytest.param(
        resnet,
        beside_module,
        {
            f"layer{index}.0": {"layout": "NCHW", "stride": 1 if index == 1 else 2, "sigma": "relu", "normalise": True}
            for index in range(1, 5)
        },
        id="resnet",
    ),
]


def adapted_and_hooked(
    make: Callable[[], nn.Module], hook: Hook, places: dict[str, dict[str, Any]]
) -> tuple[cadapt.AdaptedModel, nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapted model, its untraced base with hooks, and the adapters' tensors of both by name."""
    torch.manual_seed(0)
    base = randomise(make()).double().eval()
    model = cadapt.insert(base, "iconformer", img_size=SIDE, r=6, s=0.5)
    group = model.adapters.get_submodule("iconformer")
    enliven(group)
    named = {item.site.path: cadapt.surgery.adapter_name(item.site) for item in model.plan.insertions}
    assert list(named) == list(places)
    hooked, tensors = copy.deepcopy(base), {}
    for path, settings in places.items():
        own = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in group.get_submodule(named[path]).named_parameters()
        }
        hook(hooked, path, partial(reference, tensors=own, s=0.5, **settings))
        tensors.update({f"{named[path]}.{name}": tensor for name, tensor in own.items()})
    return model, hooked, dict(group.named_parameters()), tensors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("make", "hook", "places"), CASES)
def test_a_model_computes_what_hooks_on_its_base_do(
    make: Callable[[], nn.Module], hook: Hook, places: dict[str, dict[str, Any]], training: bool
) -> None:
    model, hooked, ours, theirs = adapted_and_hooked(make, hook, places)
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for each in (model, hooked):
        each.train(training)
    for module in hooked.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    results = []
    for each, tensors in ((model, ours), (hooked, theirs)):
        torch.manual_seed(1)  # for the drop-paths
        pictures = images.clone().requires_grad_()
        logits = each(pictures)
        weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
        gradients = torch.autograd.grad((logits * weights).sum(), (pictures, *tensors.values()))
        results.append((logits.detach(), *gradients))
    assert ours.keys() == theirs.keys()
    for what, got, expected in zip(("logits", "pictures", *ours), *results, strict=True):
        assert float(expected.abs().max()) > 0, what
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= 1e-12, f"{what}: relative error {float(error):.2e}"
