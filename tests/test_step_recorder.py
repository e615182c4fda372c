"""The recorder, driven by a Trainer of our own and a clock of our own, so that every nanosecond is known."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import results
from tunescope.config import Protocol
from tunescope.measure import steps as steps_module
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.steps import CHECK_EVERY_STEPS, StepRecorder

MS = 1_000_000
Batch = tuple[int, int, int]  # queries, slots a query, padding slots in all


class Clock:
    """Stands for the module `time`: moves only when told to, and the two clocks differ by a constant."""

    UNIX_NS = 10**18

    def __init__(self) -> None:
        self.now_ns = 10**12

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def time_ns(self) -> int:
        return self.now_ns + self.UNIX_NS


class Meter(EnergyMeter):
    """An energy meter that takes its time to open, and remembers when it was used."""

    def __init__(self, clock: Clock, opening_ns: int) -> None:
        super().__init__(use_gpu=False)
        self.clock, self.opening_ns = clock, opening_ns
        self.opened_ns: list[int] = []
        self.closed_ns: list[int] = []

    def start(self) -> None:
        self.clock.now_ns += self.opening_ns
        self.opened_ns.append(self.clock.now_ns)

    def stop_j(self) -> float | None:
        self.closed_ns.append(self.clock.now_ns)
        return 123.0


class Model(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: Any = None) -> None:
        return None


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    queries, slots, padding = batch
    mask = torch.ones(queries, slots, dtype=torch.long)
    mask.view(-1)[: min(padding, queries * slots)] = 0
    return {"input_ids": torch.zeros(queries, slots, dtype=torch.long), "attention_mask": mask}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(steps_module, "time", made)
    return made


@pytest.fixture(scope="module")
def shared_clock() -> Iterator[Clock]:
    """For hypothesis, whose examples cannot each have a fixture."""
    made = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "time", made)
        yield made


def train(
    clock: Clock,
    protocol: Protocol,
    step_ns: Sequence[int],
    *,
    batches: Sequence[Sequence[Batch]] | None = None,
    max_steps: int | None = None,
    opening_ns: int = 0,
    progress: list[tuple[int, int]] | None = None,
    with_mask: bool = True,
) -> tuple[StepRecorder, Meter, int]:
    """Runs the Trainer's events for as many of `step_ns` as the recorder lets it. Returns also the steps done."""
    meter = Meter(clock, opening_ns)
    seen: list[tuple[int, int]] = progress if progress is not None else []
    recorder = StepRecorder(protocol, lambda done, expected: seen.append((done, expected)), meter)
    model = Model()
    args = SimpleNamespace(device=torch.device("cpu"), process_index=0, world_size=1)
    state = SimpleNamespace(max_steps=len(step_ns) if max_steps is None else max_steps, global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    recorder.on_train_begin(args, state, control, model=model)
    for step, duration_ns in enumerate(step_ns):
        recorder.on_step_begin(args, state, control)
        micro = [(2, 16, 4)] if batches is None else batches[step]
        for batch in micro:
            tensors = batch_tensors(batch)
            model(**tensors) if with_mask else model(input_ids=tensors["input_ids"])
            clock.now_ns += duration_ns // len(micro)
        clock.now_ns += duration_ns % len(micro)
        state.global_step += 1
        recorder.on_step_end(args, state, control)
        if control.should_training_stop:
            break
    recorder.on_train_end(args, state, control)
    assert not model._forward_pre_hooks, "the hook must go with the training"
    return recorder, meter, state.global_step


def durations(recorder: StepRecorder) -> list[int]:
    return [row["duration_ns"] for row in recorder.rows()]


# --- windows ---


@settings(max_examples=80, deadline=None)
@given(
    step_ns=st.lists(st.integers(1, 10**10), min_size=1, max_size=40),
    num_warmup_steps=st.integers(0, 6),
    opening_ns=st.integers(0, 10**9),
)
def test_windows_and_the_pause_tile_the_run(
    step_ns: list[int], num_warmup_steps: int, opening_ns: int, shared_clock: Clock
) -> None:
    protocol = Protocol(num_queries=2 * len(step_ns), num_warmup_steps=num_warmup_steps)
    recorder, meter, done = train(shared_clock, protocol, step_ns, opening_ns=opening_ns)
    assert done == len(step_ns)
    assert durations(recorder) == step_ns
    assert recorder.train_runtime_ns == sum(step_ns) + opening_ns * len(meter.opened_ns)
    assert [row["host_duration_ns"] for row in recorder.rows()] == step_ns
    # There is always a step left to time, and exactly the first ones are warm-up.
    warm_up = [row["is_warmup"] for row in recorder.rows()]
    expected = min(num_warmup_steps, len(step_ns) - 1)
    assert warm_up == [True] * expected + [False] * (len(step_ns) - expected)
    assert recorder.num_warmup_steps == expected


def test_energy_window_is_exactly_the_timed_steps(clock: Clock) -> None:
    start_ns = clock.now_ns
    recorder, meter, _ = train(clock, Protocol(num_queries=16), [7 * MS] * 3 + [5 * MS] * 5, opening_ns=100 * MS)
    assert meter.opened_ns == [start_ns + 21 * MS + 100 * MS]
    assert meter.closed_ns == [start_ns + 21 * MS + 100 * MS + 25 * MS]
    timed_ns = sum(row["duration_ns"] for row in recorder.rows() if not row["is_warmup"])
    assert meter.closed_ns[0] - meter.opened_ns[0] == timed_ns
    assert recorder.energy_j == 123.0
    # Samples of the GPU's clock are told apart by the same two moments.
    assert recorder.timed_start_unix_ns - Clock.UNIX_NS == meter.opened_ns[0]
    assert recorder.timed_end_unix_ns - Clock.UNIX_NS == meter.closed_ns[0]


def test_rows_have_the_columns_of_the_schema(clock: Clock, tmp_path: Any) -> None:
    recorder, _, _ = train(clock, Protocol(num_queries=8), [5 * MS] * 4)
    rows = recorder.rows()
    results.write_arrow(tmp_path / "steps.arrow", rows, results.STEPS_SCHEMA)
    assert results.read_arrow(tmp_path / "steps.arrow", results.STEPS_SCHEMA).to_pylist() == rows
    assert recorder.rows() == rows  # asking twice changes nothing
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


# --- counts ---


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(1, 8), st.integers(1, 64), st.integers(0, 100)), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    )
)
def test_counts_add_up_over_micro_steps(batches: list[list[Batch]], shared_clock: Clock) -> None:
    """With gradient accumulation a step is several forwards; nothing is lost, and nothing moves to another step."""
    recorder, _, _ = train(shared_clock, Protocol(num_queries=1), [MS] * len(batches), batches=batches)
    for row, micro in zip(recorder.rows(), batches, strict=True):
        assert row["num_queries"] == sum(queries for queries, _, _ in micro)
        assert row["padded_tokens"] == sum(queries * slots for queries, slots, _ in micro)
        assert row["tokens"] == sum(q * s - min(padding, q * s) for q, s, padding in micro)
        assert row["seq_len_tokens"] == max(slots for _, slots, _ in micro)
        assert row["micro_steps"] == len(micro)
        assert type(row["tokens"]) is int


def test_without_a_mask_every_slot_is_a_token(clock: Clock) -> None:
    recorder, _, _ = train(clock, Protocol(num_queries=1), [MS], with_mask=False)
    (row,) = recorder.rows()
    assert row["tokens"] == row["padded_tokens"] == 32


def test_a_forward_after_training_is_not_counted(clock: Clock) -> None:
    recorder, _, _ = train(clock, Protocol(num_queries=4), [MS] * 2)
    before = recorder.rows()
    Model()(**batch_tensors((2, 16, 0)))
    assert recorder.rows() == before


# --- when it ends ---

LONG = 2000


def steady(noise_frac: float, num_steps: int = LONG, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.maximum(1e9 * (1 + noise_frac * rng.standard_normal(num_steps)), 1e6).astype(int).tolist()


def test_steady_steps_stop_at_the_fewest_allowed(clock: Clock) -> None:
    recorder, _, done = train(clock, Protocol(), steady(0.001))
    assert done == 3 + 20
    assert recorder.interval_reached


def test_noisy_steps_go_on_until_the_interval_is_narrow(clock: Clock) -> None:
    from tunescope.analyze.intervals import bootstrap_ratio

    protocol = Protocol()
    recorder, _, done = train(clock, protocol, steady(0.1))
    assert 100 < done < 1000
    assert (done - 3) % CHECK_EVERY_STEPS == 0
    assert recorder.interval_reached
    timed = [row for row in recorder.rows() if not row["is_warmup"]]
    value, low, high = bootstrap_ratio(
        np.array([row["num_queries"] for row in timed]), np.array([row["duration_ns"] for row in timed]) / 1e9
    )
    assert (high - low) / value < protocol.interval_frac


def test_the_more_noise_the_longer(clock: Clock) -> None:
    lengths = [train(clock, Protocol(), steady(noise))[2] for noise in (0.02, 0.06, 0.12)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_most_steps_allowed_end_it(clock: Clock) -> None:
    recorder, _, done = train(clock, Protocol(max_timed_steps=40), steady(1.0))
    assert done == 3 + 40
    assert not recorder.interval_reached


def test_the_longest_time_allowed_ends_it(clock: Clock) -> None:
    recorder, _, done = train(clock, Protocol(max_timed_s=30.0), [2_000 * MS, 500 * MS] * 500)
    timed_s = sum(row["duration_ns"] for row in recorder.rows() if not row["is_warmup"]) / 1e9
    assert 30 <= timed_s < 32
    assert done == len(recorder.rows())
    assert not recorder.interval_reached


def test_the_fewest_steps_come_before_the_longest_time(clock: Clock) -> None:
    """As Protocol says: a limit of 5 s at 3 s a step still times 20 steps."""
    _, _, done = train(clock, Protocol(max_timed_s=5.0), [3_000 * MS] * 100)
    assert done == 3 + 20


def test_slow_warm_up_is_not_time_spent(clock: Clock) -> None:
    _, _, done = train(clock, Protocol(max_timed_s=100.0), [200_000 * MS] * 3 + [2_000 * MS, 4_000 * MS] * 100)
    assert done > 3 + 20


def test_slow_opening_of_the_energy_window_is_not_time_spent(clock: Clock) -> None:
    _, _, done = train(clock, Protocol(max_timed_s=100.0), [2_000 * MS, 4_000 * MS] * 100, opening_ns=500_000 * MS)
    assert done > 3 + 20


def test_the_papers_protocol_never_stops_early(clock: Clock) -> None:
    recorder, _, done = train(
        clock, Protocol(num_queries=3000, max_timed_s=1.0, max_timed_steps=1), [1_000 * MS] * 1500
    )
    assert done == 1500
    assert sum(row["num_queries"] for row in recorder.rows()) == 3000


def test_the_end_of_the_data_ends_it(clock: Clock) -> None:
    recorder, _, done = train(clock, Protocol(), steady(1.0, 10))
    assert done == 10
    assert len(recorder.rows()) == 10
    assert not recorder.interval_reached


def test_one_step_is_timed_where_there_is_only_one(clock: Clock) -> None:
    recorder, _, _ = train(clock, Protocol(), [5 * MS])
    assert [row["is_warmup"] for row in recorder.rows()] == [False]


def test_warm_up_cannot_make_a_point_look_steady(clock: Clock) -> None:
    """Three slow first steps are neither in the rule's interval nor in the rate."""
    recorder, _, done = train(clock, Protocol(), [60_000 * MS] * 3 + steady(0.001))
    assert done == 3 + 20
    assert recorder.interval_reached


# --- progress ---


def test_progress_is_told_after_every_step_and_ends_complete(clock: Clock) -> None:
    seen: list[tuple[int, int]] = []
    train(clock, Protocol(), steady(0.001), progress=seen)
    assert [done for done, _ in seen] == list(range(1, 24))
    assert seen[-1] == (23, 23)
    assert all(expected >= 1 for _, expected in seen)
    seen.clear()
    train(clock, Protocol(num_queries=20), [MS] * 10, progress=seen)
    assert seen == [(done, 10) for done in range(1, 11)]


def test_durations_of_gpu_events_are_kept_to_the_nanosecond() -> None:
    """torch gives milliseconds as a float32: rounding, not truncation, and no unit lost."""

    class Event:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def elapsed_time(self, end: "Event") -> float:
            return end.ms - self.ms

    assert steps_module._between_ns((Event(1.0), 0), (Event(1366.25), 5)) == 1_365_250_000
    assert steps_module._between_ns((None, 7), (None, 19)) == 12


def test_the_end_of_a_noisy_point_is_foreseen(clock: Clock) -> None:
    """By its interval, or by the time it may take: the bar must not stand at 99 % for ten minutes."""
    noisy = [900 * MS, 1_100 * MS] * 1_000
    seen: list[tuple[int, int]] = []
    _, _, done = train(clock, Protocol(max_timed_s=1e6), noisy, progress=seen)
    assert done > 300
    assert seen[100][1] == pytest.approx(done, rel=0.1)
    seen.clear()
    _, _, done = train(clock, Protocol(max_timed_s=60.0), noisy, progress=seen)
    assert done == 3 + 60
    assert seen[40][1] == pytest.approx(done, abs=2)
    assert seen[-1] == (done, done)
