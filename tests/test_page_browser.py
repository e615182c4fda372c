"""The report's page in a real browser: quiet, alone, on a phone, sorted, and as axe-core would have it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import helpers_browser
import pytest
from helpers_report import mixed_folder

from tunescope.report.page.build import write_report

H200 = Path(__file__).parents[1] / "docs" / "results" / "h200"
AXE = "axe-core@4.10.3"  # MPL-2.0: fetched for the test, not kept here
PICTURES = os.environ.get("TUNESCOPE_PAGE_PICTURES")  # a folder: screenshots for looking at are left there
PROGRAM = helpers_browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium: the page was not opened in a browser (apt-get install chromium)"
)
WIDTHS = (390, 1280)


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
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["h200", "mixed", "compared"])
def test_a_page_is_quiet_alone_and_no_wider_than_its_window(browser, pages, name: str, width: int) -> None:
    browser.console.clear()
    browser.requests.clear()
    browser.open(pages[name], width, dark=name == "mixed")
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
        browser.picture(Path(PICTURES) / f"{name}_{width}.png")


def test_tables_sort_by_number_and_back(browser, pages) -> None:
    browser.open(pages["h200"], 1280)
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
        browser.open(pages["mixed"], 1280)
        document = browser.command("DOM.getDocument", depth=-1)["root"]
        html = browser.command("DOM.getOuterHTML", nodeId=document["nodeId"])["outerHTML"]
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    assert html.count("<figure>") > 10
    assert "<button" not in html
    assert "throughput-table" in html


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    given = os.environ.get("TUNESCOPE_AXE")  # axe.min.js, where there is no network
    if given:
        return Path(given).read_text(encoding="utf-8")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm: axe-core was not run on the page")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--no-save", "--ignore-scripts", "--prefix", str(folder), AXE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not answer: axe-core was not run on the page")
    if done.returncode:
        pytest.skip(f"npm could not fetch {AXE}: axe-core was not run on the page")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "dark"), [("mixed", True), ("compared", False)], ids=["dark", "light"])
def test_axe_finds_no_serious_violation(browser, pages, axe: str, name: str, dark: bool) -> None:
    browser.open(pages[name], 1280, dark=dark)
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
