"""The report in a real headless Chromium: nothing logged, nothing fetched, nothing cut off, on a phone and in print."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser, executable
from test_reports import REPORTS, html

from mobilekit.types import OperatorBar

PROGRAM = executable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install Debian's chromium to look at the page"),
]
PHONE, DESK, PAPER = 390, 1280, 718
"""Widths in CSS pixels; paper is A4 within Chromium's margins."""
LARGEST = 2_000_000

# What sticks out of the window and is not inside a box that scrolls by itself.
OUTSIDE = """
[...document.querySelectorAll("main *, header *, nav *, footer *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 1 && !e.closest(".scroll") && !e.closest("svg");
}).map(e => e.outerHTML.slice(0, 120))
"""
# Tables that are wider than their box, which only a box that the keyboard reaches may be.
CUT = """
[...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex !== 0)
.map(e => e.textContent.trim().slice(0, 80))
"""
TOO_WIDE_FOR_PAPER = """
[...document.querySelectorAll("table, svg, pre")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
.map(e => e.textContent.trim().slice(0, 80))
"""
# Text inside of pictures that leaves them on the left or lies on other text of the same line.
OVERLAPS = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([, box]) => box.width > 0);
  const found = boxes.filter(([, box]) => box.left < -1 || box.right > innerWidth + 1).map(([text]) => "off: " + text);
  for (const [i, [a, x]] of boxes.entries())
    for (const [b, y] of boxes.slice(i + 1))
      if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 2
          && Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 5) found.push(a + " | " + b);
  return found;
})
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser(PROGRAM, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, report in REPORTS.items():
        found[name] = folder / f"{name.replace(' ', '-')}.html"
        found[name].write_text(html(report()), encoding="utf-8")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_quiet_and_fits(tab: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    tab.show(pages[name], width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert tab.complaints == []
    assert tab.requests == [pages[name].resolve().as_uri()]
    assert pages[name].stat().st_size < LARGEST
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate(CUT) == []


@pytest.mark.parametrize("name", [name for name in REPORTS if name != "hostile"])
def test_texts_of_pictures_do_not_lie_on_each_other(tab: Browser, pages: dict[str, Path], name: str) -> None:
    for width in (PHONE, DESK):
        tab.show(pages[name], width=width)
        tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert tab.evaluate(OVERLAPS) == []


def test_dark_is_dark_and_paper_is_light(tab: Browser, pages: dict[str, Path]) -> None:
    def brightness() -> float:
        colour = tab.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    tab.show(pages["met"], width=DESK, dark=True)
    assert brightness() < 0.2
    tab.print_media(PAPER)
    assert brightness() > 0.95


@pytest.mark.parametrize("name", REPORTS)
def test_paper_shows_everything(tab: Browser, pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    tab.show(pages[name], width=PAPER)
    closed = tab.evaluate("[...document.querySelectorAll('details table')].filter(t => t.checkVisibility()).length")
    assert closed == 0
    tab.print_media(PAPER)
    tables = "[...document.querySelectorAll('details table')]"
    assert tab.evaluate(f"{tables}.every(t => t.getBoundingClientRect().height > 10)")
    assert tab.evaluate(TOO_WIDE_FOR_PAPER) == []
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.complaints == []


def test_the_keyboard_reaches_what_scrolls_and_what_is_folded(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(pages["many devices"], width=PHONE)
    reached = []
    for _ in range(80):
        tab.press("Tab")
        reached.append(
            tab.evaluate(
                "[document.activeElement.tagName, document.activeElement.getAttribute('aria-label') || "
                "document.activeElement.textContent.trim().slice(0, 60), "
                "getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    assert reached[0][:2] == ["A", "Skip to the report"]
    assert all(outline != "none" for tag, _, outline in reached if tag != "BODY")
    assert {"A", "DIV", "SUMMARY"} <= {tag for tag, _, _ in reached}
    names = {text for tag, text, _ in reached if tag == "DIV"}
    assert any(text.startswith("Latency, measured") for text in names)


def test_the_keyboard_opens_and_scrolls(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(pages["many devices"], width=PHONE)
    tab.evaluate("document.querySelector('summary').focus()")
    tab.press("Enter")
    assert tab.evaluate("document.querySelector('details').open")
    wide = "[...document.querySelectorAll('.scroll[tabindex]')].find(e => e.scrollWidth > e.clientWidth + 50)"
    tab.evaluate(f"window.box = {wide}; box.focus()")
    tab.press("ArrowRight")
    tab.evaluate("new Promise(done => setTimeout(done, 400))")
    assert tab.evaluate("box.scrollLeft") > 0


def test_headings_are_in_order_and_everything_has_a_name(tab: Browser, pages: dict[str, Path]) -> None:
    for name in ("many devices", "dry run"):
        tab.show(pages[name], width=DESK)
        levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
        for node in tree:
            if not node["ignored"] and node["role"]["value"] in {"image", "region", "navigation", "link"}:
                assert _name(node), node


def _name(node: dict[str, Any]) -> str:
    return str(node.get("name", {}).get("value", ""))


def test_a_script_in_a_name_does_not_run(tab: Browser, tmp_path: Path) -> None:
    """Even where escaping failed, the policy of the page would stop it: the browser says so."""
    path = tmp_path / "page.html"
    bar = OperatorBar(name="</title><script>document.title='run'</script><img src=x onerror=alert(1)>", kind="k", ms=1)
    page = html(REPORTS["met"]().model_copy(update={"operators_before": (bar,)}))
    path.write_text(page, encoding="utf-8")
    tab.show(path, width=DESK)
    assert tab.evaluate("document.title") != "run"
    assert tab.complaints == []
    path.write_text(page.replace("</h1>", "</h1><script>document.title = 'run'</script>"), encoding="utf-8")
    tab.show(path, width=DESK)
    assert tab.evaluate("document.title") != "run"
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
