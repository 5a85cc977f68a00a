"""Loading a base: a timm architecture with weights from the hub, from a checkpoint file, or random from a seed.

Every base gets an identity, the SHA-256 over its backbone's tensors, by which an adapter file knows it again.
"""

from __future__ import annotations

import copy
import inspect
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from cadapt.checkpoints import fill_model, read_checkpoint
from cadapt.classifiers import backbone_tensors, classifier_paths
from cadapt.errors import CadaptError, RefusedError, UsageError, close_matches
from cadapt.hashing import hash_tensors
from cadapt.known_checkpoints import recall_checkpoint, remember_checkpoint
from cadapt.plan import Base, BaseSource
from cadapt.preprocessing import Preprocessing
from cadapt.probe import agree, probe
from cadapt.seeding import seeded


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A base model with its identity and preprocessing. ``model`` is in eval mode."""

    model: nn.Module
    base: Base
    preprocessing: Preprocessing


def load_backbone(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    img_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a timm model with its weights.

    Args:
        name: a timm architecture, with a tag where one set of pretrained weights is meant.
        checkpoint: a ``.safetensors``, ``.pth`` or ``.bin`` file of weights to load in place of the hub's.
        pretrained: take the hub's weights when no checkpoint is given; else random ones from ``seed``.
        seed: of the random weights.
        img_size: height and width of the input, in pixels, in place of the model's own.
        settings: further arguments of ``timm.create_model``.

    Raises:
        UsageError: there is no such architecture, or it does not take these settings.
        CadaptError: the hub cannot be reached, or the checkpoint does not fit the architecture.
        RefusedError: the checkpoint is damaged, or holds more than tensors.
    """
    loaded = _load(name, checkpoint=checkpoint, pretrained=pretrained, seed=seed, img_size=img_size, settings=settings)
    return _probed(loaded, loaded.model)


def _load(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    img_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a timm model with its weights, its identity left without the probe."""
    check_architecture(name)
    arguments = _checked_settings(name, settings or {})
    if img_size is not None and _has_fixed_size(name):
        arguments["img_size"] = img_size
    if checkpoint is not None:
        model, source = _from_checkpoint(name, checkpoint, arguments), "checkpoint"
    elif pretrained:
        model, source = _from_hub(name, arguments), "pretrained"
    else:
        model, source = _random(name, seed, arguments), "random"
    if source == "random":
        return _identify(model, name, "random", seed=seed, img_size=img_size, settings=arguments)
    if source == "pretrained":
        return _identify(model, name, "pretrained", img_size=img_size, settings=arguments)
    assert checkpoint is not None
    backbone = _identify(model, name, "checkpoint", checkpoint=checkpoint.name, img_size=img_size, settings=arguments)
    remember_checkpoint(backbone.base.sha256, checkpoint)
    return backbone


def reload_backbone(
    base: Base, preprocessing: Preprocessing, *, checkpoint: Path | None = None, near: Path | None = None
) -> Backbone:
    """Build the base that an adapter file names, and refuse any other.

    Args:
        base: its identity.
        preprocessing: the input size and normalisation the adapter was made for.
        checkpoint: where its weights are; otherwise they are looked for beside the adapter and where they last were.
        near: the adapter file's folder.

    Raises:
        RefusedError: what was found is not that base.
        CadaptError: its checkpoint is not found.
    """
    wrong: RefusedError | None = None
    for path in _candidates(base, checkpoint, near):
        found = _build_again(base, path)
        try:
            return check_identity(replace(found, preprocessing=preprocessing), base)
        except RefusedError as error:
            # another file of the same name: the right one may still be where it was last seen
            wrong = error
    if wrong is not None:
        raise wrong
    raise CadaptError(f"cannot find the base's checkpoint {base.checkpoint}", hint="say where it is: --checkpoint FILE")


def _build_again(base: Base, path: Path | None) -> Backbone:
    settings = dict(base.settings)
    if path is not None or base.source == "random":
        return _load(base.name, checkpoint=path, pretrained=False, seed=base.seed or 0, settings=settings)
    try:
        return _load(base.name, settings=settings)
    except UsageError:
        raise
    except CadaptError as error:
        made = "was a model made in Python" if base.source == "given" else "has its weights on the hub"
        raise CadaptError(
            f"the adapter's base, {base.name}, {made}, and they cannot be had: {error.message}",
            hint="--checkpoint FILE takes its weights from disk; from Python, cadapt.load(path, model)",
        ) from error


def check_identity(found: Backbone, expected: Base) -> Backbone:
    """Return the backbone under the expected identity, or refuse it.

    Raises:
        RefusedError: its tensors are not those the adapter was made for.
    """
    if found.base.sha256 != expected.sha256:
        origin = expected.checkpoint or f"{expected.name} ({expected.source})"
        raise RefusedError(
            f"wrong base: the adapter was made for {origin} with SHA-256 {expected.sha256[:12]}…, "
            f"this {found.base.name} has {found.base.sha256[:12]}…",
            hint="give the file the adapter was made for: --checkpoint FILE",
        )
    if expected.probe and not agree(probe(_at_rest(found.model), found.preprocessing.input_size), expected.probe):
        raise RefusedError(
            f"wrong base: this {found.base.name} has the right weights and computes something else",
            hint="create it with the settings it was adapted with: global_pool, act_layer, output_stride …",
        )
    return replace(found, base=expected)


def _probed(backbone: Backbone, model: nn.Module) -> Backbone:
    """The backbone with what its model computes noted in its identity."""
    values = probe(model, backbone.preprocessing.input_size)
    return replace(backbone, base=replace(backbone.base, probe=values))


def _at_rest(model: nn.Module) -> nn.Module:
    """The model where it is in eval mode, else a copy that is: a mode is not ours to change, nor what it caches."""
    if not any(module.training for module in model.modules()):
        return model
    return copy.deepcopy(model).eval()


def describe_model(model: nn.Module, img_size: int | None = None) -> Backbone:
    """Identify a model that the caller made, with the preprocessing timm resolves for it, or another input size."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(model).__name__
    name = f"{name}.{config['tag']}" if config.get("tag") else name
    return _probed(_identify(model, name, "given", img_size=img_size), _at_rest(model))


def check_architecture(name: str) -> None:
    """Check that timm has an architecture of that name, and weights of that tag.

    Raises:
        UsageError: it has none, with the close names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"unknown model '{name}'", hint=close_matches(architecture, timm.list_models()))
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        raise UsageError(f"unknown weights '{name}'", hint=close_matches(name, known))


def _checked_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter file may bring settings of the architecture, but none that make timm read a file or fetch one."""
    own = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
    for key, value in settings.items():
        plain = isinstance(value, bool | int | float | str | list | tuple) or value is None
        if key in own or "pretrained" in key or "path" in key or not plain:
            raise RefusedError(f"setting '{key}' of {name} is not one of its architecture")
    return dict(settings)


def _has_module(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _has_fixed_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _identify(
    model: nn.Module,
    name: str,
    source: BaseSource,
    *,
    checkpoint: str | None = None,
    seed: int | None = None,
    img_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Backbone:
    tensors = backbone_tensors(model)
    meta = any(tensor.is_meta for tensor in tensors.values())
    parameters = {name for name, _ in model.named_parameters()} & tensors.keys()
    base = Base(
        name=name,
        source=source,
        parameters=sum(tensors[item].numel() for item in parameters),
        sha256="" if meta else hash_tensors(tensors.items()),
        checkpoint=checkpoint,
        seed=seed,
        settings=dict(settings or {}),
    )
    return Backbone(model=model, base=base, preprocessing=resolve_preprocessing(model, img_size))


def resolve_preprocessing(model: nn.Module, img_size: int | None = None) -> Preprocessing:
    """The preprocessing timm resolves for a model, at another input size where one is given."""
    config = resolve_data_config({}, model=model)
    _, height, width = config["input_size"]
    # a ViT that was created for another size takes no other
    created_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(created_for, tuple) and len(created_for) == 2:
        height, width = created_for
    if img_size is not None:
        height = width = img_size
    channels = _input_channels(model, config["input_size"][0])
    return Preprocessing(
        input_size=(channels, height, width),
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _input_channels(model: nn.Module, usual: int) -> int:
    """Channels of the pictures a model takes: it says so, or its first conv, also where it was made for other than RGB.

    What the model says goes first: a first conv behind a rearrangement of space to depth has more channels.
    """
    own = getattr(model, "in_chans", None)
    if isinstance(own, int):
        return own
    paths = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    path = paths if isinstance(paths, str) else next(iter(paths or ()), None)
    if path is None or not _has_module(model, path):
        return usual
    first = model.get_submodule(path)
    return first.in_channels if isinstance(first, nn.Conv2d) else usual


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values of RGB, or their mean for each channel of pictures with another number of them."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except TypeError as error:
        raise UsageError(f"{name} does not take these settings: {error}") from error
    return model.eval()


def _random(name: str, seed: int, arguments: Mapping[str, Any]) -> nn.Module:
    with seeded(seed):
        return _create(name, pretrained=False, **arguments)


def _from_hub(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    # its client logs each retry; the error below says it once
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return _create(name, pretrained=True, **arguments)
    except UsageError:
        raise
    except Exception as error:  # the hub's client raises many kinds, some of them from its HTTP library
        reason = textwrap.shorten(str(error) or type(error).__name__, 110, placeholder=" …")
        raise CadaptError(
            f"cannot get the pretrained weights of {name} from the hub: {reason}",
            hint="--checkpoint FILE takes weights from disk; --no-pretrained starts from random ones",
        ) from error


def _from_checkpoint(name: str, path: Path, arguments: Mapping[str, Any]) -> nn.Module:
    state = read_checkpoint(path)
    with torch.device("meta"):
        heads = classifier_paths(_create(name, pretrained=False, **arguments))
    classes = _classes_in(state, heads[0] if heads else None)
    if classes is not None and "num_classes" not in arguments:
        arguments = {**arguments, "num_classes": classes}
    model = _create(name, pretrained=False, **arguments)
    fill_model(model, state, name, path)
    return model


def _classes_in(state: Mapping[str, torch.Tensor], head: str | None) -> int | None:
    weight = state.get(f"{head}.weight") if head else None
    if weight is not None:
        return int(weight.shape[0])
    return 0 if head else None


def _candidates(base: Base, checkpoint: Path | None, near: Path | None) -> Iterator[Path | None]:
    """Where a base's weights may be, the likeliest first; one None where they are no file."""
    if checkpoint is not None or base.source != "checkpoint":
        yield checkpoint
        return
    remembered = recall_checkpoint(base.sha256)
    if remembered is not None:
        yield remembered
    for folder in (near, Path.cwd()):
        candidate = None if folder is None or not base.checkpoint else folder / base.checkpoint
        if candidate is not None and candidate.is_file() and candidate != remembered:
            yield candidate
