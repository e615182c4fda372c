"""docs/troubleshooting.md quotes what is printed: each message is a text of the source, links have targets."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "troubleshooting.md"
DOCS = ("troubleshooting.md", "report.md", "breakdown.md", "measuring.md")
ELLIPSIS = "..."
FOREIGN = "CUDA out of memory"  # torch's words
SHORTEST = 12  # characters that a text of the source must have to be one: not a comma, a unit, a name


def quoted() -> list[str]:
    """First lines of the page's text blocks, which are messages; `...` stands for what varies."""
    text = PAGE.read_text(encoding="utf-8")
    return [block.splitlines()[0] for block in re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)]


@cache
def source_texts() -> list[str]:
    """Every text of the package and of the tests' shell script, `...` where a value is put in."""
    found = []
    for path in (REPO / "src" / "tunescope").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    script = (REPO / "tests" / "page_browser.sh").read_text(encoding="utf-8")
    found += [text.replace("$1", ELLIPSIS) for text in re.findall(r'echo "([^"]+)"', script)]
    return [text for text in found if len(text.replace(ELLIPSIS, "")) >= SHORTEST]


def pieces(text: str) -> list[str]:
    """What does not vary, in its order."""
    return [part.strip(" .") for part in text.split(ELLIPSIS) if part.strip(" .")]


def is_printed(message: str) -> bool:
    """Whether some text of the source has the message's pieces in their order."""
    pattern = ".*".join(map(re.escape, pieces(message)))
    return any(re.search(pattern, text, flags=re.DOTALL) for text in source_texts())


@pytest.mark.parametrize("message", [text for text in quoted() if FOREIGN not in text])
def test_a_quoted_message_is_one_that_is_printed(message: str) -> None:
    for value in (
        "SIGKILL (killed from outside, or by the system for lack of memory)",
        "580",
        "mamba-ssm",
    ):  # said on the page, put in by the source
        message = message.replace(value, ELLIPSIS)
    assert is_printed(message), message


def test_a_message_that_nothing_prints_is_found_out() -> None:
    assert not is_printed("the GPU is made of ... cheese")
    assert len(quoted()) >= 25


def anchor(heading: str) -> str:
    """GitHub's: small letters, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name: str) -> None:
    text = (REPO / "docs" / name).read_text(encoding="utf-8")
    for target, fragment in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        file = REPO / "docs" / (target or name)
        assert file.is_file(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), fragment


def test_the_step_is_drawn_in_straight_lines() -> None:
    text = (REPO / "docs" / "breakdown.md").read_text(encoding="utf-8")
    (drawing,) = (block for block in re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL) if "step_s" in block)
    lines = {line[:8].strip(): line for line in drawing.splitlines()}
    edges = [place for place, character in enumerate(lines["marks"]) if character == "^"]
    assert [place for place, character in enumerate(lines["GPU"]) if character == "|"] == edges
    phases = [place for place, character in enumerate(lines["phases"]) if character == "|"]
    assert len(phases) == 7  # six phases of PHASES less recompute, with rest at both ends
    assert set(phases) < set(edges)
    assert max(map(len, drawing.splitlines())) <= 120
