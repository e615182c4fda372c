"""The benchmark beside other tools: its CSV, its page, and what becomes of a tool that is missing or fails.

The other tools are not run here; that our own rows are what the repository's data give is.
"""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "bench" / "peers.py"
PAGE = REPO / "docs" / "peers.md"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_peers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


peers = load()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> tuple[str, ...]:
    return row["tool"], row["model"], row["point"], row["quantity"]


@pytest.fixture(scope="module")
def packaged() -> list[dict[str, str]]:
    return read(peers.CSV)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has no packages."""
    path = tmp_path_factory.mktemp("bare") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def bare_run(
    bare_python: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, str]], subprocess.CompletedProcess[str]]:
    """Of the whole benchmark where no other tool is installed, over the points that the packaged rows name: what was
    measured since then is no reason to run the other tools again."""
    out = tmp_path_factory.mktemp("bench") / "rows.csv"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--python", bare_python, "--out", str(out), "--points-of", str(peers.CSV)],
        env=os.environ | {"PYTHONPATH": str(REPO / "src")},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return read(out), done


def test_the_page_has_the_table_of_the_csv(packaged: list[dict[str, str]]) -> None:
    assert f"\n\n{peers.table(packaged)}\n\n" in PAGE.read_text(encoding="utf-8")


def test_the_page_names_the_versions_that_were_run(packaged: list[dict[str, str]]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for row in packaged:
        if row["tool"] in peers.PEERS:
            distribution = peers.PEERS[row["tool"]][0]
            assert any(
                distribution in line and f"| {row['version']} |" in line for line in page.splitlines() if "|" in line
            )


def test_our_rows_are_what_the_repository_gives(
    packaged: list[dict[str, str]],
    bare_run: tuple[list[dict[str, str]], subprocess.CompletedProcess[str]],
) -> None:
    fresh = {key(row): row for row in bare_run[0] if row["tool"] not in peers.PEERS}
    ours = {key(row): row for row in packaged if row["tool"] not in peers.PEERS}
    assert {row["tool"] for row in ours.values()} == {
        peers.OURS, peers.OLD_NF4, peers.GPU_UNSEEN, peers.POINT_LEFT_OUT,
    }  # fmt: skip
    assert set(fresh) == set(ours)
    for name, row in ours.items():
        assert float(fresh[name]["measured"]) == pytest.approx(float(row["measured"]), rel=1e-5), name
        assert bool(fresh[name]["predicted"]) == bool(row["predicted"])
        if row["predicted"]:
            # Fits of step times differ in the last digits from one linear algebra to another.
            assert float(fresh[name]["predicted"]) == pytest.approx(float(row["predicted"]), rel=1e-3), name


def test_points_measured_since_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that the rows do not name is neither asked about nor learned from."""
    points = [
        point for point in peers.read_points(peers.H200) if point.model == "mixtral" and point.moe_path == "stock"
    ]
    named = frozenset((point.model, point.source) for point in points[1:])
    monkeypatch.setattr(peers, "memory_asks", lambda named: iter(()))
    monkeypatch.setattr(peers, "max_batch_asks", lambda: iter(()))
    monkeypatch.setattr(peers.validation, "held_out", lambda own, splits: seen.append(list(own)) or [])
    seen: list[list] = []
    peers.own_rows(named)
    assert [point.source for point in seen[0]] == [point.source for point in points[1:]]
    peers.own_rows(None)
    assert {point.source for point in points} < {point.source for point in seen[1]}
    assert {point.model for point in seen[1]} == set(peers.MODELS)


def test_our_own_paths_are_no_matter_of_the_others() -> None:
    assert peers.is_asked_about("mixtral", "stock", "a", None)
    assert peers.is_asked_about("blackmamba", "grouped", "a", frozenset({("blackmamba", "a")}))
    for model, path, named in [
        ("mixtral", "grouped", None), ("qwen3_moe", "stock", None), ("blackmamba", "loop", None),
        ("mixtral", "stock", frozenset({("mixtral", "b"), ("blackmamba", "a")})),
    ]:  # fmt: skip
        assert not peers.is_asked_about(model, path, "a", named)


def test_our_rows_alone_can_be_made_anew(packaged: list[dict[str, str]], tmp_path: Path) -> None:
    out, page = tmp_path / "rows.csv", tmp_path / "page.md"
    page.write_text(f"before\n\n{peers.table(packaged).splitlines()[0]}\n| an old row |\n\nafter\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--points-of", str(peers.CSV), "--ours", "--out", str(out), "--page", str(page)],
        env=os.environ | {"PYTHONPATH": str(REPO / "src")},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = read(out)
    assert [row for row in made if row["tool"] in peers.PEERS] == [
        row for row in packaged if row["tool"] in peers.PEERS
    ]
    assert {key(row) for row in made} == {key(row) for row in packaged}
    assert page.read_text(encoding="utf-8") == f"before\n\n{peers.table(made)}\n\nafter\n"


def test_no_step_of_ours_was_forecast_by_a_fit_that_saw_it(packaged: list[dict[str, str]]) -> None:
    splits = {row["note"] for row in packaged if row["tool"] not in peers.PEERS and row["quantity"] == peers.STEP}
    assert splits == set(peers._TIME_SPLITS)


def test_each_tool_was_asked_everything_once(packaged: list[dict[str, str]]) -> None:
    assert len({key(row) for row in packaged}) == len(packaged)
    asked = {key(row)[1:] for row in packaged}
    for tool in peers.PEERS:
        assert {key(row)[1:] for row in packaged if row["tool"] == tool} == asked
    assert {quantity for _, _, quantity in asked} == set(peers.QUANTITIES)


def test_a_row_has_an_answer_or_says_why_not(packaged: list[dict[str, str]]) -> None:
    for row in packaged:
        assert float(row["measured"]) > 0
        if row["ratio"]:
            assert float(row["ratio"]) == pytest.approx(float(row["predicted"]) / float(row["measured"]), rel=2e-3)
            assert not row["note"].startswith("no answer")
        else:
            assert row["predicted"] == ""
            assert row["note"].startswith("no answer: ")
            assert len(row["note"]) > len("no answer: ")


def test_without_the_tools_the_rows_say_so(
    bare_run: tuple[list[dict[str, str]], subprocess.CompletedProcess[str]],
) -> None:
    rows, done = bare_run
    others = [row for row in rows if row["tool"] in peers.PEERS]
    assert {row["tool"] for row in others} == set(peers.PEERS)
    assert {(row["version"], row["predicted"], row["ratio"], row["note"]) for row in others} == {
        ("", "", "", "not installed")
    }
    assert done.stdout.strip() == peers.table(rows)


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("raise SystemExit('it broke')", "no answer: it broke"),
        ("print('[not json')", "no answer: it printed no answers"),
        ("import time; time.sleep(60)", "no answer: none within 2 s"),
        ("answers(lambda ask: 1 / 0)", "no answer: ZeroDivisionError: division by zero"),
        ("def no(ask): raise NoAnswer('knows it not. More.')\nanswers(no)", "no answer: knows it not"),
    ],
)
def test_a_tool_that_fails_gets_rows_that_say_how(monkeypatch: pytest.MonkeyPatch, code: str, note: str) -> None:
    monkeypatch.setitem(peers.PEERS, "broken", ("pytest", code))
    asks = list(peers.max_batch_asks())[:2]
    rows = peers.peer_rows("broken", asks, [sys.executable], 2)
    assert [(row.version, row.predicted, row.note) for row in rows] == [(pytest.__version__, None, note)] * 2


def test_a_tool_is_run_in_the_first_python_that_has_it(monkeypatch: pytest.MonkeyPatch, bare_python: str) -> None:
    code = "answers(lambda ask: (2 * ask.batch_size, ask.gpu))"
    monkeypatch.setitem(peers.PEERS, "doubling", ("pytest", code))
    asks = list(peers.max_batch_asks())
    rows = peers.peer_rows("doubling", asks, [bare_python, sys.executable], 60)
    assert [(row.predicted, row.note) for row in rows] == [(2 * ask.batch_size, ask.device.name) for ask in asks]


def test_a_python_that_is_not_there_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--python", "/no/such/python"],
        env=os.environ | {"PYTHONPATH": str(REPO / "src")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "/no/such/python" in done.stderr


def test_numbers_of_weights_that_tools_are_told() -> None:
    """Mixtral's by hand; the allocator's rounding of the smallest tensors is all that may be added."""
    config = next(ask.config for ask in peers.max_batch_asks() if ask.model == "mixtral")
    layer = 4096 * (2 * 4096 + 2 * 1024) + 8 * (3 * 4096 * 14336 + 4096) + 2 * 4096
    by_hand = 32 * layer + 2 * 32000 * 4096 + 4096
    assert peers.num_parameters(json.dumps(dict(config), sort_keys=True)) == pytest.approx(by_hand, rel=1e-5)


def test_the_table_by_hand() -> None:
    def row(tool: str, ratio: str) -> dict[str, str]:
        return {"quantity": peers.STEP, "model": "mixtral", "tool": tool, "ratio": ratio}

    lines = peers.table([row("a", "2"), row("a", "0.5"), row("a", "1"), row("b", ""), row("c", "0")]).splitlines()
    assert lines[2:] == [
        f"| step_s | mixtral | a | 3 of 3 | 1.000 | {math.log(2):.3f} | {math.log(2):.3f} |",
        "| step_s | mixtral | b | 0 of 1 | - | - | - |",
        "| step_s | mixtral | c | 1 of 1 | 0.000 | inf | inf |",
    ]
