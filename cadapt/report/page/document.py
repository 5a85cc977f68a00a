"""The shell of every page: one file that shows the same from a disk, in a mail and on a server, now and in ten years.

It loads nothing and runs nothing, and its policy forbids both, so that what a file smuggled in could do neither.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256

from cadapt.report.page.markup import Markup, element, joined
from cadapt.report.page.style import STYLE
from cadapt.version import __version__


def document(title: str, parts: Iterable[Markup]) -> str:
    """Return a whole page of HTML: encoding, policy, style, the parts one below the other.

    Args:
        title: of the window.
        parts: of the body, such as :func:`header` and :func:`section` give.
    """
    digest = b64encode(sha256(STYLE.encode()).digest()).decode()
    head = (
        element("meta", charset="utf-8"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        ),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"cadapt {__version__}"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    footer = element("footer", f"Written by cadapt {__version__}. This page loads nothing and runs no script.")
    body = element("body", element("main", *parts), footer)
    return f"<!doctype html>\n{element('html', element('head', *head), body, lang='en')}\n"


def header(eyebrow: str, title: str, lead: str, *parts: Markup) -> Markup:
    """The top of a page: what it is, of what, and the one sentence that a reader in haste takes along."""
    return element(
        "header",
        element("p", eyebrow, class_="eyebrow"),
        element("h1", title),
        element("p", lead, class_="verdict"),
        *parts,
    )


def section(title: str, *parts: Markup, lead: str = "") -> Markup:
    """A part of a page under a heading, with a sentence that says how to read it."""
    intro = element("p", lead, class_="lead") if lead else Markup("")
    return element("section", element("h2", title), intro, *parts)


def definitions(entries: Iterable[tuple[str, str]]) -> Markup:
    """Terms and what they mean."""
    return element("dl", joined(element("div", element("dt", term), element("dd", said)) for term, said in entries))
