"""Convpass in ViT and Swin models, against hooks on the untraced models that write its formula out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.backbone import describe_model
from cadapt.errors import UsageError
from cadapt.export import onnx_bytes
from cadapt.planning import plan_insertions
from cadapt.site import Pair
from cadapt.surgery import operate
from tests.adapters.test_convpass import Tensors, bypass, relative
from tests.models import CLASSES, enliven, randomise


def vit(kind: type[VisionTransformer] = VisionTransformer, **settings: Any) -> nn.Module:
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return kind(**{**shape, **settings})


def swin(kind: type[nn.Module] = SwinTransformer, **settings: Any) -> nn.Module:
    shape = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
             "num_classes": CLASSES, "drop_path_rate": 0.0}  # fmt: skip
    return kind(**{**shape, **settings})


# a model, its prefix tokens
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "class-token": (vit, 1),
    "registers": (lambda: vit(reg_tokens=4), 5),
    "registers-alone": (lambda: vit(reg_tokens=4, class_token=False, global_pool="avg"), 4),
    "no-prefix": (lambda: vit(class_token=False, global_pool="avg"), 0),
    "distilled": (lambda: vit(VisionTransformerDistilled), 2),
    "layer-scaled": (lambda: vit(init_values=0.1), 1),
    "not-square": (lambda: vit(img_size=(64, 96)), 1),
    "swin": (swin, 0),
    "swin-padded": (lambda: swin(img_size=48), 0),
    "swin-not-square": (lambda: swin(img_size=(64, 96)), 0),
    "swin-v2": (lambda: swin(SwinTransformerV2), 0),
    "swin-v2-not-square": (lambda: swin(SwinTransformerV2, img_size=(64, 96)), 0),
}


def adapt(
    make: Callable[[], nn.Module], scheme: str = "convpass", **settings: object
) -> tuple[nn.Module, AdaptedModel]:
    """A base with random weights, and its copy with lively adapters; both in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = randomise(make()).eval()
    base.pretrained_cfg = {"input_size": (3, *base.patch_embed.img_size)}  # type: ignore[union-attr, operator, misc]
    backbone = describe_model(base)
    model = operate(backbone, plan_insertions(backbone, scheme, settings))
    enliven(model.adapters, scale=0.3)
    return base, model.eval()


def pictures(model: AdaptedModel, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(0))


def hooked(base: nn.Module, tensors: Tensors, *, prefix: int, s: float) -> nn.Module:
    """A copy of a base in which each block's drop-path is given the branch and s·CP of what the branch reads."""
    model: Any = copy.deepcopy(base)
    for path, block in model.named_modules():
        if not hasattr(block, "drop_path1"):
            continue
        grid = [model.patch_embed.grid_size]
        for branch, kind, norm, drop_path in (
            ("attn", "attention", block.norm1, block.drop_path1),
            ("mlp", "mlp", block.norm2, block.drop_path2),
        ):
            start = f"convpass.{path}.{branch}.{kind}."
            own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            if own:
                # Swin-v2 norms what a branch gives, the others what it reads
                reader = block if branch == "attn" else block.mlp
                _hook(reader if isinstance(model, SwinTransformerV2) else norm, reader, drop_path, own, grid, prefix, s)
    return model


def _hook(
    source: nn.Module, reader: nn.Module, drop_path: nn.Module, own: Tensors, grid: list[Pair], prefix: int, s: float
) -> None:
    kept: list[torch.Tensor] = []
    if source is reader:
        source.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    else:
        source.register_forward_hook(lambda _, __, output: kept.append(output))

    def add(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = kept.pop()
        if x.ndim == 4:
            # Swin's attention reads maps [B, H, W, C], and its MLP the same as tokens
            grid[0], x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        return (given[0] + bypass(x, own, grid=grid[0], prefix=prefix, s=s).reshape(given[0].shape),)

    drop_path.register_forward_pre_hook(add)


def adapter_tensors(model: AdaptedModel) -> dict[str, torch.Tensor]:
    """The adapters' tensors by the path of what they stand beside, ``convpass.blocks.0.attn.attention.up.bias``."""
    return {
        name.replace("convpass_attn.", "convpass.").replace("__", "."): tensor
        for name, tensor in model.adapters.named_parameters()
    }


CASES = [*((name, "convpass") for name in MODELS), ("class-token", "convpass-attn"), ("swin", "convpass-attn")]


# outputs and gradients, relative to the largest; in fp32 backward passes through the whole base differ by rounding
# alone, the hooks' from their own in fp64 as far as ours
BOUNDS = {torch.float32: (1e-6, 5e-6), torch.float64: (1e-13, 1e-13)}


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_models_agree_with_hooks(name: str, scheme: str, dtype: torch.dtype) -> None:
    make, prefix = MODELS[name]
    base, model = adapt(make, scheme, s=0.5)
    base, model, images = base.to(dtype), model.to(dtype), pictures(model).to(dtype).requires_grad_()
    ours = adapter_tensors(model)
    blocks = sum(hasattr(module, "drop_path1") for module in base.modules())
    assert len(ours) == 6 * blocks * (2 if scheme == "convpass" else 1)
    theirs = {key: tensor.detach().clone().requires_grad_() for key, tensor in ours.items()}
    reference = hooked(base, theirs, prefix=prefix, s=0.5)
    got, expected = model(images), reference(images)
    assert relative(base(images), expected) > 1e-2, "the adapters have no part in the outputs"
    of_output, of_gradient = BOUNDS[dtype]
    assert relative(got, expected) <= of_output
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad((got * cotangent).sum(), (images, *ours.values()))
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), (images, *theirs.values()))
    for key, mine, other in zip(("images", *ours), gradients, expected_gradients, strict=True):
        assert relative(mine, other) <= of_gradient, key


@pytest.mark.parametrize("make", [lambda: vit(init_values=0.1, drop_path_rate=0.5), lambda: swin(drop_path_rate=0.5)])
def test_one_draw_drops_branch_and_bypass(make: Callable[[], nn.Module]) -> None:
    base, model = adapt(make, dropout=0.0)
    prefix = int(isinstance(base, VisionTransformer))
    reference, images = hooked(base, adapter_tensors(model), prefix=prefix, s=1.0).train(), pictures(model, batch=8)
    results = []
    with torch.no_grad():
        still = model(images)
        model.train()
        for seed in (0, 1):
            torch.manual_seed(seed)
            results.append(model(images))
            torch.manual_seed(seed)
            assert relative(results[-1], reference(images)) <= 1e-6
    assert not torch.equal(*results)
    assert not torch.equal(results[0], still)


@torch.no_grad()
def test_dropout_lives_in_training_only() -> None:
    _, model = adapt(vit)
    images = pictures(model)
    still = model(images)
    assert torch.equal(model(images), still)
    torch.manual_seed(0)
    first = model.train()(images)
    assert not torch.equal(first, still) and not torch.equal(model(images), first)
    _, without = adapt(vit, dropout=0.0)
    assert relative(without.train()(images), still) <= 1e-6


def test_it_exports_with_any_batch() -> None:
    _, model = adapt(lambda: vit(reg_tokens=1, img_size=(64, 96)), s=0.1)
    classes = tuple(f"class {index}" for index in range(CLASSES))
    _, report = onnx_bytes(model, preprocessing=model.preprocessing, classes=classes, name="tiny")
    assert {check.batch for check in report.checks} == {1, 2, 3, 7}
    # the base alone is 7e-6 away, relative to the spread of its outputs
    assert max(check.relative_error for check in report.checks) <= 3e-5


def test_a_branch_without_a_grid_is_named_and_can_be_left_out() -> None:
    settings = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "depth_token_only": 2}
    backbone = describe_model(Cait(img_size=64, num_classes=CLASSES, **settings).eval(), 64)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        plan_insertions(backbone, "convpass")
    assert caught.value.message.startswith("cannot put convpass at 'blocks_token_only.")
    assert "no grid that is known" in caught.value.message
    assert "--exclude 'blocks_token_only." in str(caught.value.hint)
    plan = plan_insertions(backbone, "convpass", exclude=("blocks_token_only.*",))
    assert [item.site.path for item in plan.insertions] == ["blocks.0.attn", "blocks.0.mlp"]
