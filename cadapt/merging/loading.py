"""Reading a merged checkpoint back: timm's architecture, with the layers exchanged that are not timm's any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadapt.backbone import load_backbone
from cadapt.bundle.container import LENGTH_BYTES, check_length, parse_header, parse_object
from cadapt.checkpoints import fill_model, read_checkpoint
from cadapt.errors import CadaptError, RefusedError, UsageError
from cadapt.merging.checkpoint import FACTS, PLAIN
from cadapt.merging.plain import build_plain, read_plain

_MOST_CLASSES = 10_000_000


def load_merged(path: str | Path) -> nn.Module:
    """Load a checkpoint that :func:`cadapt.merging.checkpoint_bytes` made, without cadapt's adapters and graphs.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        The timm model in eval mode on the CPU, in fp32, with plain layers where the file has such. Maps pictures
        ``[B, C, H, W]``, normalised as the file's metadata say, to logits ``[B, classes]``.

    Raises:
        CadaptError: there is no such file, or its tensors do not fit the architecture.
        RefusedError: it is damaged, or not such a file.
    """
    file = Path(path)
    facts = _read_facts(file)
    architecture, settings = _read_architecture(facts)
    state = read_checkpoint(file)
    try:
        model = load_backbone(architecture, pretrained=False, settings=settings).model
    except UsageError as error:
        raise RefusedError(f"damaged checkpoint: {error.message}") from error
    notes = facts.get(PLAIN, {})
    if not isinstance(notes, dict):
        raise RefusedError(f"damaged checkpoint: its plain layers are {notes!r:.60}, expected an object")
    for layer_path, record in notes.items():
        state = _exchange(model, layer_path, record, state)
    fill_model(model, state, architecture, file)
    return model.eval()


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
    if not isinstance(modules.get(path), nn.Conv2d | nn.Linear):
        raise RefusedError(f"damaged checkpoint: the architecture has no layer '{path:.80}' to exchange")
    prefix = f"{path}.{PLAIN}."
    own = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    weight = own.get(f"{prefix}weight")
    if weight is None:
        raise RefusedError(f"damaged checkpoint: it lacks '{prefix}weight'")
    layer = build_plain(note, weight, bias=f"{prefix}bias" in own, path=path)
    model.set_submodule(path, layer.to(torch.float32))
    renamed = {f"{path}.{key.removeprefix(prefix)}": tensor for key, tensor in own.items()}
    return {**{key: tensor for key, tensor in state.items() if key not in own}, **renamed}
