"""`bs=max` from flags to a plan: what is asked, under which identity, and where it is refused."""

import json
from pathlib import Path

import pytest
from test_plan import data_file, gpu, machine, only_spec, recipe_hash  # noqa: F401  machine is a fixture of every test

from tunescope.config import LATENCY, Point, parse_points
from tunescope.errors import UserError
from tunescope.hardware import GIB
from tunescope.measure.plan import Options, make_plan

MAX = "cs:sparse:bs=max"


def test_points_of_a_given_batch_keep_the_identity_that_they_had() -> None:
    """A key more in point.json would have everybody measure everything again."""
    point = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=4)
    assert "find_max" not in point.to_json()
    spec = only_spec()
    assert "find_max" not in json.dumps(spec.point_json())
    assert "search" not in json.dumps(spec.point_json())
    assert Point(**point.to_json()) == point
    (found,) = parse_points(MAX, "mixtral")
    assert found.find_max
    assert Point(**found.to_json()) == found
    assert (found.label, found.point_id("cpu")) == ("cs sparse batch max", "cs-k2-bmax-full-cpu")


def test_on_a_gpu_a_search_knows_its_data_and_keeps_its_identity_at_every_size(machine) -> None:  # noqa: F811
    machine(gpu())
    spec = only_spec(points=MAX)
    assert spec.search is not None
    assert (spec.search.longest_tokens, spec.search.largest_batch_size) == (512, 65_536)
    assert spec.memory_budget_bytes is None
    trial, measured = spec.at_batch_size(40, is_trial=True), spec.at_batch_size(40)
    assert (trial.is_trial, trial.workload.max_steps, trial.workload.num_samples) == (True, 3, 160)
    assert trial.protocol.longest_batch_first is False
    assert (measured.protocol, measured.workload.max_steps) == (spec.protocol, spec.workload.max_steps)
    assert measured.workload.num_samples == 1000
    assert measured.search_hash() == spec.search_hash()
    assert recipe_hash(measured) != recipe_hash(spec)
    assert only_spec(points=MAX, reentrant=True).search_hash() != spec.search_hash()
    assert only_spec(points=MAX, memory_budget_gib=40).search_hash() != spec.search_hash()


def test_a_trial_reads_the_whole_file_and_a_measurement_its_part(machine, tmp_path: Path) -> None:  # noqa: F811
    machine(gpu())
    file = data_file(tmp_path, "mine.json", rows=3000)
    spec = only_spec(points="mine:sparse:bs=max", datasets=(str(file),))
    assert spec.search is not None
    assert (spec.search.longest_tokens, spec.search.largest_batch_size) == (None, 1500)
    assert spec.at_batch_size(8, is_trial=True).workload.num_samples == 3000
    assert spec.at_batch_size(8).workload.num_samples == 1000


def test_one_length_is_the_longest(machine) -> None:  # noqa: F811
    machine(gpu())
    search = only_spec(points=f"{MAX}:seq=2048").search
    assert search is not None
    assert search.longest_tokens == 2048


def test_where_a_search_means_nothing_it_is_refused(machine) -> None:  # noqa: F811
    with pytest.raises(UserError, match="bs=max needs a GPU"):
        make_plan(Options(points=MAX))
    budget = only_spec(points=MAX, memory_budget_gib=3.0).memory_budget_bytes
    assert budget == 3 * GIB  # honoured on a CPU for a search,
    assert only_spec(points="cs:sparse:bs=2", memory_budget_gib=3.0).memory_budget_bytes is None  # and for nothing else
    with pytest.raises(UserError, match="only a throughput launcher"):
        make_plan(Options(points=MAX, kind=LATENCY))
    machine(gpu("NVIDIA L4", 22.0))
    with pytest.raises(UserError, match="preset slice"):
        make_plan(Options(points=MAX))
