"""The search for the largest batch: which sizes it tries, what it finds, and that it goes on where it was stopped."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope.config import MAX_BATCH, Point
from tunescope.measure.inputs import Data
from tunescope.measure.max_batch import (
    MAX_MEASUREMENTS,
    STATE_FOLDER,
    BatchSearch,
    Found,
    Trial,
    TrialLog,
    bracket,
    find_max_batch,
    make_search,
    next_batch_size,
    stretched,
)

SYNTHETIC = Data(None, {"kind": "synthetic"}, None)
POINT = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=1, find_max=True)


def search_of(largest: int = MAX_BATCH) -> BatchSearch:
    return BatchSearch(
        largest_batch_size=largest, longest_tokens=512, data=SYNTHETIC, asked_queries=None, usual_queries=256
    )


class Gpu:
    """Runs trials that fit up to a limit. measured_limit: of measurements; failing: sizes that end otherwise."""

    def __init__(self, limit: int, measured_limit: int | None = None, failing: tuple[int, ...] = ()) -> None:
        self.limit, self.measured_limit, self.failing = limit, measured_limit, failing
        self.runs: list[tuple[int, bool]] = []

    def __call__(self, batch_size: int, is_trial: bool) -> dict[str, Any]:
        self.runs.append((batch_size, is_trial))
        if batch_size in self.failing:
            return {"status": "failed", "cause": "RuntimeError: broken"}
        limit = self.limit if is_trial or self.measured_limit is None else self.measured_limit
        return {"status": "ok", "cause": None} if batch_size <= limit else {"status": "oom", "cause": "no room"}


def find(folder: Path, gpu: Gpu, guess: int | None = None, largest: int = MAX_BATCH) -> Found:
    return find_max_batch(search_of(largest), TrialLog(folder, "p", "hash"), guess, gpu, lambda text: None)


def tried(limit: int, guess: int = 1, largest: int = MAX_BATCH) -> list[Trial]:
    """All trials on a GPU that holds `limit`."""
    trials: list[Trial] = []
    while (size := next_batch_size(trials, guess, largest)) is not None:
        trials.append(Trial(batch_size=size, status="ok" if size <= limit else "oom"))
    return trials


# --- which sizes ---


@given(limit=st.integers(0, 70_000), guess=st.integers(1, 70_000), largest=st.integers(1, MAX_BATCH))
def test_the_limit_is_found_exactly_from_any_guess_and_no_size_is_tried_twice(
    limit: int, guess: int, largest: int
) -> None:
    trials = tried(limit, guess, largest)
    sizes = [trial.batch_size for trial in trials]
    assert bracket(trials)[0] == min(limit, largest)
    assert len(set(sizes)) == len(sizes)
    assert all(1 <= size <= largest for size in sizes)
    low, high = bracket(trials)
    assert high == low + 1 if high is not None else low == largest


@given(limit=st.integers(1, MAX_BATCH - 1))
def test_doubling_and_bisection_take_twice_the_logarithm(limit: int) -> None:
    assert len(tried(limit)) <= 2 * limit.bit_length() + 1


@given(limit=st.integers(1, 4_000), error=st.integers(-3, 3))
def test_a_good_guess_takes_few_trials(limit: int, error: int) -> None:
    guess = max(limit + error, 1)
    assert len(tried(limit, guess)) <= 2 + 2 * (max(guess // 64, 1) + abs(error)).bit_length() + 1
    assert limit > 62 or [trial.batch_size for trial in tried(limit, limit)] == [limit, limit + 1]


def test_sizes_by_hand() -> None:
    assert [trial.batch_size for trial in tried(41)] == [1, 2, 4, 8, 16, 32, 64, 48, 40, 44, 42, 41]
    assert [trial.batch_size for trial in tried(41, guess=39)] == [39, 40, 42, 41]
    assert [trial.batch_size for trial in tried(41, guess=45)] == [45, 44, 42, 38, 40, 41]
    assert [trial.batch_size for trial in tried(99, largest=5)] == [1, 2, 4, 5]


def test_a_size_that_fits_above_one_that_does_not_is_luck() -> None:
    trials = [Trial(batch_size=size, status=status) for size, status in ((1, "ok"), (4, "oom"), (5, "ok"), (3, "ok"))]
    assert bracket(trials) == (3, 4)
    assert next_batch_size(trials, 1, MAX_BATCH) is None


# --- the search ---


@given(limit=st.integers(1, 300), guess=st.none() | st.integers(1, 300), stop_after=st.integers(0, 12))
def test_a_search_stopped_anywhere_goes_on_and_tries_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, limit: int, guess: int | None, stop_after: int
) -> None:
    class Stopped(BaseException):
        pass

    class Stopping(Gpu):
        def __call__(self, batch_size: int, is_trial: bool) -> dict[str, Any]:
            if len(self.runs) == stop_after:
                raise Stopped
            return super().__call__(batch_size, is_trial)

    folder = tmp_path_factory.mktemp("search")
    first, second = Stopping(limit), Gpu(limit)
    try:
        found = find(folder, first, guess)
    except Stopped:
        found = find(folder, second, guess)
    assert found.batch_size == limit
    assert found.outcome["max_batch"]["batch_size"] == limit
    assert found.outcome["max_batch"]["first_oom_batch_size"] == limit + 1
    runs = first.runs + second.runs
    assert len(set(runs)) == len(runs)
    assert runs.count((limit, False)) == 1


def test_a_measurement_outweighs_the_trial_that_promised_it(tmp_path: Path) -> None:
    """A trial fits by luck where memory is nearly full: the search goes on below."""
    gpu = Gpu(limit=12, measured_limit=9)
    found = find(tmp_path, gpu)
    assert found.batch_size == 9
    assert [size for size, is_trial in gpu.runs if not is_trial] == [12, 11, 9, 10, 9]
    trials = found.outcome["max_batch"]["trials"]
    assert [t["batch_size"] for t in trials if t["is_measurement"]] == [12, 11, 9, 10]


@pytest.mark.parametrize(("limit", "measured_limit"), [(60, 54), (300, 270), (3000, 2700), (300, 0), (3000, 0)])
def test_measurements_that_hold_less_are_few_and_end_near_what_they_hold(
    tmp_path: Path, limit: int, measured_limit: int
) -> None:
    gpu = Gpu(limit=limit, measured_limit=measured_limit)
    found = find(tmp_path, gpu)
    measured = [size for size, is_trial in gpu.runs if not is_trial]
    assert len(measured) <= MAX_MEASUREMENTS + 2  # one more for the row, and the last of a way down to 1
    if measured_limit == 0:
        assert (found.batch_size, found.outcome["status"]) == (1, "oom")
        assert found.outcome["max_batch"]["batch_size"] == 0
    else:
        assert found.outcome["status"] == "ok"
        assert found.batch_size == found.outcome["max_batch"]["batch_size"]
        assert 0.97 * measured_limit <= found.batch_size <= measured_limit
        assert found.outcome["max_batch"]["first_oom_batch_size"] > measured_limit


@given(limit=st.integers(1, 400), held_frac=st.floats(0, 1), stop_after=st.integers(0, 30))
def test_a_search_among_measurements_goes_on_where_it_was_stopped(
    tmp_path_factory: pytest.TempPathFactory, limit: int, held_frac: float, stop_after: int
) -> None:
    class Stopped(BaseException):
        pass

    class Stopping(Gpu):
        def __call__(self, batch_size: int, is_trial: bool) -> dict[str, Any]:
            if len(self.runs) == stop_after:
                raise Stopped
            return super().__call__(batch_size, is_trial)

    measured_limit = int(limit * held_frac)
    whole = find(tmp_path_factory.mktemp("whole"), Gpu(limit, measured_limit))
    folder = tmp_path_factory.mktemp("stopped")
    try:
        found = find(folder, Stopping(limit, measured_limit))
    except Stopped:
        found = find(folder, Gpu(limit, measured_limit))
    assert found.batch_size == whole.batch_size
    assert found.outcome["status"] == ("ok" if measured_limit else "oom")
    assert found.batch_size <= max(measured_limit, 1)


@pytest.mark.parametrize(("limit", "measured_limit"), [(0, None), (1, 0)])
def test_not_even_one_query(tmp_path: Path, limit: int, measured_limit: int | None) -> None:
    found = find(tmp_path, Gpu(limit, measured_limit), guess=3)
    assert (found.batch_size, found.outcome["status"]) == (1, "oom")
    assert found.outcome["max_batch"]["batch_size"] == 0
    # Killed before its row was published: the row is made again.
    assert find(tmp_path, Gpu(limit, measured_limit)).outcome["max_batch"]["batch_size"] == 0


def test_the_data_end_the_search_where_memory_does_not(tmp_path: Path) -> None:
    found = find(tmp_path, Gpu(1000), largest=6)
    assert found.batch_size == 6
    assert found.outcome["max_batch"]["first_oom_batch_size"] is None
    assert found.outcome["max_batch"]["largest_batch_size_of_data"] == 6


def test_a_failure_ends_the_search_and_what_was_tried_before_is_kept(tmp_path: Path) -> None:
    found = find(tmp_path, Gpu(10, failing=(8,)))
    assert found.outcome["status"] == "failed"
    assert found.outcome["cause"] == "trying batch 8: RuntimeError: broken"
    again = Gpu(10)
    assert find(tmp_path, again).batch_size == 10
    assert again.runs[0] == (8, True)


def test_trials_of_other_settings_do_not_count(tmp_path: Path) -> None:
    log = TrialLog(tmp_path, "p", "hash")
    log.add(Trial(batch_size=4, status="oom"))
    assert TrialLog(tmp_path, "p", "hash").trials == log.trials
    assert TrialLog(tmp_path, "p", "another hash").trials == []
    assert TrialLog(tmp_path, "q", "hash").trials == []
    (tmp_path / STATE_FOLDER / "p.json").write_text("{")
    assert TrialLog(tmp_path, "p", "hash").trials == []
    log.add(Trial(batch_size=2, status="ok"))
    assert TrialLog(tmp_path, "p", "hash", fresh=True).trials == []
    assert not (tmp_path / STATE_FOLDER).exists()


# --- the data of a trial ---


def test_how_far_the_data_go_and_how_long_they_are() -> None:
    assert make_search(POINT, SYNTHETIC, None, 256, 1024).largest_batch_size == MAX_BATCH
    assert make_search(POINT, SYNTHETIC, 1000, 256, 1024).largest_batch_size == 999
    file = make_search(POINT, Data({}, {"kind": "file"}, 41), None, 256, 1024)
    assert (file.largest_batch_size, file.longest_tokens) == (20, None)
    assert make_search(POINT, SYNTHETIC, None, 256, 1024).longest_tokens == 512  # of CS in the paper's Figure 2
    assert make_search(POINT, SYNTHETIC, None, 256, 200).longest_tokens == 200


@given(length=st.integers(1, 50), wanted=st.integers(0, 200))
def test_a_stretched_query_has_the_length_and_only_its_own_tokens(length: int, wanted: int) -> None:
    row = {"input_ids": list(range(length)), "labels": [-100] * length, "attention_mask": [1] * length, "images": None}
    made = stretched(row, wanted)
    assert {len(made[name]) for name in ("input_ids", "labels", "attention_mask")} == {max(length, wanted)}
    assert made["input_ids"][:length] == row["input_ids"]
    assert set(made["input_ids"]) == set(row["input_ids"])
    assert made["images"] is None
