"""Reading a merged checkpoint back: timm's architecture, with the layers exchanged that are not timm's any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cadapt.backbone import load_backbone
from cadapt.bundle.container import LENGTH_BYTES, check_length, parse_header, parse_object
from cadapt.checkpoints import fill_model, first_line
from cadapt.errors import CadaptError, RefusedError
from cadapt.merging.checkpoint import FACTS, PLAIN
from cadapt.merging.plain import build_plain, explain_exchange, read_plain

_MOST_CLASSES = 10_000_000


def load_merged(path: str | Path) -> nn.Module:
    """Load a checkpoint that :func:`cadapt.merging.checkpoint_bytes` made, without cadapt's adapters and graphs.

    Args:
        path: a safetensors file, whatever its suffix.

    Returns:
        The timm model in eval mode on the CPU, in fp32, with plain layers where the file has such. Maps pictures
        ``[B, C, H, W]``, normalised as the file's metadata say, to logits ``[B, classes]``.

    Raises:
        CadaptError: there is no such file.
        RefusedError: it is damaged, its tensors do not fit the architecture, or it is not such a file.
    """
    file = Path(path)
    facts = _read_facts(file)
    architecture, settings = _read_architecture(facts)
    notes = facts.get(PLAIN, {})
    if not isinstance(notes, dict):
        raise RefusedError(f"damaged checkpoint: its plain layers are {notes!r:.60}, expected an object")
    state = _read_tensors(file)
    # without data first: what the file does not fill is not to take memory either
    with torch.device("meta"):
        empty, renamed = _build(architecture, settings, notes, state)
    _check_tensors(empty, renamed, file)
    model, renamed = _build(architecture, settings, notes, state)
    fill_model(model, renamed, architecture, file)
    return model.eval()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that has a header of ours, whatever its suffix."""
    try:
        return load_file(path)
    except Exception as error:  # malformed bytes make the reader fail in any way
        raise RefusedError(f"{path} is damaged: {first_line(error)}") from error


def _build(
    architecture: str, settings: Mapping[str, Any], notes: Mapping[str, object], state: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The architecture with the noted layers exchanged, and the tensors under its own names."""
    try:
        model = load_backbone(architecture, pretrained=False, settings=settings).model
    except CadaptError as error:
        raise RefusedError(f"damaged checkpoint: {error.message}") from error
    except Exception as error:  # an architecture may fail in any way over settings that it was not made for
        raise RefusedError(f"damaged checkpoint: {architecture} cannot be made: {first_line(error)}") from error
    named = dict(state)
    for layer_path, record in notes.items():
        named = _exchange(model, layer_path, record, named)
    return model, named


def _check_tensors(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check the tensors of a file against a model without data.

    Raises:
        RefusedError: one is missing, of another shape, of no place in the model, or no floating one where it must be.
    """
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or tensor.shape != own[name].shape:
            wanted = "no such tensor" if name not in own else f"{tuple(own[name].shape)}"
            raise RefusedError(f"{path} does not fit: '{name:.80}' has shape {tuple(tensor.shape)}, expected {wanted}")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise RefusedError(f"{path} is damaged: '{name}' is of {tensor.dtype}, expected {own[name].dtype}")
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise RefusedError(f"{path} does not fit: it lacks '{missing[0]}'")


def _read_facts(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, which must be one of ours."""
    if not path.is_file():
        raise CadaptError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(LENGTH_BYTES + 1)
        length = check_length(start, size)
        file.seek(LENGTH_BYTES)
        metadata = parse_header(file.read(length), size).metadata
    if FACTS not in metadata:
        raise RefusedError(f"{path} does not say which architecture it is for", hint="timm.create_model loads others")
    return parse_object(metadata[FACTS], "metadata")


def _read_architecture(facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture's name and the arguments it is created with."""
    name, settings, classes = (facts.get(key) for key in ("architecture", "settings", "num_classes"))
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise RefusedError(f"damaged checkpoint: its architecture is {name!r:.60} with {settings!r:.60}")
    if type(classes) is not int or not 0 <= classes <= _MOST_CLASSES:
        raise RefusedError(f"damaged checkpoint: num_classes is {classes!r:.60}, expected a number of classes")
    return name, {**settings, "num_classes": classes}


def _exchange(
    model: nn.Module, path: str, record: object, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put a plain layer at a path, and give the state its tensors under the layer's own names."""
    note = read_plain(record, path)
    modules = dict(model.named_modules())
    theirs = modules.get(path)
    if not isinstance(theirs, nn.Conv2d | nn.Linear):
        raise RefusedError(f"damaged checkpoint: the architecture has no layer '{path:.80}' to exchange")
    prefix = f"{path}.{PLAIN}."
    own = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    weight = own.get(f"{prefix}weight")
    if weight is None:
        raise RefusedError(f"damaged checkpoint: it lacks '{prefix}weight'")
    layer = build_plain(note, weight, bias=f"{prefix}bias" in own, path=path)
    other = explain_exchange(layer, theirs)
    if other is not None:
        raise RefusedError(f"damaged checkpoint: '{path:.80}' is no layer of the architecture's size: {other}")
    model.set_submodule(path, layer.to(torch.float32))
    renamed = {f"{path}.{key.removeprefix(prefix)}": tensor for key, tensor in own.items()}
    return {**{key: tensor for key, tensor in state.items() if key not in own}, **renamed}
