"""The report's page in a real browser: quiet, alone, on a phone, sorted, and as axe-core would have it."""

import json
import os
from pathlib import Path

import helpers_browser
import pytest
from helpers_report import hostile_folder, mixed_folder

from tunescope.report.page.build import write_report

H200 = Path(__file__).parents[1] / "docs" / "results" / "h200"
AXE = Path(__file__).parents[1] / ".pytest_cache" / "axe-core-4.10.3" / "axe.min.js"  # where page_browser.sh puts it
PICTURES = os.environ.get("TUNESCOPE_PAGE_PICTURES")  # a folder: screenshots for looking at are left there
PROGRAM = helpers_browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="NO CHROMIUM: the page was not opened in a browser (apt-get install chromium)"
)
WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = helpers_browser.Browser(str(PROGRAM), tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    slow, fast = mixed_folder(folder / "slow"), mixed_folder(folder / "fast", factor=0.5)
    return {
        "h200": write_report(H200, None, folder / "h200"),
        "mixed": write_report(slow, None, folder / "mixed"),
        "compared": write_report(slow, fast, folder / "compared"),
        "hostile": write_report(hostile_folder(folder / "points"), None, folder / "hostile"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["h200", "mixed", "compared", "hostile"])
def test_a_page_is_quiet_alone_and_no_wider_than_its_window(browser, pages, name: str, width: int, dark: bool) -> None:
    browser.console.clear()
    browser.requests.clear()
    browser.open(pages[name], width, dark=dark)
    assert browser.console == []
    outside = [url for url in browser.requests if url != pages[name].resolve().as_uri() and not url.startswith("data:")]
    assert outside == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Every picture has a size, and stays in its column.
    sizes = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert sizes
    assert all(0 < wide <= width and high > 20 for wide, high in sizes)
    if PICTURES:
        browser.picture(Path(PICTURES) / f"{name}_{width}_{'dark' if dark else 'light'}.png")


PAPERS_SECTIONS = (
    *(f"figure{number}" for number in (2, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15)), "table3", "table4", "validation",
)  # fmt: skip


@pytest.mark.parametrize("name", ["h200", "mixed", "compared", "hostile"])
def test_every_figure_is_painted(browser, pages, name: str) -> None:
    browser.open(pages[name], 1400)
    marks = browser.evaluate(  # of each picture: bars and marks, and lines by the first colour, that have an extent
        """Object.fromEntries([...document.querySelectorAll('main section')].map(section => [section.id,
          [...section.querySelectorAll('figure svg')].map(picture =>
            [...picture.querySelectorAll('g[id*="mark-"], path[style*="#0072b2" i]')].filter(mark => {
              const box = mark.getBBox();
              return box.width > 0 || box.height > 0;
            }).length)]))"""
    )
    for section in PAPERS_SECTIONS:
        assert marks[section], section
        assert all(count > 0 for count in marks[section]), section
    with_notes = browser.evaluate(
        "[...document.querySelectorAll('main section')].filter(s => !s.querySelector('figure')).map(s => "
        "[s.id, s.querySelector('.note, .findings') !== null])"
    )
    assert all(says for _, says in with_notes)  # a section without a picture says why


def test_every_column_of_every_table_sorts(browser, pages) -> None:
    """Each click keeps the rows, orders the numbers, and leaves what is missing at the end."""
    browser.open(pages["mixed"], 1400)
    wrong = browser.evaluate(
        """(() => {
        const wrong = [];
        for (const table of document.querySelectorAll('table.sortable')) {
          const texts = () => [...table.tBodies[0].rows].map(r => r.textContent).sort().join('|');
          const before = texts();
          [...table.tHead.rows[0].cells].forEach((head, n) => {
            for (const sign of [1, -1]) {
              head.querySelector('button').click();
              const found = [...table.tBodies[0].rows].map(r => r.cells[n].dataset.sort);
              const numbers = found.filter(v => v !== undefined).map(Number);
              const isOrdered = numbers.every((v, i) => i === 0 || sign * (v - numbers[i - 1]) >= 0);
              const isLast = found.slice(0, numbers.length).every(v => v !== undefined);
              if (!isOrdered || !isLast || texts() !== before) wrong.push([table.id, n, sign]);
            }
          });
        }
        return [document.querySelectorAll('table.sortable').length, wrong];
        })()"""
    )
    assert wrong[0] > 10
    assert wrong[1] == []


def test_tables_sort_by_number_and_back(browser, pages) -> None:
    browser.open(pages["h200"], 1400)
    column = (
        "(() => { const t = document.getElementById('throughput-table');"
        "const n = [...t.tHead.rows[0].cells].findIndex(c => c.textContent === 'queries/s');"
        "return [t.tHead.rows[0].cells[n], [...t.tBodies[0].rows].map(r => r.cells[n].dataset.sort)]; })()"
    )
    before = browser.evaluate(f"{column}[1]")
    assert browser.evaluate(f"{column}[0].querySelector('button') !== null")
    for direction, is_reversed in (("ascending", False), ("descending", True)):
        browser.evaluate(f"{column}[0].querySelector('button').click()")
        assert browser.evaluate(f"{column}[0].getAttribute('aria-sort')") == direction
        assert browser.evaluate(f"{column}[1]") == sorted(before, key=float, reverse=is_reversed)


def test_without_scripts_everything_is_there(browser, pages) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["mixed"], 1400)
        document = browser.command("DOM.getDocument", depth=-1)["root"]
        html = browser.command("DOM.getOuterHTML", nodeId=document["nodeId"])["outerHTML"]
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    assert html.count("<figure>") > 10
    assert "<button" not in html
    assert "throughput-table" in html


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core, which test.sh has fetched, or that of TUNESCOPE_AXE=/path/to/axe.min.js. Never from a network here."""
    file = Path(os.environ.get("TUNESCOPE_AXE") or AXE)
    if not file.is_file():
        pytest.skip(f"no {file}: axe-core was not run on the page (./test.sh fetches it where npm is)")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("compared", 1400, False), ("hostile", 390, True)],
)
def test_axe_finds_no_serious_violation(browser, pages, axe: str, name: str, width: int, dark: bool) -> None:
    browser.open(pages[name], width, dark=dark)
    browser.evaluate(f"{axe}; 0")
    found = json.loads(browser.evaluate("axe.run(document).then(r => JSON.stringify([r.passes.length, r.violations]))"))
    num_passed, violations = found
    assert num_passed > 20
    serious = [
        (each["id"], each["impact"], [node["html"][:120] for node in each["nodes"][:3]])
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious
