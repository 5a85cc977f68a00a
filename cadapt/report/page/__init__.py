"""Pages of HTML that need nothing but themselves: a file to open, to send and to keep."""

from cadapt.report.page.document import definitions, document, header, section
from cadapt.report.page.markup import Markup, element, joined, text
from cadapt.report.page.tables import Column, table
from cadapt.report.page.tiles import Tile, badge, tiles

__all__ = [
    "Column",
    "Markup",
    "Tile",
    "badge",
    "definitions",
    "document",
    "element",
    "header",
    "joined",
    "section",
    "table",
    "text",
    "tiles",
]
