"""The two ends that every method is compared with: a linear probe, and full fine-tuning.

Neither inserts a module: the head is the task's own in every scheme, and full fine-tuning trains the base's tensors,
whose trained values the file then carries.
"""

from __future__ import annotations

from collections.abc import Iterable

from cadapt.adapters.scheme import Scheme


def _tune_everything(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


SCHEMES = (
    Scheme(
        name="linear",
        paper="linear probing",
        summary="train the head only",
        places_modules=False,
    ),
    Scheme(
        name="full",
        paper="full fine-tuning",
        summary="train every parameter, batch statistics included",
        tunes=_tune_everything,
        bn_policy="train",
        places_modules=False,
    ),
)
