"""The report's page: its numbers are the parsers', its markup holds, nothing from a file gets out of its place."""

import itertools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_points import MS, cpu_environment, gpu_environment, link_copies, write_point
from helpers_report import Page, hostile_folder, mixed_folder, point
from hypothesis import given
from hypothesis import strategies as st

from tunescope.analyze.intervals import bootstrap_ratio
from tunescope.analyze.latency_tables import latency_tables
from tunescope.analyze.throughput import throughput
from tunescope.cost.prices import read_user_prices
from tunescope.errors import UserError
from tunescope.report.compare import FASTER, NO_INTERVAL, NOISE, SLOWER, compare, ratio_interval, verdict
from tunescope.report.figures import papers
from tunescope.report.figures import throughput as rates
from tunescope.report.figures.chart import HIGHER, LOWER
from tunescope.report.page.build import write_report
from tunescope.report.page.clean import clean_cause, clean_text
from tunescope.report.text import number

H200 = Path(__file__).parents[1] / "docs" / "results" / "h200"
MAX_REPORT_S = 20.0
SECTIONS = (
    "summary", "figure2", "figure4", "figure5", "figure6", "figure8", "figure9", "figure10", "figure11", "figure13",
    "figure14", "figure15", "table3", "table4", "recompute", "busy", "memory", "roofline", "energy", "money",
    "validation", "paths",
)  # fmt: skip


def report(folder: Path, out: Path, other: Path | None = None, **more) -> tuple[Page, str]:
    html = write_report(folder, other, out, **more).read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def h200(tmp_path_factory) -> tuple[Page, str]:
    return report(H200, tmp_path_factory.mktemp("h200"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Page, str]:
    folder = tmp_path_factory.mktemp("mixed")
    return report(mixed_folder(folder / "points"), folder / "out")


# --- numbers ---


def test_throughput_on_the_page_is_the_parsers(h200) -> None:
    table = throughput(H200)
    table = table[(table["status"] == "ok") & ~table["is_shallow_end"]]
    for header, column in (
        ("queries/s", "queries_per_s"), ("s/step", "step_s"), ("tokens/s", "tokens_per_s"), ("MFU %", "mfu_pct"),
        ("J/query", "gpu_energy_j_per_query"), ("A40 paper", "paper_a40_queries_per_s"), ("ratio", "ratio_to_paper"),
    ):  # fmt: skip
        cells = h200[0].column("throughput-table", header)
        wanted = [None if pd.isna(value) else value for value in table[column]]
        assert [float(sort) if sort else None for _, sort in cells] == wanted, header
        assert [text for text, _ in cells] == [number(value) for value in table[column]], header


def test_phases_on_the_page_are_the_parsers(h200) -> None:
    phases = latency_tables(H200 / "blackmamba" / "latency").phases
    cells = h200[0].column("figure04_phases-table", "measured: forward")
    shown = [float(sort) for _, sort in cells if sort]  # none where the folder lacks the paper's bar
    assert shown == phases.loc[phases["phase"] == "forward", "duration_s"].tolist()


def test_findings_are_computed_from_the_points(h200, tmp_path: Path) -> None:
    table = throughput(H200)
    best = table.loc[table["model"].eq("blackmamba"), "queries_per_s"].max()
    assert f"blackmamba, NVIDIA H200, preset full: up to {number(best)} queries/s" in h200[0].text
    folder = mixed_folder(tmp_path / "points", factor=0.5)
    rates_of_both = throughput(folder).set_index("point_id")["queries_per_s"]
    sparse, dense = rates_of_both["cs-k2-b1-full-nvidia-a40"], rates_of_both["cs-k8-b1-full-nvidia-a40"]
    halved = report(folder, tmp_path / "out")[0].text
    assert f"up to {number(sparse)} queries/s (cs sparse 1," in halved
    assert f"sparse trains {number(sparse / dense)} times as many queries/s as dense at batch 1" in halved
    assert "the GPU is idle 6.69 to 67.3 % of a step" in h200[0].text


def test_five_findings_always_stand_there_and_say_what_lacks(mixed, h200) -> None:
    for page, html in (mixed, h200):
        findings = [tag for tag, found in page.tags if "finding" in (found.get("class") or "").split()]
        assert len(findings) == 5
        assert html.count("Left out:") == html.count('omitted"')
    assert "Left out: no breakdown is whole" in mixed[0].text
    num_timed_queries = 17  # 20 steps of one, the first three warm-up
    assert f"1,000 queries take {number(5000.0 / num_timed_queries)} kJ at the least" in mixed[0].text
    assert re.search(r"USD \(cs .*CUDO Compute, 2024-08", mixed[0].text)


def test_a_price_of_the_users_own_counts(tmp_path: Path) -> None:
    prices = read_user_prices(["h200=3.60"])
    page, _ = report(H200 / "throughput", tmp_path, prices=prices)
    best = throughput(H200 / "throughput")["queries_per_s"].max()
    assert f"{number(1000 / best / 3600 * 3.6)} USD" in page.text
    assert "no price for" not in page.text


def test_points_without_numbers_are_shown_with_status_and_cause(mixed) -> None:
    rows = {row[0][0]: [text for text, _ in row[1:]] for row in mixed[0].tables["statuses-1"][1:]}
    assert rows["cs-k2-b8-full-nvidia-a40"] == ["oom", "CUDA out of memory: tried 2 GiB"]
    status, cause = rows["cs-k8-b2-full-nvidia-a40"]
    assert status == "failed"
    assert "data.json" in cause
    assert "/home" not in cause
    table = mixed[0].tables["figure08_throughput-table"]
    assert ["oom" in [text for text, _ in row] for row in table].count(True) == 1


# --- markup ---


@pytest.mark.parametrize("name", ["h200", "mixed"])
def test_the_page_holds_together(name: str, request) -> None:
    page, html = request.getfixturevalue(name)
    assert page.is_balanced
    assert len(page.ids) == len(set(page.ids))
    assert set(SECTIONS) <= set(page.ids)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = set(page.ids)
    for tag, found in page.tags:
        for attribute in ("aria-labelledby", "aria-describedby"):
            assert set((found.get(attribute) or "").split()) <= ids, tag
        if (found.get("href") or "").startswith("#"):
            assert found["href"][1:] in ids
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= ids
    names = {tag for tag, _ in page.tags}
    assert {"header", "nav", "main", "footer"} <= names


@pytest.mark.parametrize("name", ["h200", "mixed"])
def test_nothing_is_asked_of_a_network(name: str, request) -> None:
    page, html = request.getfixturevalue(name)
    for tag, found in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "audio", "video", "source", "base")
        for attribute in ("src", "href", "xlink:href", "action", "srcset"):
            value = found.get(attribute) or "#"
            assert value.startswith(("#", "data:,")), (tag, value)
    assert "@import" not in html
    assert not re.findall(r"url\((?!#)", html)
    assert "default-src 'none'" in html
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_every_picture_has_a_title_a_description_and_a_table(h200) -> None:
    page, html = h200
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) > 20
    for picture in pictures:
        assert re.match(r'<svg [^>]*role="img" aria-labelledby="(\S+) (\S+)"><title id="\1">[^<]+</title>', picture)
        assert "<desc" in picture
    for figure in ("figure08_throughput", "figure04_phases", "figure11_experts", "validation"):
        assert f"{figure}-table" in page.tables
    # Values on hover, without a script.
    assert "<title>cs sparse 8, measured: 3.96 (3.76 to 4.20); queries/s</title>" in html


def _contrast(first: str, second: str) -> float:
    """WCAG 2.1's ratio of two colours #rrggbb."""

    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_both_themes(mixed) -> None:
    themes = re.findall(r":root \{ (--paper: #\w{6};[^}]*) \}", mixed[1])
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for text in ("ink", "soft", "link"):
            for ground in ("paper", "panel"):
                assert _contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


def test_figures_are_written_as_files_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report(mixed_folder(tmp_path / "points"), out, png=True, pdf=True)
    stems = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {"figure08_throughput", "figure02_lengths", "figure15_throughput", "table4_cost"} <= stems
    for ending in ("png", "pdf"):
        assert {path.stem for path in (out / "figures").glob(f"*.{ending}")} == stems


# --- what comes from files ---


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page, html = report(hostile_folder(tmp_path / "p"), tmp_path / "out")
    assert page.is_balanced
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not [found for _, found in page.tags if any(name.startswith("on") for name in found)]
    assert "\u202e" not in html
    assert "\x07" not in html
    assert "<script>alert('x')" in page.text  # shown, as text
    assert [int(level) for level, _ in page.headings].count(1) == 1


def test_paths_users_and_hosts_are_left_out(tmp_path: Path, monkeypatch) -> None:
    folder = mixed_folder(tmp_path / "deep" / "down" / "points")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "point.json").write_text("{")
    page, html = report(folder, tmp_path / "out")
    assert str(tmp_path) not in html
    assert "alice" not in html
    assert "box17" not in html
    assert "broken" in page.text
    assert "unreadable" in page.text
    monkeypatch.chdir(tmp_path)  # a relative way to the folder is no part of the page either
    assert "deep/down" not in report(Path("deep/down/points"), tmp_path / "out2")[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/alice/data.json is missing", "…/data.json is missing"),
        ("open('/srv/x/y/z.bin') failed", "open('…/z.bin') failed"),
        (r"C:\Users\alice\x.txt: denied", "…/x.txt: denied"),
        ("~/secret/key not found", "…/key not found"),
        ("ratio 3/4 and a/b/c stay, tokens/s too", "ratio 3/4 and a/b/c stay, tokens/s too"),
        ("bob@node7 left", "… left"),
    ],
)
def test_causes_lose_their_paths(text: str, wanted: str) -> None:
    assert clean_cause(text) == wanted


@given(st.text(max_size=300))
def test_clean_text_has_one_visible_line(text: str) -> None:
    cleaned = clean_text(text)
    assert len(cleaned) <= 120
    assert (
        cleaned.isprintable()
        or not cleaned.replace("\N{REPLACEMENT CHARACTER}", "").strip()
        or all(character.isprintable() or character == " " for character in cleaned)
    )
    assert clean_text(cleaned) == cleaned


def test_a_folder_with_one_point(tmp_path: Path) -> None:
    write_point(
        tmp_path / "p" / "a", point(preset="tiny", num_layers=2), [100 * MS] * 23, environment=cpu_environment()
    )
    page, _ = report(tmp_path / "p", tmp_path / "out")
    assert "1 ok" in page.text
    assert "Preset tiny" in page.text
    ((_, shown),) = page.column("throughput-table", "queries/s")
    assert float(shown) == pytest.approx(10.0)


def test_what_a_folder_lacks_is_drawn_as_the_papers_alone(tmp_path: Path) -> None:
    write_point(tmp_path / "p" / "a", point(batch=64), status="oom", cause="CUDA out of memory")
    page, html = report(tmp_path / "p", tmp_path / "out")
    for name in ("figure04_phases", "figure05_layers", "figure06_kernels", "figure09_sm", "figure10_memory"):
        header = [text for text, _ in page.tables[f"{name}-table"][0]]
        cells = [row[1:] for row in page.tables[f"{name}-table"][1:]]
        for column, title in enumerate(header[1:]):
            values = [float(row[column][1]) for row in cells if row[column][1]]
            assert bool(values) == title.startswith(papers.PAPERS), (name, title)
        assert any(text == papers.NOT_MEASURED_YET for row in cells for text, _ in row), name
    for figure in (4, 5, 6, 8, 9, 10, 11):
        section = html[html.index(f'<section id="figure{figure}"') :]
        section = section[: section.index("</section>")]
        assert "What is drawn is the paper's alone." in section
        assert "<svg" in section
        assert ">not measured</text>" in section
        assert "blackmamba" not in section.replace("mamba_", "")  # a model that the folder has nothing of
    assert page.text.count("(not measured)") == html.count("The commands below measure it.")


def test_only_failed_points_still_make_a_page(tmp_path: Path) -> None:
    write_point(tmp_path / "p" / "a", point(), status="oom", cause="CUDA out of memory")
    page, _ = report(tmp_path / "p", tmp_path / "out")
    assert "1 oom" in page.text
    assert page.text.count("Left out:") == 5


def test_only_unreadable_points_still_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "point.json").write_text(json.dumps({"kind": "throughput"}))
    page, _ = report(tmp_path / "p", tmp_path / "out")
    assert "1 unreadable" in page.text


def test_empty_and_missing_folders_are_errors_and_leave_no_page(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no measured point|there is no folder"):
            write_report(folder, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "p")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(folder, None, tmp_path / "out")


def test_two_thousand_points_in_time(tmp_path: Path) -> None:
    sources = [
        write_point(
            tmp_path / "sources" / f"s{batch}", point(batch=batch), [900 * MS + batch * MS] * 23,
            environment=gpu_environment(f"GPU {batch % 20}"),
        )
        for batch in range(1, 41)
    ]  # fmt: skip
    link_copies(sources, tmp_path / "p", 2000)
    begin = time.monotonic()
    page, html = report(tmp_path / "p", tmp_path / "out")
    took_s = time.monotonic() - begin
    assert len(page.tables["throughput-table"]) == 2001
    assert "The figure shows the first" in page.text
    assert html.count("<svg ") < 80
    assert took_s <= MAX_REPORT_S


# --- two folders ---


def test_comparing_has_both_the_ratio_and_a_verdict(tmp_path: Path) -> None:
    a, b = mixed_folder(tmp_path / "slow"), mixed_folder(tmp_path / "fast", factor=0.5)
    page, _ = report(a, tmp_path / "out", b)
    rows = page.tables["figure8-compared"]
    assert [text for text, _ in rows[0]][3:] == ["A (slow)", "B (fast)", "B (fast) / A (slow)", "B (fast) is"]
    by_bar = {row[1][0]: row for row in rows[1:]}
    sparse = by_bar["cs sparse 1"]
    assert float(sparse[5][1]) == pytest.approx(2.0)
    assert sparse[6][0] == FASTER
    energy = page.tables["energy-compared"]
    assert {row[6][0] for row in energy[1:]} == {NO_INTERVAL}
    same, _ = report(a, tmp_path / "out2", a)
    assert {row[6][0] for row in same.tables["figure8-compared"][1:]} == {NOISE}
    # What is the paper's is neither compared nor drawn twice.
    assert "figure4-compared" not in page.tables
    bars = [text for text, _ in page.column("figure04_phases-table", "data, sparsity, batch")]
    assert len(bars) == len(set(bars)) == 5


def test_bars_that_only_one_folder_has_are_kept(tmp_path: Path) -> None:
    mixed_folder(tmp_path / "a")
    write_point(tmp_path / "b" / "x", point(batch=4), [100 * MS] * 23)
    found = compare(rates.figure8(throughput(tmp_path / "a")), rates.figure8(throughput(tmp_path / "b")))
    assert set(found["verdict"]) == {"only one"}
    assert found["a"].notna().sum() == 2
    assert found["b"].notna().sum() == 1


def test_the_ratios_interval_is_that_of_a_two_sample_bootstrap() -> None:
    rng = np.random.default_rng(3)
    a_s, b_s = rng.normal(1.0, 0.15, 60), rng.normal(0.8, 0.1, 40)
    a, b = (bootstrap_ratio(np.ones(len(each)), each) for each in (a_s, b_s))
    ratio, low, high = ratio_interval(a, b)
    drawn = [rng.choice(a_s, len(a_s)).mean() / rng.choice(b_s, len(b_s)).mean() for _ in range(4000)]
    assert ratio == pytest.approx(a_s.mean() / b_s.mean())
    assert [low, high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), rel=0.01)


def test_equal_runs_are_called_different_in_one_of_twenty_cases() -> None:
    rng = np.random.default_rng(5)
    found = []
    for _ in range(300):
        a, b = (bootstrap_ratio(np.ones(50), rng.normal(1.0, 0.2, 50)) for _ in range(2))
        found.append(verdict(*ratio_interval(a, b)[1:], HIGHER))
    assert 0.01 <= 1 - found.count(NOISE) / len(found) <= 0.10


POSITIVE = st.floats(min_value=1e-3, max_value=1e3)
SPREAD = st.floats(min_value=1e-3, max_value=0.5)


@given(POSITIVE, SPREAD, POSITIVE, SPREAD)
def test_a_ratio_and_its_inverse_mirror_each_other(a: float, a_spread: float, b: float, b_spread: float) -> None:
    first, second = (a, a * (1 - a_spread), a * (1 + a_spread)), (b, b * (1 - b_spread), b * (1 + b_spread))
    ratio, low, high = ratio_interval(first, second)
    inverse = ratio_interval(second, first)
    assert low < ratio < high
    assert (1 / inverse[0], 1 / inverse[2], 1 / inverse[1]) == pytest.approx((ratio, low, high))


@pytest.mark.parametrize(
    ("low", "high", "better", "wanted"),
    [
        (1.1, 1.2, HIGHER, FASTER), (1.1, 1.2, LOWER, SLOWER), (0.8, 0.9, HIGHER, SLOWER), (0.8, 0.9, LOWER, FASTER),
        (0.9, 1.1, HIGHER, NOISE), (math.nan, math.nan, HIGHER, NO_INTERVAL),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, better: str, wanted: str) -> None:
    assert verdict(low, high, better) == wanted
