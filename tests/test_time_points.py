"""Measured steps: the paper's, each once; the packaged ones, against their folders; and a folder of the user's."""

from pathlib import Path

import pytest
from helpers_points import MS, cpu_environment, gpu_environment, step_rows, write_point

from tunescope import paper
from tunescope.config import Point
from tunescope.cost import time_packaged
from tunescope.cost.lengths import paper_lengths
from tunescope.cost.padding import batch_lengths
from tunescope.cost.time_packaged import own_points, to_csv
from tunescope.cost.time_points import (
    RECIPES,
    TOKENS_OVER_HISTOGRAM,
    paper_phase_points,
    paper_points,
    read_points,
    read_points_and_skipped,
    study_lengths,
)
from tunescope.cost.time_work import step_work
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.train.recipe import load_recipe, recipe_folder

RESULTS = Path(__file__).parents[1] / "docs" / "results"
POINT = Point(model="mixtral", dataset="cs", top_k=2, per_device_batch_size=4)


# --- the paper's -----------------------------------------------------------------------------------------------------


def test_every_measurement_of_the_paper_is_there_once() -> None:
    points = paper_points()
    assert len(points) == 96  # 114 rows, 18 of them bars that a sweep has, too
    keys = {(point.model, point.device.name, point.dataset, point.top_k, point.batch_size) for point in points}
    assert len(keys) == 96
    values = {float(row["throughput_queries_per_s"]) for row in paper.rows("throughput")}
    found = {round(point.batch_size / point.step_s, 9) for point in points}
    assert found == {round(value, 9) for value in values}


def test_relabelled_bars_stand_at_the_batch_of_the_sweep() -> None:
    of_batch = {
        (point.dataset, point.top_k, point.batch_size): point for point in paper_points() if point.model == "blackmamba"
    }
    # 11.6119473 queries/s wears batch 8 in Figure 8 and 10 in Figure 14.
    assert of_batch["math", 2, 10].step_s == pytest.approx(10 / 11.6119473)
    assert of_batch["math", 2, 8].step_s == pytest.approx(8 / 11.09739966)


def test_figure_4_adds_phases_up() -> None:
    points = {(point.model, point.top_k, point.batch_size): point for point in paper_phase_points()}
    assert len(points) == 10
    longest = points["mixtral", 2, 32]
    assert longest.step_s == pytest.approx(2.34 + 4.51 + 0.05)
    assert (longest.slots, longest.key_slots) == (4096, 4096 * 64)


@pytest.mark.parametrize(("model", "dataset"), TOKENS_OVER_HISTOGRAM)
def test_lengths_are_those_that_figure_11_counted(model: str, dataset: str) -> None:
    """Tokens a query over all experts, in batches of four; the figure calls CS `he` and MATH `gs`."""
    label = {"cs": "he", "math": "gs"}[dataset]
    counted = {
        tuning: sum(
            float(row["tokens_per_query"]) / int(row["top_k"])
            for row in paper.rows("expert_tokens")
            if (row["model"], row["dataset"], row["tuning"]) == (model, label, tuning)
        )
        for tuning in ("pretrained",)
    }["pretrained"]
    assert batch_lengths(study_lengths(model, dataset), 4).mean_tokens == pytest.approx(counted, rel=0.004)


def test_of_another_model_the_histogram_is_taken_as_it_is() -> None:
    assert study_lengths("qwen3_moe", "cs").total_tokens == paper_lengths("cs").total_tokens
    with pytest.raises(UserError, match="he"):
        study_lengths("mixtral", "he")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_launchers(name: str) -> None:
    family = find_family(name)
    recipe = load_recipe(recipe_folder() / family.recipe)
    assert step_work(family.full, RECIPES[name], batch_size=2, slots=500) == step_work(
        family.full, recipe, batch_size=2, slots=500
    )


# --- packaged --------------------------------------------------------------------------------------------------------


def test_packaged_points_are_those_of_the_results() -> None:
    """If this fails because results came or went: python -m tunescope.cost.time_packaged docs/results, and paste what
    `tunescope table validation` prints into docs/time_model.md."""
    packaged = (Path(time_packaged.__file__).parent / time_packaged.FILE).read_text(encoding="utf-8")
    assert packaged == to_csv(read_points(RESULTS))


def test_packaging_keeps_what_is_fitted() -> None:
    for written, read in zip(
        sorted(read_points(RESULTS), key=lambda point: (point.model, point.source)),
        sorted(own_points(), key=lambda point: (point.model, point.source)),
        strict=True,
    ):
        assert read.step_s == pytest.approx(written.step_s, rel=1e-5)
        assert read.group == written.group
        assert read.work().seconds_at_peak(read.device) == pytest.approx(
            written.work().seconds_at_peak(written.device), rel=1e-4
        )


def test_a_model_of_one_s_own_is_not_packaged(tmp_path: Path) -> None:
    family = find_family("mixtral")
    config = family.config_at(family.full | {"hidden_size": 2048}, 32, 2)
    write_point(tmp_path / "a", POINT, [MS * 1000] * 6, point_changes={"model_config": config})
    points = read_points(tmp_path)
    assert points[0].config["hidden_size"] == 2048
    with pytest.raises(UserError, match="cannot be packaged"):
        to_csv(points)


# --- the user's ------------------------------------------------------------------------------------------------------


def test_a_point_is_read_as_the_mean_of_its_timed_steps(tmp_path: Path) -> None:
    write_point(tmp_path / "deep" / "a", POINT, [MS * ms for ms in (9000, 9000, 9000, 3000, 3400, 3200)])
    (point,) = read_points(tmp_path)
    assert point.step_s == pytest.approx(3.2)
    assert point.error_frac == pytest.approx(0.2 / 3**0.5 / 3.2)
    assert point.num_steps == 3
    assert (point.slots, point.key_slots) == (4 * 104, 4 * 104 * 104 / 2)
    assert point.device.name == "NVIDIA A40"
    assert point.host == "NVIDIA A40 with a CPU"
    assert point.code == "mixtral QLoRA, stock"


def test_grouped_points_are_apart_from_stock_ones_and_graphs_from_none(tmp_path: Path) -> None:
    changes: dict[str, dict] = {
        "a": {},
        "b": {"moe": "grouped"},
        "c": {"moe": "grouped", "graphs": True},
        "d": {"moe": "grouped", "graphs": True, "checkpointed_layers": [0, 1, 2]},
    }
    for name, each in changes.items():
        write_point(tmp_path / name, POINT, [MS * 1000] * 6, point_changes=each)
    stock, grouped, replayed, partly = read_points(tmp_path)
    assert [point.code.removeprefix("mixtral QLoRA, ") for point in (stock, grouped, replayed, partly)] == [
        "stock", "grouped", "grouped, graphs", "grouped, graphs",
    ]  # fmt: skip
    assert len({point.measurement for point in (stock, grouped, replayed, partly)}) == 4
    assert (replayed.num_recomputed, partly.num_recomputed) == (None, 3)
    assert grouped.work().graph_kernels == 0 < partly.work().graph_kernels < replayed.work().graph_kernels
    assert partly.work().matmul_flop < replayed.work().matmul_flop


def test_a_point_whose_graphs_failed_is_passed_over(tmp_path: Path) -> None:
    write_point(tmp_path / "a", POINT, [MS * 1000] * 6)
    graphed = {"moe": "grouped", "graphs": True}
    outcome = {"cuda_graphs": {"num_shapes": 0, "num_replays": 0, "why_not": "it has dropout"}}
    write_point(tmp_path / "b", POINT, [MS * 1000] * 6, point_changes=graphed, outcome_changes=outcome)
    points, skipped = read_points_and_skipped(tmp_path)
    assert [point.moe_path for point in points] == ["stock"]
    assert "it has dropout" in skipped[0]


def test_experts_that_got_no_token_are_seen_by_the_memory_they_lack() -> None:
    """Qwen3's random routers send 128 tokens to a quarter of 128 experts; Mixtral's reach all of 8, as 1 says."""
    (qwen3,) = read_points(RESULTS / "h200" / "qwen3_moe")
    assert qwen3.hit_experts == pytest.approx(34, abs=1)
    assert {point.hit_experts for point in read_points(RESULTS / "h200" / "throughput")} == {None}


def test_slots_are_a_micro_batch_s(tmp_path: Path) -> None:
    rows = [row | {"micro_steps": 4} for row in step_rows([MS * 1000] * 6, num_queries=16)]
    write_point(tmp_path / "a", POINT, rows=rows)
    (point,) = read_points(tmp_path)
    assert point.slots == 16 * 104 / 4


def test_a_slice_is_a_model_of_fewer_layers(tmp_path: Path) -> None:
    slice_point = Point(
        model="mixtral", dataset="cs", top_k=8, per_device_batch_size=1, preset="slice", num_layers=5, total_layers=32
    )
    write_point(tmp_path / "a", slice_point, [MS * 1000] * 6)
    (point,) = read_points(tmp_path)
    assert (point.config["num_hidden_layers"], point.top_k) == (5, 8)


def test_unusable_points_are_passed_over(tmp_path: Path) -> None:
    write_point(tmp_path / "a", POINT, [MS * 1000] * 6)
    write_point(tmp_path / "b", POINT, status="oom", cause="memory")
    write_point(tmp_path / "c", POINT, [MS * 1000] * 6, environment=cpu_environment())
    assert len(read_points(tmp_path)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"status": "oom", "cause": "memory"}, "status is oom"),
        ({"durations_ns": [MS] * 6, "environment": cpu_environment()}, "without a GPU"),
        ({"durations_ns": [MS] * 6, "environment": gpu_environment("A GPU of tomorrow")}, "A GPU of tomorrow"),
        ({"durations_ns": [MS] * 4}, "1 timed steps"),
        ({"durations_ns": [0] * 6}, "no duration"),
        ({"durations_ns": [MS] * 6, "point_changes": {"kind": "ncu"}}, "kind ncu"),
        ({"durations_ns": [MS] * 6, "point_changes": {"attached": {}}}, "own Trainer"),
        ({"durations_ns": [MS] * 6, "point_changes": {"model_config": {"model_type": "gpt2"}}}, "gpt2"),
        ({"durations_ns": [MS] * 6, "point_changes": {"recipe": {"optim": "lion_8bit"}}}, "lion_8bit"),
        ({"durations_ns": [MS] * 6, "point_changes": {"point": {}}}, "not a point of this program"),
    ],
)
def test_why_no_point_is_usable_is_said(tmp_path: Path, arguments: dict, words: str) -> None:
    write_point(tmp_path / "a", POINT, **arguments)
    with pytest.raises(UserError) as caught:
        read_points(tmp_path)
    assert words in str(caught.value)


def test_an_empty_and_a_missing_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no point that step times"):
        read_points(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read_points(tmp_path / "nowhere")
