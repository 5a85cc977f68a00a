"""Whether a value read from an untrusted file is what a dataclass declares for its field.

The records of sites and plans are read with this: a file that was forged, and not merely damaged, must end in a
refusal that names the field, not in a TypeError in the middle of an operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cadapt.errors import RefusedError


def check_kinds(cls: type, values: Mapping[str, Any]) -> None:
    """Check the values for a dataclass's fields against their annotations; absent fields are not missed.

    Raises:
        RefusedError: a value is of another kind, with the field's name and what it should be.
    """
    declared = _declared(cls)
    for name, value in values.items():
        if not _fits(value, declared[name]):
            expected = str(declared[name]).replace("typing.", "").replace("collections.abc.", "")
            expected = declared[name].__name__ if isinstance(declared[name], type) else expected
            raise RefusedError(f"damaged plan: {name} of a {cls.__name__} is {value!r:.60}, expected {expected:.80}")


@lru_cache
def _declared(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: object, declared: Any) -> bool:
    origin, arguments = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and _fit_each(value, arguments)
    if declared is float:
        return type(value) in (int, float)
    if declared is int:
        return type(value) is int  # JSON's true is an int to isinstance
    return isinstance(value, origin or declared)


def _fit_each(values: tuple[object, ...], declared: tuple[Any, ...]) -> bool:
    if len(declared) == 2 and declared[1] is Ellipsis:
        return all(_fits(value, declared[0]) for value in values)
    return len(values) == len(declared) and all(map(_fits, values, declared))
