"""The page of a merge as a text: well-formed, closed to the outside, complete, legible, and safe with foreign names."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadapt.merging.report import MergeReport
from cadapt.report import figures
from cadapt.report.page import Column, document, element, layers, markup, render, scale, table
from cadapt.report.page.merge import verdict
from cadapt.report.page.style import DARK, LIGHT, STYLE
from tests.report.merges import EVIL, exact_report, frontier, report

NAN = float("nan")


@dataclass
class Read:
    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, str, str | None]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


class Reader(HTMLParser):
    """Reads a page and fails where an element is not closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open = Read(), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.tags[tag] += 1
        self.found.attributes += [(tag, key, value) for key, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.found.text.append(data)


def read(page: str) -> Read:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader.found


def not_a_number(found: MergeReport) -> MergeReport:
    rows = tuple(replace(row, r2=NAN, effect=float("inf"), relative_size=NAN) for row in found.sites)
    points = tuple(replace(point, top1=NAN, max_logit_error=float("inf")) for point in found.frontier)
    assert found.on_data is not None
    return replace(
        found, sites=rows, frontier=points, on_data=replace(found.on_data, top1_before=NAN, max_logit_error=NAN)
    )


REPORTS: Mapping[str, MergeReport] = {
    "all": report(16),
    "sixty": report(60),
    "exact": exact_report(6),
    "one": exact_report(1),
    "none": exact_report(0),
    "one point": report(2, frontier=frontier(0, 0)),
    "unlabelled": report(8, frontier=frontier(4, 2, labels=False, latency=False), tolerance="disagreement=1%"),
    "logit": report(8, tolerance="logit=0.1", tolerance_met=False),
    "no numbers": not_a_number(report(8)),
    "not chosen": report(8, frontier=tuple(replace(point, chosen=False) for point in report(8).frontier)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_well_formed_closed_and_accessible(name: str) -> None:
    page = render(REPORTS[name])
    found = read(page)
    assert page.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">')
    assert not set(found.tags) & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not [key for _, key, _ in found.attributes if key.startswith("on") or key in ("style", "href", "src")]
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    (policy,) = [value for value in found.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    identities = found.values("id")
    assert len(identities) == len(set(identities))
    named = {name for value in found.values("aria-labelledby") for name in value.split()}
    assert named == set(identities)
    assert len([key for tag, key, _ in found.attributes if tag == "th" and key == "scope"]) == found.tags["th"]
    assert found.tags["caption"] == found.tags["table"]
    assert "nan" not in " ".join(found.text).lower().split() and "inf" not in " ".join(found.text).lower().split()


def test_every_svg_is_named_or_silent() -> None:
    page = render(REPORTS["all"])
    outer = re.findall(r'<svg class="(?:mark|strip|whisker)[^>]*>|<svg width[^>]*>', page)
    assert len(outer) > 50
    assert all('role="img"' in tag or 'aria-hidden="true"' in tag for tag in outer)


def test_a_page_holds_every_figure_of_the_report() -> None:
    found = REPORTS["all"]
    words = " ".join(read(render(found)).text)
    for row in found.sites:
        assert row.site in words and row.reason in words
        assert figures.fixed(row.r2) in words and figures.scientific(row.error_fp64) in words
    for point in found.frontier:
        assert figures.share(point.agreement, 2) in words and figures.ratio(point.latency) in words
    for said in ("within the tolerance top1=0.5%", "96.82 %", "from 97.12 %, −0.30 points", "812.0 kB", "1.11–1.16"):
        assert said in words, said
    assert "chosen: 5 folded, refined" in words or "chosen: 7 folded, refined" in words


def test_what_was_not_measured_is_not_told() -> None:
    words = " ".join(read(render(exact_report())).text)
    for heading in ("The frontier", "Latency", "Top-1", "R²", "Adapter file", "tolerance"):
        assert heading not in words, heading
    assert "Layer by layer" in words
    assert "Layer by layer" not in " ".join(read(render(exact_report(0))).text)


def test_the_verdict_judges_in_words() -> None:
    assert verdict(report(8)).startswith(
        "5 of 8 adapters are gone from the model, 1 of them exactly. On 1,797 pictures, "
    )
    assert verdict(exact_report(1)).startswith("1 of 1 adapter is gone from the model by exact folding. The logits")
    assert verdict(exact_report(0, summary="nothing to merge")) == "Nothing to merge."
    assert "top-1" not in verdict(REPORTS["no numbers"])
    words = " ".join(read(render(report(8, tolerance_met=False, verified=False))).text)
    assert "outside the tolerance" in words and "not verified" in words


@pytest.mark.parametrize(
    ("metric", "label"), [("top1=1%", "Top-1"), ("disagreement=1%", "Predictions"), ("logit=1", "Largest")]
)
def test_the_figure_that_misses_the_tolerance_stands_out(metric: str, label: str) -> None:
    page = render(report(8, tolerance=metric, tolerance_met=False))
    assert re.findall(r'<li class="bad"><span class="label">([^ <]+)', page) == [label]
    assert '<li class="bad"><span class="label">' not in render(report(8, tolerance=metric))


def test_the_plot_ends_where_the_adapters_do() -> None:
    page = render(report(8, frontier=frontier(13, 2)))
    assert 'x="97.000%"' in page and ">14</text>" not in page


def test_foreign_text_is_text() -> None:
    found = report(3, base=EVIL, scheme=EVIL, summary=EVIL, dtype=EVIL, timm_reason=EVIL)
    rows = tuple(replace(row, site=EVIL, scheme=EVIL, reason=EVIL, note=EVIL, hosts=(EVIL,)) for row in found.sites)
    points = tuple(replace(point, site=EVIL) for point in found.frontier)
    assert found.latency is not None
    latency = replace(found.latency, runtime=EVIL)
    page = render(replace(found, sites=rows, frontier=points, latency=latency))
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert read(page).tags["script"] == 0
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;\\x1b[31m[red]\\u202e" in page
    page.encode()
    assert "<b>" not in document("<b>", [])


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_out_of_an_element_or_an_attribute(child: str, value: str) -> None:
    found = read(str(element("p", child, title=value)))
    assert found.tags == {"p": 1}
    assert [key for _, key, _ in found.attributes] == ["title"]


def test_columns_share_a_title_over_their_own() -> None:
    columns = (Column(title="site", code=True), Column(title="a", group="both"), Column(title="b", group="both"))
    found = str(table(columns, [("x", "1", "2")], caption="c", marked=frozenset([0])))
    assert (
        '<th scope="colgroup" colspan="2" class="group">both</th></tr><tr><th scope="col" class="figure">a</th>'
        in found
    )
    assert '<th scope="col" class="figure" rowspan="2">site</th>' in found
    assert '<tr class="marked"><th scope="row" class="code">x</th>' in found


# WCAG 2.2, success criterion 1.4.3 (text, 4.5 to 1) and 1.4.11 (what is needed to understand graphics, 3 to 1)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(palette: Mapping[str, str]) -> None:
    for ground in ("paper", "panel", "allowed", "marked"):
        for ink in ("ink", "muted", "gone", "stays", "refused", "good", "bad"):
            assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    for shape in ("soft", "light"):
        assert contrast(palette[shape], palette["paper"]) >= 3, shape


def test_every_colour_of_the_sheet_is_in_both_palettes() -> None:
    assert set(LIGHT) == set(DARK)
    assert set(re.findall(r"var\(--([a-z-]+)\)", STYLE)) - {"c"} == set(LIGHT)


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=8), st.integers(2, 8))
def test_an_axis_holds_its_values_and_few_round_numbers(values: list[float], most: int) -> None:
    found = scale.scale_of(values, most=most)
    assert found.low < found.high
    slack = 1e-6 * max(abs(found.low), abs(found.high))
    assert found.low - slack <= min(values) and max(values) <= found.high + slack
    assert 2 <= len(found.ticks) <= most + 2
    places = [found.share(value) for value in sorted(values)]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1


def test_an_axis_of_shares_ends_at_one() -> None:
    assert scale.scale_of([1.0, 1.0], floor=0, ceiling=1).high == 1.0
    assert scale.scale_of([0.0, 3.0], most=7, least_step=1).ticks == (0, 1, 2, 3)


@pytest.mark.parametrize("module", [figures, layers, markup, scale], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0 and found.failed == 0
