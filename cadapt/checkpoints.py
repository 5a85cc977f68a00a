"""Reading checkpoint files without running what is in them, and filling a model with what they hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from cadapt.errors import CadaptError, RefusedError

_DAMAGED = (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth`` or ``.bin`` checkpoint, on the CPU.

    Raises:
        CadaptError: there is no such file.
        RefusedError: it is damaged, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise CadaptError(f"no checkpoint at {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, *_DAMAGED) as error:
        # some versions of timm raise the unpickler's refusal again under a kind of their own
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
            raise RefusedError(
                f"{path} is refused: it is damaged, or a pickle that could run code on loading",
                hint="convert it where it comes from: safetensors.torch.save_file(model.state_dict(), FILE)",
            ) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RefusedError(f"{path} is damaged or no checkpoint: {reason:.160}") from error
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RefusedError(f"{path} holds no tensors by name, expected a state_dict")
    return tensors


def fill_model(model: nn.Module, state: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Load a checkpoint's tensors into a model, all of them and nothing else.

    Raises:
        CadaptError: they do not fit the architecture, with the first of what is missing, unexpected or misshapen.
    """
    own: dict[str, torch.Tensor] = model.state_dict()
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if wrong or missing or extra:
        kinds = (("wrong shape:", wrong), ("missing", missing), ("unexpected", extra))
        detail = [f"{kind} {_first_of(keys)}" for kind, keys in kinds if keys]
        raise CadaptError(f"{path} does not fit {name}: {'; '.join(detail)}")
    model.load_state_dict(state, strict=False)


def _first_of(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
