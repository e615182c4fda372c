"""What Nsight Compute 2025.3.1 wrote on an H200: two tiny points, their reports, and the CSV that ncu printed of them.

Sampled by an OpWatch under which torch called `index_put` for `_index_put_impl_` and checked every index: of Mixtral's
launches, twelve are of these checks, and have no place in the trace. counters.arrow is what the CSV is read as.
"""

import csv
import io
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import run, tunescope

from tunescope import latency_files, results
from tunescope.analyze.kernel_tables import kernel_tables
from tunescope.analyze.kernels import KernelPoint
from tunescope.analyze.latency import latency_point
from tunescope.analyze.ncu_file import ncu_groups
from tunescope.analyze.roofline import rooflines
from tunescope.errors import UserError
from tunescope.ncu import reports
from tunescope.ncu.counters import COUNTERS_FILE, COUNTERS_SCHEMA, LAUNCH_METRICS, METRICS, REPORT_FILE
from tunescope.ncu.op_costs import op_costs
from tunescope.ncu.ranges import SAMPLE, place_of
from tunescope.ncu.settings import PHASES
from tunescope.report.kernels import MEMORY, SM, utilization_text

FIXTURES = Path(__file__).parent / "fixtures" / "ncu_h200"
NUM_LAUNCHES = {"mixtral": 32, "blackmamba": 35}
CSV_FILE = "counters.csv"
# ncu prints two decimals.
HALF_A_UNIT = 0.0050001


@pytest.fixture(params=list(NUM_LAUNCHES))
def folder(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / str(request.param)


def counted(folder: Path) -> list[dict[str, Any]]:
    return list(results.read_arrow(folder / COUNTERS_FILE, COUNTERS_SCHEMA).to_pylist())


def printed(folder: Path) -> list[dict[str, str]]:
    """The CSV by Python's own reader, a launch a row; the line of units is left out."""
    return list(csv.DictReader(io.StringIO((folder / CSV_FILE).read_text())))[1:]


def kernel_point(folder: Path) -> KernelPoint:
    found = results.read_point(folder)
    return KernelPoint(found, latency_point(found))


# --- reading ---


def test_the_csv_is_read_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ncu"
    script.write_text(f'#!/bin/sh\ncase "$*" in *mangled*) cat {folder / CSV_FILE};; *) exit 1;; esac\n')
    script.chmod(0o755)
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    rows = reports.read_report(folder / REPORT_FILE, str(script)).to_pylist()
    assert rows == counted(folder)
    assert len(rows) == NUM_LAUNCHES[folder.name]
    for row, cells in zip(rows, printed(folder), strict=True):
        assert row["mangled"] == cells["Kernel Name"]
        for column, metric in (METRICS | LAUNCH_METRICS).items():  # none unknown, none empty
            assert row[column] == float(cells[metric].replace(",", ""))


def test_the_package_reads_the_same(folder: Path) -> None:
    pytest.importorskip("ncu_report")
    rows = reports.read_report(folder / REPORT_FILE).to_pylist()
    for row, by_csv in zip(rows, counted(folder), strict=True):
        assert [row[name] for name in ("kernel", "mangled", "ranges")] == [
            by_csv[name] for name in ("kernel", "mangled", "ranges")
        ]
        for column in (*METRICS, *LAUNCH_METRICS):
            assert row[column] == pytest.approx(by_csv[column], abs=HALF_A_UNIT, rel=1e-12)


def test_values_can_be(folder: Path) -> None:
    for row in counted(folder):
        for column, value in row.items():
            if column.endswith("_percent"):
                assert 0 <= value <= 100
        assert 1e3 < row["duration_ns"] < 2e4
        assert 1.9e9 < row["sm_clock_hz"] <= 1.98e9  # of an H200 as it is
        assert 3.1e9 < row["dram_clock_hz"] <= 3.201e9
        # DRAM's throughput is its bytes over its time, of 4.8 TB/s and the like.
        bytes_per_s = (row["dram_read_bytes"] + row["dram_written_bytes"]) / row["duration_ns"] * 1e9
        assert row["dram_percent"] == pytest.approx(100 * bytes_per_s / 4.9e12, abs=0.02)


def test_every_launch_has_its_place() -> None:
    phases = {
        model: Counter(place.phase for row in counted(FIXTURES / model) if (place := place_of(row["ranges"])))
        for model in NUM_LAUNCHES
    }
    assert phases == {
        "mixtral": {"forward": 4, "recompute": 4, "backward": 24}, "blackmamba": {"forward": 16, "backward": 19},
    }  # fmt: skip
    for model in NUM_LAUNCHES:
        assert all(row["ranges"][0] == SAMPLE for row in counted(FIXTURES / model))
    # A range of a library's own, in a domain of its own: its name is all that is kept of it.
    inner = [row["ranges"][2:] for row in counted(FIXTURES / "mixtral") if len(row["ranges"]) > 2]
    assert inner == [["cub::DeviceRadixSort"]]


# --- beside the trace ---


def test_launches_are_found_in_the_trace(folder: Path) -> None:
    point = kernel_point(folder)
    found = point.sampled.merge(point.launches, how="left", on=["phase", "path", "name"], indicator=True)
    missing = found[found["_merge"] == "left_only"]
    assert len(missing) == point.num_unmatched == {"mixtral": 12, "blackmamba": 0}[folder.name]
    checks = Counter(name.partition("<")[0].rpartition("::")[2] for name in missing["name"])
    if folder.name == "mixtral":  # whether indices are within: largest and smallest of two, compared and asserted
        assert checks == {"reduce_kernel": 4, "vectorized_elementwise_kernel": 4, "_assert_async_cuda_kernel": 4}
        assert set(missing["op"]) == {"aten::index_put"}


def test_a_launch_takes_longer_with_empty_caches(folder: Path) -> None:
    """By ncu over by the trace: the products' 1.2 to 1.5; what has next to nothing to do, up to 2.5."""
    kinds = kernel_point(folder).kinds()
    kinds = kinds[kinds["num_sampled"] > 0]
    ratios = kinds["duration_ns"] * kinds["num_launches"] / kinds["busy_ns"]
    assert ratios.between(1.1, 2.6).all()
    products = kinds["name"].str.contains("gemm_4bit|device_kernel")
    assert ratios[products].between(1.2, 1.55).all()


def test_forward_and_recompute_stand_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    point = kernel_point(FIXTURES / "mixtral")
    alone = replace(point)  # nothing of it is computed yet
    monkeypatch.setitem(alone.__dict__, "sampled", point.sampled[point.sampled["phase"] != "recompute"])
    whole, kinds = point.kinds(), alone.kinds()
    assert kinds["is_covered"].equals(whole["is_covered"])
    assert kinds["num_sampled"].sum() == whole["num_sampled"].sum() - 4
    lent = kinds[kinds["is_covered"] & (kinds["num_sampled"] == 0)]
    assert set(lent["phase"]) == {"recompute"}
    own = whole[whole["phase"] == "forward"].merge(lent, on=["path", "name", "label"], suffixes=("", "_lent"))
    assert len(own) == len(lent) >= 4
    assert (own["sm_percent"] == own["sm_percent_lent"]).all()


def test_what_a_call_launches_by_the_trace() -> None:
    costs = op_costs(results.read_arrow(FIXTURES / "mixtral" / "events.arrow", latency_files.EVENTS_SCHEMA))
    events = results.read_arrow(FIXTURES / "mixtral" / "events.arrow", latency_files.EVENTS_SCHEMA).to_pandas()
    kernels = events[events["kind"] == "kernel"]
    # Two layers, eight experts, three linears, forward and recompute: the fused product alone, so few are the tokens.
    products = kernels[kernels["name"].str.contains("gemm_4bit_simt")]
    experts = 2 * 2 * 8 * 3
    assert len(products) >= experts
    assert costs["bitsandbytes::gemm_4bit"].num_calls >= experts
    assert costs["bitsandbytes::gemm_4bit"].busy_ns >= products["duration_ns"].sum()
    nonzero = costs["aten::nonzero"]
    assert 4 * nonzero.num_calls < nonzero.num_launches <= 5 * nonzero.num_calls
    assert costs["aten::_local_scalar_dense"].num_launches == 0  # copies, which ncu does not see
    total_ns = kernels["duration_ns"].sum()
    assert all(cost.num_launches <= len(kernels) and cost.busy_ns <= total_ns for cost in costs.values())
    assert op_costs(latency_files.EVENTS_SCHEMA.empty_table()) == {}


# --- tables ---

# By hand from the CSV and the times of the trace: (5.50 * 110945 + 4.61 * 109757) / 220702 and so on.
EXPECTED_SM = {
    "mixtral": {"matmul(w1) decoding": 5.0574, "matmul(w2) decoding": 2.4853, "matmul(lora)": None},
    "blackmamba": {"matmul(w1)": 7.5685, "sigmoid": 0.03, "other": None},
}
EXPECTED_MEMORY = {"mixtral": {"matmul(w1) decoding": 1.7307}, "blackmamba": {"sigmoid": 0.6457}}


@pytest.mark.parametrize(("metric", "expected"), [("sm_percent", EXPECTED_SM), ("memory_percent", EXPECTED_MEMORY)])
def test_tables(folder: Path, metric: str, expected: dict[str, dict[str, float | None]]) -> None:
    tables = kernel_tables(folder, PHASES)
    over = tables.operators[tables.operators["phase"] == "all"].set_index("label")
    for label, value in expected[folder.name].items():
        if value is None:
            assert over.loc[label, metric] != over.loc[label, metric]  # nobody looked into it
        else:
            assert over.loc[label, metric] == pytest.approx(value, abs=2e-4)


def test_sums_and_means_agree_and_are_said_to(folder: Path) -> None:
    tables = kernel_tables(folder, PHASES)
    point = tables.points.iloc[0]
    rows = tables.operators[tables.operators["phase"] != "all"]
    total = tables.operators[tables.operators["label"] == "time_weighted"].iloc[0]
    assert rows["busy_ns"].sum() == pytest.approx(point["busy_ns"]) == total["busy_ns"]
    known = rows[rows["sm_percent"].notna()]
    again = (known["sm_percent"] * known["busy_ns"]).sum() / known["busy_ns"].sum()
    assert again == pytest.approx(total["sm_percent"])
    assert total["num_sampled"] == len(counted(folder)) - point["num_unmatched"]
    for figure in (SM, MEMORY):
        text = " ".join(utilization_text(tables, figure).split())
        ms = f"{point['busy_ns'] / 1e6:.3f}"
        assert f"rows add up to {ms} ms a step, the trace has {ms} of this part" in text
        assert ("12 launches that ncu looked into are not in the trace" in text) == (folder.name == "mixtral")


def test_roofline_takes_ncus_bytes() -> None:
    table = rooflines(FIXTURES / "mixtral", PHASES).operators.set_index("label")
    moved = {}
    for cells in printed(FIXTURES / "mixtral"):
        place = place_of([next(text for name, text in cells.items() if "Push/Pop" in name)])
        assert place is not None
        if place.module.endswith("w1.base_layer"):
            moved[place.phase] = float(cells["dram__bytes_read.sum"].replace(",", ""))
    assert set(moved) == {"forward", "recompute"}
    row = table.loc["matmul(w1) decoding"]
    assert row["source"] == "ncu"
    assert row["num_bytes"] == pytest.approx(16 * sum(moved.values()))
    assert row["bytes_per_s"] == pytest.approx(16 * sum(moved.values()) / row["busy_ns"] * 1e9)
    assert table.loc["matmul(lora)", "source"] == "modelled"


def test_launches_of_the_raw_report(folder: Path) -> None:
    pytest.importorskip("ncu_report")
    rows = counted(folder)
    for by in ("range", "kernel"):
        found = ncu_groups(folder / REPORT_FILE, by)
        assert found.num_launches == found.groups["num_launches"].sum() == len(rows)
        assert found.groups["duration_ns"].sum() == sum(row["duration_ns"] for row in rows)
        assert found.groups["dram_read_bytes"].sum() == sum(row["dram_read_bytes"] for row in rows)
    done = tunescope("table", "ncu", folder / REPORT_FILE, "--format", "csv", "--by", "kernel")
    assert done.code == 0
    by_command = list(csv.DictReader(io.StringIO(done.out)))
    assert sorted(row["name"] for row in by_command) == sorted({row["kernel"] for row in rows})


# --- damaged ---


def test_a_csv_that_was_cut_off_is_an_error() -> None:
    text = (FIXTURES / "mixtral" / CSV_FILE).read_bytes()
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[:count])) for count in (2, 3, 20)]
    for cut in (len(text) - 1, len(text) - 2, *(start + more for start in starts for more in (1, 40, 500, 1500, 2400))):
        with pytest.raises(UserError):
            reports.rows_of_csv(text[:cut])


def test_damaged_csv_is_rows_or_an_error() -> None:
    text = (FIXTURES / "mixtral" / CSV_FILE).read_bytes()
    chance = random.Random(1)
    for _ in range(60):
        damaged = bytearray(text)
        for _ in range(chance.choice((1, 20, 400))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            rows = reports.rows_of_csv(bytes(damaged))
        except UserError:
            continue
        assert len(rows) in (0, 32)  # none where its head is gone


def test_a_damaged_report_is_an_error_or_whole(tmp_path: Path) -> None:
    pytest.importorskip("ncu_report")
    content = (FIXTURES / "mixtral" / REPORT_FILE).read_bytes()
    chance = random.Random(1)
    file = tmp_path / "x.ncu-rep"
    for share in (0.0001, 0.01, 0.5, 0.99, 1):
        file.write_bytes(content[: int(len(content) * share) - 1])
        with pytest.raises(UserError):
            reports.read_report(file)
    for num_bytes in (1, 1, 1, 20, 1000):
        damaged = bytearray(content)
        for _ in range(num_bytes):
            damaged[chance.randrange(4, len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            assert reports.read_report(file).num_rows == 32
        except UserError:
            continue
    file.write_bytes(content[: len(content) // 2])
    done = run("python3", "-m", "tunescope", "table", "ncu", file)
    assert done.code == 2
    assert "Traceback" not in done.err + done.out
    assert "could not be read" in done.err
