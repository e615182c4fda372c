"""`--points cs:sparse:bs=max` through the launcher: trials in processes, killed and resumed, to a row of the table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_points import recipe, tiny_workload
from launching import (
    REPO,
    TINY,
    Launcher,
    assert_one_clear_paragraph,
    measure,
    run,
    statuses,
    table,
)

from tunescope import results
from tunescope.config import Point
from tunescope.measure.max_batch import STATE_FOLDER, longest_batch_callback

MAX, MAX_ID = "cs:sparse:bs=max", "cs-k2-bmax-tiny-cpu"
# Six queries end the search at 5; memory must be given on a CPU, and is not what ends it here.
BUDGET = ("--memory-budget-gib", "64")


def outcome(out: Path) -> dict[str, Any]:
    return results.read_json(out / MAX_ID / results.OUTCOME_FILE)


def trials(out: Path) -> list[tuple[int, str]]:
    return [(trial["batch_size"], trial["status"]) for trial in outcome(out)["max_batch"]["trials"]]


def test_a_search_that_fails_and_is_killed_goes_on_and_ends_as_a_measured_row(tmp_path: Path) -> None:
    out = tmp_path / "throughput"
    failing = measure(out, MAX, *BUDGET, fault="start:error::2")
    assert failing.code == 1
    assert "failed: trying batch 2: RuntimeError: injected error" in failing.err
    assert statuses(out) == {MAX_ID: "failed"}
    assert trials(out) == [(1, "ok")]

    with Launcher(out, MAX, *BUDGET, fault="start:oom::4+;start:hang::3") as launcher:
        launcher.wait_until_hanging("start", MAX_ID)
        launcher.kill()
        launcher.assert_no_process_left()
    assert statuses(out) == {MAX_ID: "failed"}  # what was there before

    done = measure(out, MAX, *BUDGET, fault="start:oom::4+")
    assert done.code == 0, done.err
    assert "3 sizes were tried before: the search goes on" in done.err
    assert "batch 3 fits" in done.err
    assert "batch 1 fits" not in done.err
    (row,) = table(out)
    assert (row["status"], row["per_device_batch_size"], row["num_timed_steps"]) == ("ok", 3, 1)
    assert (row["max_batch_size"], row["first_oom_batch_size"], row["max_batch_longest_tokens"]) == (3, 4, 512)
    assert row["max_batch_trials"] == "1 ok, 2 ok, 4 oom, 3 ok"
    assert row["paper_max_batch_size"] == 8  # Table III
    text = run(REPO / "throughput.py", out).out
    assert "the largest batch is 3, padded to the longest query of 512 tokens; 4 ran out of memory" in text
    beside = {results.SUPERSEDED_FOLDER, ".lock"}
    assert {entry.name for entry in out.iterdir()} - beside == {MAX_ID}

    again = measure(out, MAX, *BUDGET)
    assert "1 of 1 points are measured already" in again.err
    planned = measure(out, f"{MAX} cs:sparse:bs=3", *BUDGET, "--dry-run").out
    assert [line.rpartition(")")[2].strip() for line in planned.splitlines()[1:]] == ["done, skipped", "to run"]


def test_where_not_one_query_fits_the_row_says_so(tmp_path: Path) -> None:
    out = tmp_path / "throughput"
    done = measure(out, MAX, *BUDGET, fault="start:oom")
    assert done.code == 0, done.err
    assert statuses(out) == {MAX_ID: "oom"}
    assert "not even one query of 512 tokens fits" in run(REPO / "throughput.py", out).out
    assert not (out / STATE_FOLDER).exists()
    assert "1 of 1 points are measured already" in measure(out, MAX, *BUDGET).err


def test_without_a_gpu_a_search_needs_a_budget(tmp_path: Path) -> None:
    done = measure(tmp_path / "throughput", MAX)
    assert_one_clear_paragraph(done, "bs=max needs a GPU", "--memory-budget-gib")


def test_breakdowns_find_no_largest_batch(tmp_path: Path) -> None:
    done = run(REPO / "mixtral_lt.sh", *TINY, "--out", tmp_path / "latency", "--points", MAX)
    assert_one_clear_paragraph(done, "only a throughput launcher finds the largest batch")


@pytest.fixture
def batches_of_a_trial(one_thread: None, tmp_path: Path) -> Callable[..., list[tuple[tuple[int, int], int]]]:
    """Trains three steps of a tiny model: shape and real tokens of every batch that reached it."""
    from transformers import TrainerCallback

    from tunescope.train.engine import run_workload

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.batches: list[tuple[tuple[int, int], int]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                mask = kwargs["attention_mask"]
                self.batches.append((tuple(mask.shape), int(mask.sum())))

            model.register_forward_pre_hook(look, with_kwargs=True)

    def train(point: Point, longest_tokens: int | None, **changes: Any) -> list[tuple[tuple[int, int], int]]:
        watch = Watch()
        workload = replace(tiny_workload(point), max_steps=3, num_samples=12, **changes)
        run_workload(workload, tmp_path, [watch, longest_batch_callback(longest_tokens)])
        return watch.batches

    return train


def test_a_trial_meets_the_largest_batch_that_a_shuffle_can_make(batches_of_a_trial: Callable[..., Any]) -> None:
    point = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=3, preset="tiny", num_layers=2,
                  total_layers=2)  # fmt: skip
    batches = batches_of_a_trial(point, 512)
    assert len(batches) == 6  # three steps, and the longest batch after each
    steps, longest = batches[::2], batches[1::2]
    assert {shape for shape, _ in longest} == {(3, 512)}
    assert all(tokens < 3 * 512 for _, tokens in longest)  # padded: attention needs its mask, as in training
    assert max(shape[1] for shape, _ in steps) < 512


def test_a_trial_on_a_file_meets_the_files_longest_queries(
    batches_of_a_trial: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"instruction": "w1 " * number, "output": "w2"} for number in (300, *range(1, 11), 200)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    entry = {"file_name": str(tmp_path / "mine.json"), "columns": {"prompt": "instruction", "response": "output"}}
    point = Point(model="mixtral", dataset="mine", top_k=2, per_device_batch_size=2, preset="tiny", num_layers=2,
                  total_layers=2)  # fmt: skip
    batches = batches_of_a_trial(point, None, data_entry=entry, recipe=recipe() | {"cutoff_len": 256})
    assert {shape for shape, _ in batches[1::2]} == {(2, 256)}
