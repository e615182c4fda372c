"""The printed estimate: the answer first, a price only with its date, and all that a reader must know."""

import csv
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_estimate import FakeTimes

from tunescope.cost import memory
from tunescope.cost.estimate_paper import paper_rows, table_iv
from tunescope.cost.estimate_table import COLUMNS, answer
from tunescope.cost.paper_model import paper_estimate
from tunescope.cost.time_points import RECIPES
from tunescope.errors import UserError
from tunescope.families import FAMILIES
from tunescope.report.estimate import print_estimate

REPO = Path(__file__).resolve().parents[1]
DATE = r"\d{4}-\d{2}(-\d{2})?"


def printed(capsys: pytest.CaptureFixture[str], **asked: Any) -> str:
    usual: dict[str, Any] = {"data": "math", "gpus": ["a40"], "step_times": FakeTimes()}
    if asked.get("method") == "paper":
        del usual["step_times"]
    assert print_estimate(**usual | asked)
    return capsys.readouterr().out


# --- text ---


def test_the_first_line_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, epochs=10)
    first = text.splitlines()[0]
    number = r"[\d.,]+"
    assert re.fullmatch(
        rf"NVIDIA A40: \d+ per batch, {number} queries/s (\+- \d+|-\d+/\+\d+) %, {number} h, {number} USD "
        rf"\(0\.79 USD/h, CUDO Compute, 2024-08\)",
        first,
    )
    found = answer("mixtral", "math", gpus=["a40"], epochs=10, step_times=FakeTimes()).estimates[0]
    assert found.usd is not None
    assert f"{found.batch_size} per batch" in first
    assert f"{found.usd.median:.2f} USD" in first


def test_no_price_without_its_date(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, gpus=["all"], prices=["h200=3.5"])
    priced = [line for line in text.splitlines() if "USD/h (" in line or "USD (" in line]
    assert len(priced) >= 5
    assert all(re.search(DATE, line) for line in priced)
    unpriced = next(line for line in text.splitlines() if line.startswith("No price is known"))
    assert "NVIDIA B200" in unpriced
    assert "NVIDIA H200" not in unpriced


def test_of_many_gpus_the_cheapest_and_the_fastest_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, gpus=["all"]).splitlines()
    assert lines[2].startswith("Cheapest: ")
    assert lines[1].startswith("NVIDIA B200")
    assert "Fastest: NVIDIA B200" in lines[2]
    (too_small,) = (line for line in lines if line.startswith("Too small: "))
    assert too_small.count(" GiB)") == 4


def test_the_why_names_its_terms_and_they_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, batch=4)
    held, shown = text.split("\n\n")[-3], text.split("\n\n")[-1]
    for table, whole, accuracy in ((held, "all of it", 0.05), (shown, "a step", 0.002)):
        cells = [line.rsplit(None, 1) for line in table.splitlines()[2:]]
        values = {name.strip(): float(value) for name, value in cells}
        assert values.pop(whole) == pytest.approx(sum(values.values()), abs=accuracy)
    assert "frozen weights" in held
    assert "floor" in shown
    assert "The paper's A40 held" not in text


def test_readers_of_the_paper_are_told_why_the_batch_is_larger(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, batch="max")
    assert "The paper's A40 held 3 (Table III) and 4 (Fig. 14) queries a batch" in text
    assert "The paper's A40 held" not in printed(capsys, top_k=4)
    assert "The paper's A40 held" not in printed(capsys, gpus=["l40s"])


def test_bounds_and_extrapolations_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, gpus=["l40s"])
    assert "[extrapolated]" in text.splitlines()[0]
    assert "kWh: < is an upper bound" in text
    assert "extrapolated" not in printed(capsys, gpus=["a40"])


def test_what_fits_nowhere_is_an_answer_and_not_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert not print_estimate("mixtral", "math", gpus=["4090", "l4"], step_times=FakeTimes())
    text = capsys.readouterr().out
    assert text.startswith("mixtral, top-2 of 8 fits none of these GPUs.")
    (line,) = (line for line in text.splitlines() if line.startswith("Too small: "))
    assert "RTX 4090 (23.6 GiB), NVIDIA L4 (22.0 GiB)" in line
    assert line.count("what would fit: a GPU of 32 GB") == 1


# --- csv and json ---


def test_csv_and_json_hold_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": ["a40", "l40s", "4090"], "batch": 4}
    by_json = json.loads(printed(capsys, format="json", **asked))
    by_csv = list(csv.DictReader(io.StringIO(printed(capsys, format="csv", **asked))))
    assert [tuple(row) for row in by_json] == [COLUMNS] * 3
    for one, other in zip(by_csv, by_json, strict=True):
        assert {name: "" if value is None else str(value) for name, value in other.items()} == one
    assert [row["status"] for row in by_json] == ["ok", "ok", "too small"]


@pytest.mark.parametrize(("asked", "words"), [({"format": "xml"}, "xml"), ({"method": "guess"}, "guess")])
def test_unknown_words_are_refused(asked: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        print_estimate("mixtral", "math", step_times=FakeTimes(), **asked)


# --- the paper's method ---


def test_the_papers_method_is_its_equations_and_says_what_table_iv_implies(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, method="paper", gpus=["all"], epochs=10)
    lines = text.splitlines()
    known = paper_estimate("mixtral", "math", 48, "sparse", num_queries=13_921, epochs=10, gpu="a40")
    assert known.cost_usd is not None
    assert lines[0].startswith("a40: 4 per batch, 0.985 queries/s")
    assert f"{known.cost_usd:.2f} USD (0.79 USD/h" in lines[0]
    assert "1.005 queries/s: 38.5 h, 30.38 USD" in lines[1]  # as measured at that batch
    assert "no price: Table IV has none of a100-40gb" in next(line for line in lines if line.startswith("a100-40gb"))
    assert all(re.search(DATE, line) for line in lines[:8] if "USD/h" in line)
    assert "10 epochs of 15,000 queries" in text
    for row in table_iv():
        assert (
            f"{row.gpu} at batch {row.batch_size}: {row.by_equation_usd:.2f} where it prints {row.printed_usd:g} "
            f"({row.difference_percent:+.1f} %)" in text
        )
    implied = printed(capsys, method="paper", gpus=["all"], epochs=10, queries=15_000).splitlines()
    assert "33.40 USD" in implied[0]
    assert "32.74 USD" in implied[1]  # Table IV prints 32.7
    assert "10 per batch (the paper ran up to 17)" in next(line for line in implied if line.startswith("a100-80gb"))
    beyond = printed(capsys, method="paper", gpus=["a40"], batch=9)
    assert "9 per batch (beyond Equation 1, by which 4 fit; the paper ran up to 4)" in beyond
    (row,) = json.loads(printed(capsys, method="paper", queries=15_000, epochs=10, format="json"))
    assert row["measured_cost_usd"] == pytest.approx(32.7374, abs=1e-3)


def test_table_iv_comes_out_at_its_own_batches_and_queries_as_near_as_equation_2_is() -> None:
    """It is of measured throughput, which the curve misses by 2, 0.4 and 10 %."""
    asked: dict[str, Any] = {"epochs": 10, "queries": 15_000}
    found = paper_rows("mixtral", "math", gpus=["a40"], batch=4, **asked)
    found += paper_rows("mixtral", "math", gpus=["a100-80gb", "h100-80gb"], batch=17, **asked)
    for each, printed_usd, error_frac in zip(found, (32.7, 25.4, 17.9), (0.03, 0.005, 0.105), strict=True):
        assert each.cost_usd == pytest.approx(printed_usd, rel=error_frac)


def test_the_papers_method_takes_ones_own_price_and_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (row,) = json.loads(printed(capsys, method="paper", prices=["a40=0.4", "l4=1"], format="json"))
    assert row["price_usd_per_hour"] == 0.4
    assert re.fullmatch(rf"user, {DATE}", row["price_source"])
    assert row["cost_usd"] == pytest.approx(0.4 * row["hours"])
    for asked, words in (
        ({"top_k": 2}, "--top-k"),
        ({"moe": "grouped"}, "--moe"),
        ({"gpus": ["l40s"]}, "L40S|l40s"),
        ({"data": "mine.json"}, "no number of queries"),
        ({"sparsity": "thin"}, "thin"),
        ({"model": "qwen3_moe"}, "qwen3_moe"),
        ({"gpus": [""]}, "names no GPU"),
        ({"epochs": 1e308}, "--epochs"),
        ({"queries": 10**22}, "--queries"),
        ({"batch": "fastest"}, "fastest"),
    ):
        with pytest.raises(UserError, match=words):
            print_estimate(**{"model": "mixtral", "data": "math", "gpus": ["a40"], "method": "paper"} | asked)


# --- what it rests on ---


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_packaged_recipes_are_those_of_the_launchers(family: Any) -> None:
    written = yaml.safe_load((REPO / "LLaMA-Factory" / family.recipe).read_text())
    packaged = RECIPES[family.name]
    assert {key: written.get(key) for key in packaged} == packaged
    config = family.config_at(family.full, family.full["num_hidden_layers"], family.sparse_top_k)
    for batch, length in ((1, 128), (8, 512)):
        assert memory.peak(config, packaged, batch, length) == memory.peak(config, written, batch, length)


def test_it_answers_in_a_second_without_torch() -> None:
    code = (
        "import sys; from tunescope.report.estimate import print_estimate; "
        "print_estimate('mixtral', 'math', gpus=['all'], epochs=10); "
        "print(*sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    seconds = []
    for _attempt in range(5):  # the best of several: other work may share the cores
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO / "src"
        )
        seconds.append(time.perf_counter() - start_s)
        assert done.stderr.split() == []
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
