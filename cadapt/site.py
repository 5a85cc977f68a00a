"""Where an adapter can go: the value type that the graph layer finds and the adapters read.

A :class:`Site` names a place in a base by its module path and call, never by a graph node, so that it means the
same in every trace of the same architecture and can be written to a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

from cadapt.errors import RefusedError
from cadapt.kinds import check_kinds

SiteKind = Literal["block", "conv", "downsample", "stage", "attention", "mlp", "linear", "layer", "input", "head"]
Layout = Literal["NCHW", "NHWC", "NLC", "NC"]
Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_LEAST = {"grid": 1, "out_grid": 1, "kernel": 1, "stride": 1, "dilation": 1, "prefix_tokens": 0}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place where an adapter can join the base.

    ``in_shape`` and ``out_shape`` leave out the batch and follow ``layout``; ``grid`` is the height and width of the
    *input* on its grid, also for tokens, which may be preceded by ``prefix_tokens`` (class token, registers), as many
    in the output as in the input; ``out_grid`` is that of output tokens (maps carry theirs in ``out_shape``).
    ``kernel``, ``stride``, ``padding`` and ``dilation`` are those of the adapted component: for a block the kernel
    is that of its functional conv (or its attention window) and the stride is that from its input to its output;
    ``kernel`` is None where nothing inside has one (pooling, global attention, an MLP).
    A ``layer`` is any convolution, linear layer or norm, and ``input`` the picture, whose path is empty.
    ``padding`` is ``"same"`` where the base pads at run time by TensorFlow's rule; ``padding_mode`` is torch's name for
    what it pads with, zeros where the site is no conv. ``activation`` is the base's own
    non-linearity at this place by timm's name. ``call`` counts the uses of a module that is called more than once.
    """

    path: str
    kind: SiteKind
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    layout: Layout = "NCHW"
    grid: Pair | None = None
    kernel: Pair | None = None
    stride: Pair = (1, 1)
    padding: Pair | Literal["same"] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: str = "relu"
    operator: str = ""
    stage: int | None = None
    prefix_tokens: int = 0
    call: int = 0
    out_grid: Pair | None = None
    padding_mode: PaddingMode = "zeros"

    @property
    def name(self) -> str:
        """The path, with the call where a shared module is meant: ``layer1.0.conv2``, ``neck.conv@1`` or ``input``."""
        path = self.path or self.kind
        return path if self.call == 0 else f"{path}@{self.call}"

    @property
    def in_channels(self) -> int:
        """Channels of the input, whatever its layout."""
        return self.in_shape[0] if self.layout == "NCHW" else self.in_shape[-1]

    @property
    def out_channels(self) -> int:
        """Channels of the output, whatever its layout."""
        return self.out_shape[0] if self.layout == "NCHW" else self.out_shape[-1]

    @property
    def output_grid(self) -> Pair | None:
        """Height and width of the output on its grid, whatever its layout; None where it has none."""
        if self.layout in ("NCHW", "NHWC") and len(self.out_shape) == 3:
            first = 1 if self.layout == "NCHW" else 0
            return self.out_shape[first], self.out_shape[first + 1]
        return self.out_grid

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal site."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Site:
        """Read a site back, checking what an untrusted file may hold.

        Raises:
            RefusedError: a field is missing, of the wrong kind, or smaller than it can be.
        """
        known = {field.name for field in fields(cls)}
        values = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items() if key in known
        }
        if values.get("kind") not in get_args(SiteKind) or not isinstance(values.get("path"), str):
            raise RefusedError(f"damaged plan: not a site: {dict(record)!r:.120}")
        for key in ("in_shape", "out_shape"):
            shape = values.get(key)
            if (
                not isinstance(shape, tuple)
                or not shape
                or not all(isinstance(size, int) and size > 0 for size in shape)
            ):
                raise RefusedError(f"damaged plan: {key} of site '{values['path']}' is {shape!r}, expected sizes")
        check_kinds(cls, values)
        for key, least in _LEAST.items():
            value = values.get(key)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < least:
                raise RefusedError(f"damaged plan: {key} of site '{values['path']}' is {value!r}, below {least}")
        return cls(**cast("dict[str, Any]", values))
