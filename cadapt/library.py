"""The library's front: insert, save and load, over which the command line is thin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadapt.adapted import AdaptedModel
from cadapt.backbone import Backbone, check_identity, describe_model, reload_backbone
from cadapt.bundle import Bundle, load_bundle, save_bundle
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.planning import plan_insertions, survey, with_head
from cadapt.surgery import operate


def insert(
    model: nn.Module,
    scheme: str = "conv-par",
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head_norm: bool = False,
    head_dropout: float = 0.0,
    seed: int = 0,
    **settings: Any,
) -> AdaptedModel:
    """Put a scheme's adapters into a copy of a timm model, which itself stays as it was.

    Args:
        model: a model from timm, on any device, the meta device included.
        scheme: a scheme's name, see ``cadapt.SCHEMES``.
        num_classes: classes of a fresh head; None trains a copy of the model's own classifier.
        img_size: height and width of the input in pixels; None is the model's own: what a ViT was created for, else
            what timm says of its weights.
        include: globs over site paths to adapt; none means all.
        exclude: globs over site paths to leave out.
        head_norm: put a fresh LayerNorm before the head's classifier.
        head_dropout: rate of a dropout before it.
        seed: initialises adapters and head.
        **settings: the scheme's own, such as ``gamma=4``.

    Returns:
        The adapted model, in the argument's mode and on its device; only adapters, head and what the scheme tunes
        require gradients.

    Raises:
        UsageError: an unknown scheme or setting, or one that does not fit.
        CadaptError: the model has nothing to adapt under this scheme.

    >>> import cadapt, timm
    >>> adapted = cadapt.insert(timm.create_model("test_resnet"), scheme="conv-par", gamma=4, num_classes=10)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    15170
    """
    include, exclude = ((item,) if isinstance(item, str) else item for item in (include, exclude))
    if not isinstance(model, nn.Module):
        raise UsageError(f"insert takes a model, not {model!r:.60}", hint="timm.create_model(NAME, pretrained=True)")
    backbone = describe_model(model, img_size)
    surveyed = survey(backbone)
    plan = plan_insertions(backbone, scheme, settings, include=include, exclude=exclude, seed=seed, surveyed=surveyed)
    plan = with_head(plan, backbone, num_classes, norm=head_norm, dropout=head_dropout)
    return operate(backbone, plan, surveyed)


def save(model: AdaptedModel, path: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapted model's adapter file: its plan, its trained tensors and what the task needs, not the base.

    ``model.classes`` names its outputs; without names the file can be loaded here, and not evaluated or exported.

    Raises:
        UsageError: the file exists and ``overwrite`` is false, the model is no adapted one, or has other classes than
            outputs.
        CadaptError: it cannot be written.
    """
    if not isinstance(model, AdaptedModel):
        raise UsageError(
            f"a {type(model).__name__} has no adapters to save", hint="cadapt.insert makes an adapted model"
        )
    outputs = model.plan.head.num_classes if model.plan.head is not None else None
    if model.classes and outputs != len(model.classes):
        raise UsageError(
            f"model.classes has {len(model.classes)} names, its head {outputs} outputs",
            hint="name each output, in order",
        )
    save_bundle(path, to_bundle(model), overwrite=overwrite)


def load(path: str | Path, model: nn.Module | None = None, *, checkpoint: str | Path | None = None) -> AdaptedModel:
    """Read an adapter file and put it on its base.

    Args:
        path: the adapter file.
        model: the base, where the caller has it; otherwise it is built as the file says.
        checkpoint: where the base's weights are, if not where they last were.

    Returns:
        The adapted model in eval mode, on the CPU or the given model's device.

    Raises:
        RefusedError: the file is damaged, or the base is another than the one the adapter was made for.
        CadaptError: the base's weights cannot be had.
    """
    bundle = load_bundle(path)
    if model is not None:
        backbone = replace(describe_model(model), preprocessing=bundle.preprocessing)
        return from_bundle(bundle, check_identity(backbone, bundle.plan.base))
    return from_bundle(bundle, base_of(bundle, checkpoint=checkpoint, near=Path(path).parent))


def base_of(bundle: Bundle, *, checkpoint: str | Path | None = None, near: Path | None = None) -> Backbone:
    """Build the base a bundle was made for; raises as :func:`load` does."""
    where = Path(checkpoint) if checkpoint is not None else None
    try:
        return reload_backbone(bundle.plan.base, bundle.preprocessing, checkpoint=where, near=near)
    except CadaptError as error:
        if where is None or not where.is_file() or type(error) is not CadaptError:
            raise
        # a file that does not even fit the architecture is another base all the more
        message = f"wrong base: the adapter was made for {bundle.plan.base.name}; {error.message}"
        raise RefusedError(message, hint="give the file the adapter was made for: --checkpoint FILE") from error


def to_bundle(model: AdaptedModel) -> Bundle:
    """The adapter file's content."""
    return Bundle(
        plan=model.plan,
        classes=model.classes,
        preprocessing=model.preprocessing,
        training=dict(model.training_record),
        tensors=model.trained_tensors(),
    )


def from_bundle(bundle: Bundle, backbone: Backbone, *, fresh: str | None = None) -> AdaptedModel:
    """Operate on a base by a bundle's plan and give it the bundle's tensors.

    Args:
        bundle: the adapter file's content.
        backbone: the base it was made for.
        fresh: a prefix of tensors that keep their initial values: the bundle does not have them.

    Raises:
        RefusedError: the tensors are not those the plan calls for.
    """
    head = bundle.plan.head
    if bundle.classes and (head is None or head.num_classes != len(bundle.classes)) and fresh is None:
        raise RefusedError(f"damaged adapter: {len(bundle.classes)} class names for another number of outputs")
    model = operate(backbone, bundle.plan)
    expected = {
        name: tensor for name, tensor in model.trained_tensors().items() if fresh is None or not name.startswith(fresh)
    }
    _fill(expected, bundle.tensors)
    model.classes = bundle.classes
    model.training_record = dict(bundle.training)
    return model.eval()


@torch.no_grad()
def _fill(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        problem = f"lacks '{missing[0]}'" if missing else f"has '{extra[0]}', which its plan does not call for"
        raise RefusedError(f"damaged adapter: the file {problem}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise RefusedError(f"damaged adapter: '{name}' has shape {found}, expected {wanted}")
        expected[name].copy_(tensor)
