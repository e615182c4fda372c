"""What is drawn equals the table: bars and marks against the rows of a chart, and those against analyze's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_report import mixed_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import paper
from tunescope.analyze.kernel_tables import ALL, KernelTables
from tunescope.analyze.kernels import TIME_WEIGHTED
from tunescope.analyze.latency_tables import latency_tables
from tunescope.analyze.roofline import Rooflines
from tunescope.analyze.throughput import throughput
from tunescope.cost import paper_tables
from tunescope.cost.prices import find_price
from tunescope.errors import UserError
from tunescope.hardware import GIB
from tunescope.report.figures import kernels, latency, model, style
from tunescope.report.figures import throughput as rates
from tunescope.report.figures.chart import BARS, COLUMNS, MAX_GROUPS, MAX_PANELS, STACKED, Chart, entry, frame_of, wide
from tunescope.report.figures.draw import panel_figure, quiet, save, sheet
from tunescope.report.figures.experts import figure11
from tunescope.report.figures.plots import plot_latency, plot_throughput, plot_utilization
from tunescope.report.figures.svg import inline_svg, sheet_svg

H200 = Path(__file__).parents[1] / "docs" / "results" / "h200"
BLACKMAMBA = H200 / "blackmamba"


@pytest.fixture(scope="module")
def breakdowns():
    return latency_tables(BLACKMAMBA / "latency")


def check_drawn(chart: Chart) -> int:
    """Every row that a panel has room for is drawn with its own value, or as missing. Returns how many rows."""
    assert list(chart.frame.columns) == list(COLUMNS)
    assert chart.frame.index.is_unique
    drawn = chart.drawn()
    num_rows = 0
    with style.styled(), quiet():
        for panel in dict.fromkeys(drawn["panel"]):
            figure, artists = panel_figure(chart, panel)
            rows = drawn[drawn["panel"] == panel]
            (axes,) = figure.axes
            for row in rows.itertuples():
                if pd.isna(row.value):
                    if chart.kind == BARS:
                        assert artists[row.Index].get_hatch(), "a missing bar is a hatched box"
                        assert row.note in [text.get_text() for text in axes.texts]
                    continue
                artist = artists[row.Index]
                if chart.kind in (BARS, STACKED):
                    assert artist.get_width() == pytest.approx(row.value, rel=1e-12, abs=1e-12)
                else:
                    assert artist.get_xdata()[0] == row.x
                    assert artist.get_ydata()[0] == row.value
                num_rows += 1
            if chart.kind == STACKED:
                for _, cells in rows.groupby(["place", "bar"]):
                    ends = [
                        artists[index].get_x() + artists[index].get_width() for index in cells.index if index in artists
                    ]
                    if cells["value"].notna().any():
                        assert max(ends) == pytest.approx(cells["value"].sum())
            figure.canvas.draw()  # nothing of it raises
    return num_rows


def test_figure8_is_the_table_beside_the_paper() -> None:
    table = throughput(H200 / "throughput")
    chart = rates.figure8(table)
    ours = chart.frame[chart.frame["series"] == rates.MEASURED]
    assert ours["value"].tolist() == table["queries_per_s"].tolist()
    assert ours["low"].tolist() == table["queries_per_s_low"].tolist()
    assert ours["high"].tolist() == table["queries_per_s_high"].tolist()
    theirs = chart.frame[chart.frame["series"] == rates.PAPERS]
    assert theirs["value"].tolist() == table["paper_a40_queries_per_s"].tolist()
    assert check_drawn(chart) == 16


def test_figure8_of_a_slice_draws_all_layers_and_not_the_shallow_end() -> None:
    table = throughput(H200 / "slice")
    ours = rates.figure8(table).frame
    ours = ours[ours["series"] == rates.MEASURED]
    assert ours["value"].tolist() == table["queries_per_s_all_layers"].dropna().tolist()


def test_missing_points_are_drawn_as_missing(tmp_path: Path) -> None:
    chart = rates.figure8(throughput(mixed_folder(tmp_path)))
    ours = chart.frame[chart.frame["series"] == rates.MEASURED].set_index("group")
    assert ours.loc["cs sparse 8", "note"] == "oom"
    assert ours.loc["cs dense 2", "note"] == "failed"
    assert ours.loc["math sparse 1", "note"] == "not measured"
    assert ours["value"].notna().sum() == 2
    # All eight bars of the paper's figure have their place.
    assert len(ours) == len(paper.figure8_order("mixtral")) == 8
    assert check_drawn(chart) == 2 + 8


PAPERS_BARS = {  # figure -> its chart of no point at all, and the paper's numbers for one model
    "4": (lambda name: latency.figure4(None, [name]), "phase_latency", "latency_s", 1.0),
    "5": (lambda name: latency.figure5(None, [name]), "layer_latency", "latency_s", 1e3),
    "6": (lambda name: latency.figure6(None, [name]), "kernel_latency", "latency_us", 1.0),
    "9": (lambda name: kernels.figure9(None, [name]), "sm_utilization", "sm_throughput_pct", 1.0),
    "10": (lambda name: kernels.figure10(None, [name]), "memory_utilization", "memory_throughput_pct", 1.0),
    "11": (lambda name: figure11([], [name]), "expert_tokens", "tokens_per_query", 1.0),
}


@pytest.mark.parametrize("name", ["mixtral", "blackmamba"])
@pytest.mark.parametrize("figure", list(PAPERS_BARS))
def test_without_a_point_the_papers_bars_stand_alone_and_ours_is_missing(figure: str, name: str) -> None:
    make, table, column, factor = PAPERS_BARS[figure]
    chart = make(name)
    numbers = [factor * float(row[column]) for row in paper.rows(table) if row["model"] == name]
    assert sorted(chart.frame["value"].dropna()) == pytest.approx(sorted(numbers))
    assert check_drawn(chart) == len(numbers)
    missing = chart.frame[chart.frame["value"].isna()]
    assert set(missing["note"]) == {"not measured"}
    assert set(missing["panel"]) == set(chart.panels)
    assert chart.own().is_empty
    assert not chart.is_empty


def test_figure8_without_a_point_is_the_papers_alone() -> None:
    chart = rates.figure8(None, ["mixtral", "qwen3_moe"])  # the paper has no Qwen
    assert chart.panels == ["mixtral, paper, A40"]
    assert check_drawn(chart) == len(paper.figure8_order("mixtral"))
    assert chart.own().is_empty


def test_bars_that_were_not_measured_stand_beside_those_that_were(breakdowns) -> None:
    kept = breakdowns.points[breakdowns.points["per_device_batch_size"] == 30]
    kept = kept[kept["seq_len_tokens"] == 128]
    chart = latency.figure4(replace(breakdowns, points=kept))
    assert chart.panels == ["blackmamba, NVIDIA H200, preset full"]
    notes = chart.frame[chart.frame["bar"] == latency.MEASURED].groupby("group")["note"].first()
    assert sorted(notes[notes == "not measured"].index) == [
        f"random len 128 {bar}" for bar in ("dense 1", "sparse 1", "sparse 84")
    ]
    assert chart.frame.loc[chart.frame["bar"] == latency.PAPERS, "group"].nunique() == 5
    check_drawn(chart)


def test_many_panels_leave_the_papers_their_room() -> None:
    own = [entry(f"machine {n}", "g", "measured", n) for n in range(3 * MAX_PANELS)]
    chart = Chart("many", "many", frame_of([*own, entry("mixtral, paper, A40", "g", "paper, A40", 1.0)]), "units")
    panels = list(dict.fromkeys(chart.drawn()["panel"]))
    assert len(panels) == MAX_PANELS + 1
    assert panels[-1] == "mixtral, paper, A40"


def test_energy_and_money_are_arithmetic_on_the_table(tmp_path: Path) -> None:
    table = throughput(mixed_folder(tmp_path))
    ok = table[table["status"] == "ok"]
    energy = rates.energy(table)
    assert energy.frame["value"].dropna().tolist() == pytest.approx(
        ok["gpu_energy_j_per_query"].tolist()
    )  # 1,000 / 1e3
    chart, words = rates.money(table)
    price = find_price("NVIDIA A40")
    usd = 1000 / ok["queries_per_s"] / 3600 * price.usd_per_hour
    ours = chart.frame[(chart.frame["series"] == rates.MEASURED) & chart.frame["value"].notna()]
    assert ours["value"].tolist() == pytest.approx(usd.tolist())
    assert (ours["low"] < ours["value"]).all()
    assert (ours["value"] < ours["high"]).all()
    assert price.date in words[0]
    assert check_drawn(energy) == 2


def test_a_gpu_without_a_price_has_no_money_and_says_so() -> None:
    chart, words = rates.money(throughput(H200 / "throughput"))
    ours = chart.frame[chart.frame["series"] == rates.MEASURED]
    assert ours["value"].isna().all()
    assert set(ours["note"]) == {"no price"}
    assert "no price for NVIDIA H200" in words[0]


def test_paths_are_of_bars_with_two_of_them(tmp_path: Path) -> None:
    from helpers_points import MS, write_point
    from helpers_report import point

    for moe, step_ms in (("stock", 3000), ("grouped", 1000)):
        write_point(tmp_path / f"a-{moe}", point(), [step_ms * MS] * 23, point_changes={"moe": moe})
    write_point(tmp_path / "b", point(batch=2), [MS] * 23)
    chart = rates.paths(throughput(tmp_path))
    assert dict(zip(chart.frame["series"], chart.frame["value"], strict=True)) == pytest.approx(
        {"stock": 1 / 3, "grouped": 1.0}
    )
    check_drawn(chart)


def test_figure4_adds_up_to_the_step_and_has_the_papers_seconds(breakdowns) -> None:
    chart = latency.figure4(breakdowns)
    sums = chart.frame[chart.frame["bar"] == latency.MEASURED].groupby("group")["value"].sum()
    steps = dict(zip(map(latency.label, latency.shown_rows(breakdowns)), breakdowns.points["step_s"], strict=True))
    for group, total in sums.items():
        assert total == pytest.approx(steps[group], rel=1e-3)
    theirs = chart.frame[chart.frame["bar"] == latency.PAPERS]
    printed = breakdowns.phases["paper_a40_s"].dropna()
    assert sorted(theirs["value"]) == pytest.approx(sorted(printed))
    check_drawn(chart)


def test_figures_5_and_6_recompute_busy_and_memory_are_the_tables(breakdowns) -> None:
    parts = latency.figure5(breakdowns).frame
    layers = breakdowns.layers[breakdowns.layers["layer"] >= 0]
    assert parts.loc[parts["bar"] == latency.MEASURED, "value"].sum() == pytest.approx(layers["busy_ns"].sum() / 1e6)
    operators = latency.figure6(breakdowns)
    row = operators.frame[operators.frame["series"] == latency.MEASURED].iloc[0]
    of_row = breakdowns.operators[
        (breakdowns.operators["folder"] == breakdowns.points["folder"].iloc[0])
        & (breakdowns.operators["part"] == "moe")
        & (breakdowns.operators["label"] == row["group"])
    ]
    assert row["value"] == pytest.approx(of_row["busy_ns"].sum() / of_row["num_launches"].sum() / 1e3)
    busy = latency.busy(breakdowns)
    assert busy.frame.loc[busy.frame["series"] == "idle", "value"].tolist() == pytest.approx(
        (100 * breakdowns.points["idle_frac"]).tolist()
    )
    shares = latency.recompute(breakdowns)
    assert np.allclose(shares.frame.groupby("group")["value"].sum(), 100)
    memory = latency.memory(breakdowns)
    assert memory.frame["value"].max() == pytest.approx(breakdowns.memory["peak_bytes"].max() / GIB)
    for chart in (latency.figure5(breakdowns), operators, busy, shares, memory):
        assert check_drawn(chart)


def test_figure11_is_the_loads_of_the_first_point_of_each_kind(breakdowns) -> None:
    chart = figure11(breakdowns.experts)
    ours = chart.frame[~chart.frame["series"].str.startswith(style.PAPER)]
    first = breakdowns.experts[0].loads
    wanted = first.loc[first["layer"] == "all", "tokens_per_query"].tolist()
    assert sorted(ours[ours["panel"].str.contains(breakdowns.experts[0].label)]["value"]) == pytest.approx(
        sorted(wanted)
    )
    check_drawn(chart)


@pytest.fixture
def kernel_points():
    key = {
        "model": "mixtral", "dataset": "random", "sparsity": "sparse", "top_k": 2, "per_device_batch_size": 1,
        "seq_len_tokens": 128, "preset": "full", "device": "NVIDIA A40", "folder": "p", "status": "ok",
        "is_papers_model": True, "source": "ncu",
    }  # fmt: skip
    cells = pd.DataFrame(
        {
            "label": ["matmul(w1)", "other", "softmax", TIME_WEIGHTED],
            "phase": ALL, "folder": "p", "share_frac": [0.9, 0.004, 0.096, 1.0], "sm_percent": [40.0, 1.0, 5.0, 36.0],
            "memory_percent": [80.0, 2.0, 9.0, 72.0], "dram_percent": [70.0, 1.0, np.nan, 60.0],
            "paper_sm_percent": [32.5, np.nan, np.nan, 30.0], "paper_memory_percent": [np.nan, np.nan, 4.0, 76.0],
        }
    )  # fmt: skip
    return KernelTables(pd.DataFrame([key]), cells)


def _of_points(chart: Chart) -> Chart:
    """Without the paper's bars that no point has."""
    unmeasured = chart.frame.loc[chart.frame["note"].eq("not measured"), "panel"]
    return replace(chart, frame=chart.frame[~chart.frame["panel"].isin(unmeasured)])


def test_figures_9_and_10_have_dram_beside_and_leave_small_operators_out(kernel_points) -> None:
    sm, memory = (_of_points(make(kernel_points)) for make in (kernels.figure9, kernels.figure10))
    assert sm.frame.groupby("series")["value"].apply(list).to_dict() == {
        "SM": [40.0, 5.0, 36.0], kernels.PAPERS: [32.5, 30.0],
    }  # fmt: skip
    assert list(dict.fromkeys(memory.frame["series"])) == ["Memory [%]", "DRAM", kernels.PAPERS]
    assert "other" not in set(memory.frame["group"])
    missing = memory.frame[memory.frame["value"].isna()]
    assert missing[["group", "series"]].to_numpy().tolist() == [["softmax", "DRAM"]]
    assert check_drawn(sm) == 5
    assert check_drawn(memory) == 7


def test_the_roofline_stays_under_its_ceilings() -> None:
    key = {
        "model": "mixtral", "dataset": "random", "sparsity": "sparse", "per_device_batch_size": 1, "preset": "full",
        "seq_len_tokens": 128, "device": "NVIDIA A40", "folder": "p", "status": "ok", "roofline_device": "NVIDIA A40",
    }  # fmt: skip
    cells = pd.DataFrame(
        {"label": ["a", "b"], "folder": "p", "flop": [1e9, 0.0], "num_bytes": [1e7, 1e7], "busy_ns": [1e6, 1e6],
         "flop_per_s": [1e12, 0.0], "intensity_flop_per_byte": [100.0, 0.0], "bound": ["compute", "memory"]}
    )  # fmt: skip
    chart = kernels.roofline(Rooflines(pd.DataFrame([key]), cells))
    assert chart.frame[["group", "x", "value"]].to_numpy().tolist() == [["a", 100.0, 1.0]]
    (lines,) = chart.extra["ceilings"].values()
    assert max(lines[0]["y"]) == pytest.approx(149.7)  # the A40's bf16 peak, TFLOP/s
    assert check_drawn(chart) == 1


def test_the_papers_model_is_drawn_as_its_tables_have_it() -> None:
    fourteen = paper_tables.figure14()
    fourteen = fourteen[fourteen["reading"] == paper_tables.PAPERS_CURVE]
    chart = model.figure14()
    measured = chart.frame[chart.frame["series"].str.startswith("paper")]
    assert measured["value"].tolist() == fourteen["measured_queries_per_s"].tolist()
    curves = chart.frame[chart.frame["series"].str.startswith("Equation 2")]
    assert curves["value"].tolist() == fourteen["curve_queries_per_s"].tolist()
    lengths = model.lengths().frame
    for dataset in ("cs", "math"):
        _, counts = paper.length_histogram(dataset)
        assert lengths.loc[lengths["panel"].str.startswith(dataset), "value"].sum() == sum(counts)
    table4 = model.table4().frame
    assert table4.loc[table4["series"] == "paper, printed", "value"].tolist() == [32.7, 25.4, 17.9]
    table3 = model.table3().frame
    assert (
        table3.loc[table3["series"] == "paper, Table III", "value"].tolist()
        == paper_tables.table3().drop_duplicates(["model", "dataset", "sparsity"])["paper_queries"].tolist()
    )
    for chart in (
        model.lengths(),
        model.figure13(),
        model.figure14(),
        model.figure15(),
        model.table3(),
        model.table4(),
    ):
        assert check_drawn(chart)


def test_forecasts_are_drawn_over_what_was_measured() -> None:
    from tunescope.cost.time_packaged import own_points
    from tunescope.cost.validation import OWN_UNSEEN, held_out

    rows = held_out(own_points(), (OWN_UNSEEN,))
    chart = model.validation(rows)
    ours = chart.frame[chart.frame["series"] == "forecast"]
    assert ours["x"].tolist() == [row.point.step_s for row in rows]
    assert ours["value"].tolist() == [row.forecast.median_s for row in rows]
    assert check_drawn(chart)


NAMES = st.text(min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(NAMES, NAMES, st.one_of(st.none(), st.floats(min_value=0, max_value=1e9, allow_nan=False))),
        min_size=1,
        max_size=6,
        unique_by=lambda row: row[:2],
    )
)
def test_any_names_and_values_can_be_drawn(rows) -> None:
    """Dollars, backslashes, brackets and control characters of names reach neither mathematics nor markup."""
    from tunescope.report.page.clean import clean_text

    entries = [entry("p", clean_text(a), clean_text(b), value, place=n) for n, (a, b, value) in enumerate(rows)]
    chart = Chart("any", "any", frame_of(entries), "units")
    assert check_drawn(chart) == sum(value is not None for *_, value in rows)
    import xml.etree.ElementTree as ET

    ET.fromstring(inline_svg(chart, "p", "x").markup)  # well-formed


def test_series_differ_without_colour() -> None:
    found = style.looks([f"s{number}" for number in range(7)] + ["paper, a", "paper, b"])
    assert len({look.hatch for look in found.values() if look.color != style.PAPER_FILL}) == 7
    assert len({str(look.dash) for name, look in found.items() if not name.startswith("paper")}) == 7
    assert len({look.marker for name, look in found.items() if not name.startswith("paper")}) == 7


def test_a_figure_keeps_to_its_room_and_the_table_has_the_rest() -> None:
    chart = Chart("many", "many", frame_of([entry("p", f"g{n}", "s", n) for n in range(3 * MAX_GROUPS)]), "units")
    assert check_drawn(chart) == MAX_GROUPS
    header, rows = wide(chart)
    assert header == ["point", "s"]
    assert [row[1]["value"] for row in rows] == list(range(3 * MAX_GROUPS))


def test_the_callers_style_is_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_throughput(H200 / "throughput", tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_plot_writes_each_kind_of_file(ending: str, tmp_path: Path) -> None:
    plot_throughput(H200 / "throughput", tmp_path / f"a.{ending}")
    begins = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert (tmp_path / f"a.{ending}").read_bytes().startswith(begins[ending])


def test_an_svg_has_text_as_text(tmp_path: Path) -> None:
    plot_latency(BLACKMAMBA / "latency", tmp_path / "a.svg")
    assert ">matmul(w1)</text>" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (lambda folder: plot_throughput(folder, folder / "a.xyz"), "ends in"),
        (lambda folder: plot_throughput(folder, folder / "no" / "a.svg"), "cannot be written"),
        (lambda folder: plot_utilization(folder, "other", folder / "a.svg"), "no figure"),
    ],
)
def test_plots_refuse_what_they_cannot_draw(plot, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        plot(mixed_folder(tmp_path))


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    from helpers_points import write_point
    from helpers_report import point

    write_point(tmp_path / "a", point(preset="tiny", num_layers=2), status="oom", cause="memory")
    with pytest.raises(UserError, match="nothing to draw"):
        save([rates.energy(throughput(tmp_path))], tmp_path / "a.svg")


def test_a_sheet_of_panels_is_one_picture() -> None:
    chart = model.lengths()
    pictures = [inline_svg(chart, panel, f"p{number}") for number, panel in enumerate(chart.panels)]
    text = sheet_svg(pictures)
    assert text.count("<svg") == 3
    assert "var(" not in text
    with style.styled():
        assert len(sheet([chart]).axes) == 2
