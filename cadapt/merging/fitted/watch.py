"""Running a model's graph up to some of its values, and handing those out as they are at their moment.

Base models overwrite tensors in place, so a value is copied as soon as it is there; nothing is run beyond the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from cadapt.adapted import AdaptedModel


class _SeenAllError(Exception):
    """All values that were asked for are there."""


class _Watch(fx.Interpreter):
    def __init__(
        self, model: AdaptedModel, wanted: Collection[fx.Node], take: Callable[[fx.Node, torch.Tensor], None]
    ) -> None:
        super().__init__(model, garbage_collect_values=True, graph=model.graph)  # type: ignore[arg-type]
        self.left = set(wanted)
        self.take = take

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.left:
            self.left.remove(n)
            self.take(n, result.clone())
            if not self.left:
                raise _SeenAllError
        return result


@torch.no_grad()
def watch_values(
    model: AdaptedModel,
    wanted: Collection[fx.Node],
    images: torch.Tensor,
    take: Callable[[fx.Node, torch.Tensor], None],
) -> None:
    """Give ``take`` a copy of each wanted node's value for pictures ``[B, C, H, W]``, as soon as it is there."""
    with suppress(_SeenAllError):  # the way out of the interpreter
        _Watch(model, wanted, take).run(images)


def values_of(model: AdaptedModel, wanted: Collection[fx.Node], images: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    """Copies of the values of nodes of the model's graph for pictures ``[B, C, H, W]``."""
    values: dict[fx.Node, torch.Tensor] = {}
    watch_values(model, wanted, images, values.__setitem__)
    return values
