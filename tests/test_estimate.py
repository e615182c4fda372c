"""What a run takes: laws that any model of step times must leave standing, and sums by hand with one seen through."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_estimate import FLOOR_S, FLOP_PER_SLOT, FakeTimes, ask, hours, only
from helpers_points import gpu_environment, step_rows, write_point
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import cost
from tunescope.config import Point
from tunescope.cost import energy, estimate_table
from tunescope.cost.estimate_inputs import DENSE, SPARSE, read_run, resized
from tunescope.cost.estimate_memory import (
    TORCH_MEMORY_GIB,
    gpu_memory_bytes,
    guess_max_batch,
    max_batch_size,
    needed_bytes,
)
from tunescope.cost.estimate_runs import estimate_runs, find_gpus
from tunescope.cost.estimate_table import COLUMNS, answer, estimate
from tunescope.cost.lengths import Lengths
from tunescope.cost.padding import pad_epoch
from tunescope.cost.time_points import RECIPES, study_lengths
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.hardware import DEVICES, GIB, UnknownDevice, find_device

# Other lengths are drawn for one query more, and the last batch is another: in 2,083 pairs it was up to 1.4e-7 less.
ROUNDING = 1e-5
A40, H100 = find_device("A40"), find_device("H100")


# --- by hand ---


def test_hours_usd_and_rate_by_hand() -> None:
    """Batch 4 of MATH on the A40: 3,480 usual steps and one of the query that is left over, 10 times."""
    found = only(ask(batch=4, epochs=10))
    padding = pad_epoch(study_lengths("mixtral", "math").cut(1024), 4)
    assert padding.last is not None
    assert (padding.num_steps, padding.last.batch_size) == (3481, 1)
    per_slot_s = 3 * FLOP_PER_SLOT / A40.peak_bf16_flop_per_s
    an_epoch_s = 3481 * FLOOR_S + padding.expected_slots * per_slot_s
    assert found.hours is not None
    assert found.hours.median == pytest.approx(10 * an_epoch_s / 3600, rel=1e-12)
    assert found.hours.high / found.hours.median == pytest.approx(1.4)
    assert found.hours.median / found.hours.low == pytest.approx(1.4)
    assert found.num_steps == 34810
    assert found.queries_per_s is not None
    assert found.queries_per_s.median == pytest.approx(13921 / an_epoch_s)
    assert found.queries_per_s.low == pytest.approx(13921 / an_epoch_s / 1.4)
    assert found.usd is not None
    assert found.usd.median == pytest.approx(0.79 * found.hours.median)
    assert found.price is not None
    assert found.price.date == "2024-08"


def test_the_step_is_asked_for_at_the_slots_and_keys_of_its_padding() -> None:
    times = FakeTimes()
    ask(batch=4, step_times=times)
    usual = pad_epoch(study_lengths("mixtral", "math").cut(1024), 4).usual
    asked = times.asked[0]
    assert asked["slots"] == pytest.approx(4 * usual.mean_tokens)
    assert asked["key_slots"] == pytest.approx(4 * float(usual.probability @ usual.padded_tokens**2) / 2)
    assert asked["is_other_host"]


def test_a_cutoff_shortens_and_says_so() -> None:
    run = ask(cutoff_len=200).run
    assert run.longest_tokens == 200
    assert run.num_cut == study_lengths("mixtral", "math").num_longer_than(200) > 0
    assert hours(batch=4, cutoff_len=200) < hours(batch=4)


def test_accumulation_makes_fewer_steps_of_as_many_queries() -> None:
    usual, accumulated = (
        only(ask(batch=2, recipe=RECIPES["mixtral"] | {"gradient_accumulation_steps": n})) for n in (1, 4)
    )
    assert (usual.num_steps, accumulated.num_steps) == (6961, 1741)  # of 6,961 micro-batches the last step has one


def test_an_interval_covers_the_tokens_that_a_word_may_have(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": "why " * n, "output": "so"} for n in range(100, 140)]))
    run = only(ask(data=str(file), batch=2))
    assert run.hours is not None
    assert run.hours.high / run.hours.median > 1.4
    assert run.hours.median / run.hours.low > 1.4
    assert any("estimated from its words" in note for note in run.run.notes)


def test_cheapest_fastest_and_break_even() -> None:
    found = ask(gpus=["a40", "h100"], prices=["a40=1", "h100=2"])
    a40, h100 = found.estimates
    assert a40.hours is not None
    assert h100.hours is not None
    assert found.fastest is h100
    best = a40 if a40.hours.median < 2 * h100.hours.median else h100
    assert found.cheapest is best
    for each in found.estimates:
        limit = found.break_even_usd_per_hour(each)
        assert limit is not None
        assert best.usd is not None
        assert each.hours is not None
        assert limit * each.hours.median == pytest.approx(best.usd.median)


def test_without_a_price_there_is_no_cost_and_nobody_elses_price() -> None:
    found = ask(gpus=["l40s"])
    assert only(found).usd is None
    assert only(found).no_price is not None
    assert found.cheapest is None
    assert found.fastest is only(found)


def test_a_faster_batch_than_the_largest_is_named() -> None:
    found = only(ask(batch="max"))
    assert found.batch_size == found.max_batch_size
    assert found.faster_batch_size is not None
    assert found.faster_batch_size < found.max_batch_size
    assert hours(batch=found.faster_batch_size) == pytest.approx(found.faster_hours)
    assert found.faster_hours < 0.97 * hours(batch="max")


# --- laws ---


@settings(max_examples=40, deadline=None)
@given(queries=st.integers(1, 3000), more=st.integers(0, 3000), epochs=st.floats(0.1, 10), times=st.floats(1, 5))
def test_more_data_and_more_epochs_never_cost_less(queries: int, more: int, epochs: float, times: float) -> None:
    """At a batch of one's own, and at the fastest, which is the best of such."""
    for batch in (min(queries, 8), "fastest"):
        few = hours(queries=queries, epochs=epochs, data="cs", batch=batch)
        assert hours(queries=queries + more, epochs=epochs, data="cs", batch=batch) >= few * (1 - ROUNDING)
        assert hours(queries=queries, epochs=epochs * times, data="cs", batch=batch) >= few * (1 - ROUNDING)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 27), gpu=st.sampled_from(["a40", "h100"]), data=st.sampled_from(["cs", "math"]))
def test_no_batch_beats_the_fastest_by_more_than_the_grid_is_coarse(batch: int, gpu: str, data: str) -> None:
    """By the real model of step times."""
    fastest = only(answer("mixtral", data, gpus=[gpu]))
    one = only(answer("mixtral", data, gpus=[gpu], batch=batch))
    assert one.hours is not None
    assert fastest.hours is not None
    assert fastest.hours.median <= 1.005 * one.hours.median
    largest = only(answer("mixtral", data, gpus=[gpu], batch="max"))
    assert largest.hours is not None
    assert fastest.hours.median <= largest.hours.median
    if fastest.max_batch_hours is not None:
        assert fastest.max_batch_hours == pytest.approx(largest.hours.median)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 12), gpu=st.sampled_from(["a40", "a100-80", "h100", "h200", "b200"]))
@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_dense_is_never_cheaper_than_sparse_at_equal_batch(model: str, batch: int, gpu: str) -> None:
    """By the real model of step times."""
    both = [only(answer(model, "cs", gpus=[gpu], batch=batch, sparsity=s)) for s in (SPARSE, DENSE)]
    sparse, dense = both
    if dense.hours is not None:
        assert sparse.hours is not None
        assert dense.hours.median >= sparse.hours.median
    assert dense.max_batch_size <= sparse.max_batch_size


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 64), length=st.integers(1, 1500), rank=st.integers(1, 64),
    more=st.tuples(st.integers(0, 8), st.integers(0, 300), st.integers(0, 64)),
)  # fmt: skip
def test_memory_never_falls_with_batch_length_or_rank(
    batch: int, length: int, rank: int, more: tuple[int, int, int]
) -> None:
    def needed(batch: int, length: int, rank: int) -> int:
        return needed_bytes(MIXTRAL_8X7B, RECIPES["mixtral"] | {"lora_rank": rank}, batch, length)

    least = needed(batch, length, rank)
    assert needed(batch + more[0], length, rank) >= least
    assert needed(batch, length + more[1], rank) >= least
    assert needed(batch, length, rank + more[2]) >= least


@settings(max_examples=30, deadline=None)
@given(length=st.integers(8, 1024), device=st.sampled_from(DEVICES))
def test_the_batch_that_fits_needs_no_more_than_there_is_and_one_more_would(length: int, device: Any) -> None:
    recipe, have = RECIPES["mixtral"], gpu_memory_bytes(device)
    fitting = max_batch_size(MIXTRAL_8X7B, recipe, have, length, 10**9)
    if fitting:
        assert needed_bytes(MIXTRAL_8X7B, recipe, fitting, length) <= have
    assert needed_bytes(MIXTRAL_8X7B, recipe, fitting + 1, length) > have
    assert guess_max_batch(MIXTRAL_8X7B, recipe, have, length) == (fitting or None)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), num_queries=st.integers(1, 500),
)  # fmt: skip
def test_resized_lengths_keep_their_number_and_range(lengths: list[int], num_queries: int) -> None:
    whole = Lengths.of_queries(lengths, "a test")
    made = resized(whole, num_queries)
    assert made.num_queries == num_queries
    assert set(made.lengths_tokens) <= set(whole.lengths_tokens)
    same = resized(whole, len(lengths))
    assert np.array_equal(same.per_query(), whole.per_query())
    assert np.array_equal(resized(whole, 3 * len(lengths)).counts, 3 * whole.counts)


# --- the default model ---


def test_the_real_model_answers_for_the_papers_runs_within_its_interval() -> None:
    """Table IV's A40 at its own batch of 4: 1.005 queries/s were measured."""
    found = only(answer("mixtral", "math", gpus=["a40"], batch=4, epochs=10))
    assert found.queries_per_s is not None
    assert found.queries_per_s.low < 1.005476933 < found.queries_per_s.high


@pytest.mark.parametrize("model", ["mixtral", "blackmamba", "qwen3_moe"])
def test_every_family_has_an_answer_from_the_real_model(model: str) -> None:
    found = only(answer(model, "cs", gpus=["h200"]))
    assert found.hours is not None
    assert 0 < found.hours.low < found.hours.median < found.hours.high
    assert found.step is not None
    assert sum(seconds for _, seconds in found.step.terms) == pytest.approx(found.step.median_s)
    assert found.peak is not None
    assert sum(found.peak.terms.values()) == found.peak.num_bytes


def test_calibrated_points_are_of_ones_own_host(tmp_path: Path) -> None:
    point = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=4)
    rows = step_rows([5 * 10**9] * 23, num_queries=4)
    write_point(tmp_path / "p", point, rows=rows, outcome_changes={"gpu_energy_j": 25_000.0})
    base = only(answer("mixtral", "cs", gpus=["a40"], batch=4))
    tuned = answer("mixtral", "cs", gpus=["a40"], batch=4, calibrate=tmp_path)
    assert tuned.calibration is not None
    assert "1 point of NVIDIA A40" in str(tuned.calibration)
    own = only(tuned)
    assert own.hours is not None
    assert base.hours is not None
    assert own.hours.high / own.hours.low < base.hours.high / base.hours.low
    assert own.power is not None
    assert own.power.kind == energy.MEASURED
    assert own.power.watts == pytest.approx(250)  # 25 kJ in 20 timed steps of 5 s
    assert own.energy_j_per_query == pytest.approx(250 * own.hours.median * 3600 / 15_119)
    far = only(answer("mixtral", "cs", gpus=["a40"], batch=16, calibrate=tmp_path)).power
    assert far is not None
    assert (far.kind, far.watts) == (energy.BOUND, A40.board_power_w)  # a batch of 4 says nothing of one of 16


def test_points_without_energy_leave_the_bound(tmp_path: Path) -> None:
    write_point(tmp_path / "p", Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=4), [10**9] * 23)
    write_point(tmp_path / "q", Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=8), status="oom")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "point.json").write_text("{")
    strange = gpu_environment("Another GPU")
    write_point(
        tmp_path / "s", Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1), [10**9] * 23,
        environment=strange, outcome_changes={"gpu_energy_j": 1.0},
    )  # fmt: skip
    assert energy.read_power(tmp_path) == ()


# --- the table ---


def test_the_library_gives_a_row_a_gpu_with_units_in_every_name() -> None:
    table = cost.estimate("mixtral", "math", gpus=["all"], step_times=FakeTimes())
    assert list(table.columns) == list(COLUMNS)
    assert list(table["gpu"]) == [device.name for device in DEVICES]
    small, ok = table[table["status"] == "too small"], table[table["status"] == "ok"]
    assert len(small) + len(ok) == len(table)
    assert len(small)
    assert small["cause"].str.contains("what would fit").all()
    assert ok[["hours", "step_s", "queries_per_s", "needed_gib"]].notna().all(axis=None)
    assert (ok["needed_gib"] <= ok["gpu_memory_gib"]).all()
    assert (ok["hours_low"] < ok["hours"]).all()
    assert ok["is_cheapest"].sum() == ok["is_fastest"].sum() == 1
    priced = ok["usd"].notna()
    assert ok.loc[priced, ["usd_per_hour", "price_provider", "price_date", "price_source"]].notna().all(axis=None)
    assert ok.loc[~priced, "usd_per_hour"].isna().all()
    units = ("_s", "_gib", "_frac", "_tokens", "_usd", "_kwh", "_j", "_w", "_query", "_hour", "_low", "_high")
    counts = ("num_", "is_", "batch", "max_batch", "faster_batch", "hours", "faster_hours", "usd", "tokens_per_epoch",
              "epochs", "top_k", "price_", "energy_")  # fmt: skip
    words = {"gpu", "status", "cause", "model", "sparsity", "moe_path", "data", "basis", "peak_moment", "power_kind",
             "slots_over_measured"}  # fmt: skip
    for name in COLUMNS:
        assert name in words or name.endswith(units) or name.startswith(counts), name


def test_memory_of_every_gpu_lies_in_the_range_that_hardware_accepts() -> None:
    assert TORCH_MEMORY_GIB.keys() <= {device.name for device in DEVICES}
    for device in DEVICES:
        assert find_device(device.name, gpu_memory_bytes(device) / GIB) is device


def test_names_of_gpus() -> None:
    assert find_gpus(["all"]) == find_gpus(["a40", "all"]) == DEVICES
    assert find_gpus(["a40,h100", "A40"]) == (A40, H100)
    assert [device.memory_gb for device in find_gpus(["a100-40,a100-80"])] == [40, 80]
    for bad in ("a100", "gtx-480"):
        with pytest.raises(UnknownDevice):
            find_gpus([bad])
    with pytest.raises(UserError, match="names no GPU"):
        find_gpus([" , "])


def test_runs_share_nothing_that_changes() -> None:
    """The same ask twice gives the same answer, and packaged recipes stay as they are."""
    before = json.dumps(RECIPES)
    assert hours(cutoff_len=300) == hours(cutoff_len=300)
    assert json.dumps(RECIPES) == before


def test_estimates_come_in_the_order_asked() -> None:
    run = read_run("mixtral", "cs")
    found = estimate_runs(run, (H100, A40), FakeTimes())
    assert [each.device for each in found] == [H100, A40]


def test_the_lazy_export_is_the_function() -> None:
    assert cost.estimate is estimate is estimate_table.estimate
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cost.nothing


def test_own_devices_are_asked_of_their_own_host() -> None:
    times = FakeTimes()
    estimate_runs(read_run("mixtral", "cs"), (A40, H100), times, batch=1, own_devices=(A40.name,))
    of: Callable[[str], set[bool]] = lambda name: {a["is_other_host"] for a in times.asked if a["device"] == name}  # noqa: E731
    assert (of(A40.name), of(H100.name)) == ({False}, {True})
