"""Pages of HTML that need nothing but themselves: a file to open, to send and to keep."""

from cadapt.report.page.document import definitions, document, header, section
from cadapt.report.page.markup import Markup, element, joined, text
from cadapt.report.page.merge import render
from cadapt.report.page.tables import Column, table
from cadapt.report.page.tiles import Tile, badges, tiles

__all__ = [
    "Column",
    "Markup",
    "Tile",
    "badges",
    "definitions",
    "document",
    "element",
    "header",
    "joined",
    "render",
    "section",
    "table",
    "text",
    "tiles",
]
