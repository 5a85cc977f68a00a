"""Compares the class names a model was trained on with those that data comes with.

Evaluation uses it: pictures of classes the model has never heard of are reported, and the caller decides. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """Which classes of data and model are the same.

    ``missing_in_data`` are classes of the model without pictures, ``unknown_to_model`` those of the data the model
    cannot name; ``index_map`` leads from a label of the data to the model's label of the same name. Pass it to
    ``images.relabel(match.index_map, known)`` to leave the unknown classes' pictures out.
    """

    missing_in_data: tuple[str, ...]
    unknown_to_model: tuple[str, ...]
    index_map: Mapping[int, int]

    @property
    def complete(self) -> bool:
        """Whether both sides have the same classes."""
        return not self.missing_in_data and not self.unknown_to_model


def match_classes(known: Sequence[str], found: Sequence[str]) -> ClassMatch:
    """Match the data's class names with the model's, exactly as they are written.

    >>> match_classes(["cat", "dog", "owl"], ["dog", "fox"])
    ClassMatch(missing_in_data=('cat', 'owl'), unknown_to_model=('fox',), index_map={0: 1})
    """
    positions = {name: index for index, name in enumerate(known)}
    present = set(found)
    return ClassMatch(
        missing_in_data=tuple(name for name in known if name not in present),
        unknown_to_model=tuple(name for name in found if name not in positions),
        index_map={index: positions[name] for index, name in enumerate(found) if name in positions},
    )
