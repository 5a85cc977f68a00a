"""The settings of Conv-Adapter, checked when they are made: what a user may turn, and what is said to a wrong value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.layers import get_act_layer

from cadapt.errors import UsageError

_LARGEST_KERNEL = 63
_LARGEST_ALPHA = 1e6


@dataclass(frozen=True, kw_only=True)
class ConvAdapterConfig:
    """Settings of Conv-Adapter.

    Args:
        gamma: compression γ: the bottleneck has w = channels // γ, at least 1. A number is refused where w leaves no
            whole groups; None is 4, with w taken to the nearest width that divides the channels. With ``down`` spatial
            it is the pool's side, by default 2.
        down: what is compressed: ``channel``, or ``spatial``: all channels, on maps pooled by their average and
            brought back bilinearly (the ablation of section 4.4, table 5).
        kernel: kernel size K of the depth-wise conv; None is the adapted component's, or 3 where that has no kernel
            (pooling, global attention, an MLP).
        conv_type: ``depthwise``; ``regular`` (no groups in the first conv); ``linear`` (both convs 1×1).
        activation: σ by timm's name, ``identity`` for none; None is the backbone's own.
        alpha: whether the per-channel scale α is ``learned`` or ``fixed`` at ``alpha_init``.
        alpha_init: its initial, or fixed, value.
        init: ``zero`` (the inserted model computes what the backbone does) or ``paper``.

    Raises:
        UsageError: a value out of its range, or an activation that timm does not have.
    """

    gamma: int | None = None
    down: Literal["channel", "spatial"] = "channel"
    kernel: int | None = None
    conv_type: Literal["depthwise", "regular", "linear"] = "depthwise"
    activation: str | None = None
    alpha: Literal["learned", "fixed"] = "learned"
    alpha_init: float = 1.0
    init: Literal["zero", "paper"] = "zero"

    def __post_init__(self) -> None:
        if self.gamma is not None and self.gamma < 1:
            raise UsageError(f"γ is {self.gamma}, expected 1 or more", hint="try --gamma 4")
        if self.kernel is not None and not 1 <= self.kernel <= _LARGEST_KERNEL:
            raise UsageError(f"kernel is {self.kernel}, expected 1 to {_LARGEST_KERNEL}", hint="try --kernel 3")
        if self.conv_type == "linear" and self.kernel not in (None, 1):
            raise UsageError(f"linear convs are 1×1: kernel cannot be {self.kernel}", hint="leave out --kernel")
        if not abs(self.alpha_init) < _LARGEST_ALPHA:
            raise UsageError(f"alpha_init is {self.alpha_init:g}, expected a number", hint="try --set alpha_init=1")
        if self.activation is not None and self.activation != "identity":
            _check_activation(self.activation)


def _check_activation(name: str) -> None:
    try:
        known = get_act_layer(name) is not None  # an empty name is none to timm, without an error
    except (KeyError, AssertionError):
        known = False
    if not known:
        raise UsageError(f"unknown activation '{name}'", hint="relu, gelu, silu, hard_swish, identity …")
