"""The page of a merge in a real browser: it loads nothing, complains of nothing, and what it shows has room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cadapt.merging.report import MergeReport
from cadapt.report.page import render
from tests.report.chromium import Browser, Page, chromium, find_chromium
from tests.report.merges import exact_report, report

WIDE, NARROW = 1280, 400
# places are of all letters that are drawn; a table may be wider than the window, as it scrolls in its frame
MEASURE = """
(() => {
  const shown = node => node.checkVisibility();
  const outer = [...document.querySelectorAll("svg")].filter(svg => !svg.ownerSVGElement && shown(svg));
  const box = node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const framed = node => node.closest(".frame") !== null;
  const beyond = [...document.body.querySelectorAll("*")].filter(node => !framed(node) && shown(node)
    && !node.closest("caption, .heard") && (box(node)[0] < -0.5 || box(node)[2] > innerWidth + 0.5));
  return {
    svgs: outer.map(box),
    plots: outer.filter(svg => svg.getAttribute("role") === "img").map(
      svg => [...svg.querySelectorAll("text")].map(text => [text.textContent, ...box(text)])),
    beyond: beyond.map(node => node.outerHTML.slice(0, 120)),
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    colour: getComputedStyle(document.documentElement).backgroundColor,
    styled: getComputedStyle(document.querySelector(".tiles, main")).display,
  };
})()
"""


def long_names() -> MergeReport:
    found = report(5, base="vit_base_patch16_clip_" * 4)
    rows = tuple(replace(row, site="stages.3.blocks_with_a_long_name." * 3 + row.site) for row in found.sites)
    return replace(found, sites=rows)


REPORTS = {
    "all": report(16),
    "sixty": report(60, tolerance_met=False),
    "long": long_names(),
    "one": exact_report(1),
    "none": exact_report(0),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the path: on Debian, apt-get install chromium")
    with chromium(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started


def opened(browser: Browser, folder: Path, page: str) -> tuple[Page, str]:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    return browser.open(path.as_uri(), WIDE), path.as_uri()


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_loads_nothing_complains_of_nothing_and_has_room(name: str, browser: Browser, tmp_path: Path) -> None:
    page, url = opened(browser, tmp_path, render(REPORTS[name]))
    assert page.requests == [url]
    assert page.held_back == page.complaints == []
    for width in (WIDE, NARROW):
        page.resize(width)
        check_layout(page.evaluate(MEASURE), width)


def check_layout(found: dict[str, Any], width: int) -> None:
    assert found["window"] == width
    assert found["styled"] in ("grid", "block")
    assert found["width"] <= width
    assert found["beyond"] == []
    for left, top, right, bottom in found["svgs"]:
        assert right - left >= 9 and bottom - top >= 9
    for texts in found["plots"]:
        assert overlapping(texts) == []
        assert all(right - left > 3 and bottom - top > 6 for _, left, top, right, bottom in texts)


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    """The pairs of texts of which one covers the other by more than a hair."""
    return [
        (one[0], other[0])
        for at, one in enumerate(texts)
        for other in texts[at + 1 :]
        if min(one[3], other[3]) - max(one[1], other[1]) > 0.5 and min(one[4], other[4]) - max(one[2], other[2]) > 2
    ]


def test_dark_pages_for_who_prefers_them(browser: Browser, tmp_path: Path) -> None:
    page, _ = opened(browser, tmp_path, render(REPORTS["one"]))
    page.prefer("light")
    assert page.evaluate(MEASURE)["colour"] == "rgb(255, 255, 255)"
    page.prefer("dark")
    assert page.evaluate(MEASURE)["colour"] == "rgb(18, 22, 27)"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<script>console.error('broken')</script>", "broken"),
        ("<script>console.warn('odd')</script>", "odd"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
    ],
)
def test_the_browser_tells_of_complaints(body: str, said: str, browser: Browser, tmp_path: Path) -> None:
    page, _ = opened(browser, tmp_path, f"<!doctype html><title>x</title>{body}")
    assert any(said in complaint for complaint in page.complaints)


def test_the_browser_tells_of_requests(browser: Browser, tmp_path: Path) -> None:
    page, url = opened(browser, tmp_path, "<!doctype html><title>x</title><img src='http://127.0.0.1:9/x.png'>")
    assert page.requests == [url, "http://127.0.0.1:9/x.png"]


def test_the_policy_stops_scripts_pictures_and_foreign_styles(browser: Browser, tmp_path: Path) -> None:
    intruders = "<script>document.title='taken'</script><img src='http://127.0.0.1:9/x.png'><p style='color:red'>"
    page, url = opened(browser, tmp_path, render(REPORTS["one"]).replace("</main>", f"{intruders}</main>"))
    assert page.evaluate("document.title") != "taken"
    assert page.requests == [url]
    assert page.held_back == ["http://127.0.0.1:9/x.png"]
    assert len(page.complaints) >= 3


def test_the_layout_check_sees_what_it_should(browser: Browser, tmp_path: Path) -> None:
    texts = "".join(f"<text x='{x}' y='20'>figure</text>" for x in (0, 10))
    page, _ = opened(browser, tmp_path, f"<!doctype html><main><svg role='img' width='3000' height='30'>{texts}</svg>")
    found = page.evaluate(MEASURE)
    assert overlapping(found["plots"][0]) == [("figure", "figure")]
    assert len(found["beyond"]) == 1 and found["width"] > WIDE
