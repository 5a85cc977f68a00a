"""Reading checkpoint files without running what is in them, and filling a model with what they hold."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models import load_state_dict
from torch import nn

from cadapt.errors import CadaptError, RefusedError

_COPY_HINT = "fetch or copy it again"
_ZIP_MAGIC = b"PK\x03\x04"


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth`` or ``.bin`` checkpoint, on the CPU.

    Raises:
        CadaptError: there is no such file.
        RefusedError: it is damaged, or a pickle that holds more than tensors. Damage to the numbers themselves shows
            only in torch's zip format: the older pickles and ``.safetensors`` have no checksums.
    """
    if not path.is_file():
        raise CadaptError(f"no checkpoint at {path}")
    try:
        _check_zip(path)
        state = load_state_dict(str(path), weights_only=True)
    except RefusedError:
        raise
    except Exception as error:  # malformed bytes make the readers fail in any way, an IndexError for one
        # some versions of timm raise the unpickler's refusal again under a kind of their own
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
            raise RefusedError(
                f"{path} is refused: it is damaged, or a pickle that could run code on loading",
                hint="convert it where it comes from: safetensors.torch.save_file(model.state_dict(), FILE)",
            ) from error
        raise RefusedError(f"{path} is damaged or no checkpoint: {first_line(error)}") from error
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RefusedError(f"{path} holds no tensors by name, expected a state_dict")
    return tensors


def first_line(error: Exception) -> str:
    """Return what another library's error says, in one line of at most 160 characters."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{reason:.160}"


def _check_zip(path: Path) -> None:
    """Check the checksums that torch writes into its zip format and ignores on loading: 0.1 s for 100 MB.

    Raises:
        RefusedError: one of them differs.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return
    with zipfile.ZipFile(path) as archive:
        # torch writes zeros when it is told to compute none
        checked = any(item.CRC for item in archive.infolist())
        broken = archive.testzip() if checked else None
    if broken is not None:
        raise RefusedError(f"{path} is damaged: the checksum of '{broken}' in it does not match", hint=_COPY_HINT)


def fill_model(model: nn.Module, state: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Load a checkpoint's tensors into a model, all of them and nothing else.

    Raises:
        CadaptError: they do not fit the architecture, with the first of what is missing, unexpected or misshapen.
    """
    if any(key.startswith("adapters.") for key in state):
        raise CadaptError(
            f"{path} is an adapter file, expected the weights of {name}", hint="an adapter is given by -m"
        )
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
