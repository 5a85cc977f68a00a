"""Markup that cannot be broken out of: text is escaped wherever it enters, and only an element is taken as it is.

What pages are made of. Site names, class names and reasons come out of files that others wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from cadapt.report.console import printable

Attribute = str | int | float | bool | None

_VOID = frozenset(("meta", "br", "hr"))


@dataclass(frozen=True)
class Markup:
    """Well-formed markup, as a value of its own: a plain string is always text."""

    source: str

    def __str__(self) -> str:
        """The markup as it is written into a page."""
        return self.source


def text(value: str) -> Markup:
    """Text as markup: nothing in it is obeyed, neither tags nor control characters.

    >>> print(text("<script>"))
    &lt;script&gt;
    """
    return Markup(escape(printable(value)))


def element(name: str, /, *children: str | Markup, **attributes: Attribute) -> Markup:
    """Return an element of HTML or SVG.

    Args:
        name: of the element.
        children: markup as it is, strings as text.
        attributes: by name, where ``_`` stands for ``-`` and a last ``_`` is left out (``class_``). None and False
            leave the attribute out, True writes it without a value.

    >>> print(element("th", "a<b", scope="row", class_="name", hidden=True, title=None))
    <th scope="row" class="name" hidden>a&lt;b</th>
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str | Markup]) -> Markup:
    """Several pieces as one, strings as text."""
    return Markup("".join(str(part if isinstance(part, Markup) else text(part)) for part in parts))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(printable(str(value)))}"'
