"""Forecasts of step times: what they add up to, what they rest on, what widens and what narrows them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope.cost.time_calibration import calibrate, calibrate_from
from tunescope.cost.time_model import (
    MIN_POINTS_OF_A_CODE,
    OVERLAP_NAME,
    TERM_NAMES,
    StepTime,
    TimeModel,
    calibrated,
    default_model,
    run_time,
)
from tunescope.cost.time_packaged import own_points
from tunescope.cost.time_points import RECIPES, TimedPoint, paper_points
from tunescope.errors import UserError
from tunescope.families.blackmamba import BLACKMAMBA_2_8B
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.families.qwen3_moe import QWEN3_30B_A3B
from tunescope.hardware import DEVICES, find_device

A40, L4 = find_device("A40"), find_device("L4")
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all", "bf16": True, "optim": "adamw_torch"}
MODELS = [
    (MIXTRAL_8X7B, RECIPES["mixtral"]), (BLACKMAMBA_2_8B, RECIPES["blackmamba"]),
    (QWEN3_30B_A3B, RECIPES["qwen3_moe"]), (LLAMA, LORA),
]  # fmt: skip


def mixtral_step(device: Any = A40, **changes: Any) -> StepTime:
    arguments: dict[str, Any] = {"batch_size": 4, "slots": 1300.0} | changes
    return default_model().step_time(MIXTRAL_8X7B, RECIPES["mixtral"], device, **arguments)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize(("config", "recipe"), MODELS, ids=lambda value: str(value.get("model_type", "")))
def test_terms_add_up_to_the_median_inside_its_interval(config: dict, recipe: dict, device: Any) -> None:
    step = default_model().step_time(config, recipe, device, batch_size=2, slots=500)
    assert 0 < step.low_s < step.median_s < step.high_s
    assert sum(seconds for _, seconds in step.terms) == pytest.approx(step.median_s)
    assert all((seconds < 0) == (name == OVERLAP_NAME) for name, seconds in step.terms)
    assert ("selective scan" in dict(step.terms)) == (config["model_type"] == "blackmamba")
    assert step.low_s * step.high_s == pytest.approx(step.median_s**2)
    assert step.high_s == pytest.approx(step.median_s * (1 + step.half_width_frac))


@given(slots=st.floats(50, 2e4), factor=st.floats(1.05, 4))
def test_more_slots_take_longer(slots: float, factor: float) -> None:
    assert mixtral_step(slots=slots * factor).median_s > mixtral_step(slots=slots).median_s


def test_dense_takes_longer_than_sparse_by_one_model() -> None:
    dense = default_model().step_time(
        MIXTRAL_8X7B | {"num_experts_per_tok": 8}, RECIPES["mixtral"], A40, batch_size=4, slots=1300
    )
    assert dense.median_s > mixtral_step().median_s


def test_what_was_measured_is_not_extrapolated_and_says_so() -> None:
    step = mixtral_step()
    assert not step.is_extrapolated
    assert "15 measured points of mixtral QLoRA, stock" in step.basis


@pytest.mark.parametrize(
    ("config", "recipe", "device", "path", "words"),
    [
        (MIXTRAL_8X7B, RECIPES["mixtral"], L4, "stock", "nothing measured on NVIDIA L4"),
        (MIXTRAL_8X7B, RECIPES["mixtral"], A40, "grouped", "nothing measured of mixtral QLoRA, grouped"),
        (LLAMA, LORA, A40, "stock", "nothing measured of llama LoRA"),
        (MIXTRAL_8X7B, RECIPES["mixtral"] | {"lora_rank": 8, "quantization_bit": None}, A40, "stock", "mixtral LoRA"),
    ],
)
def test_what_was_never_measured_is_marked_and_wider(
    config: dict, recipe: dict, device: Any, path: str, words: str
) -> None:
    step = default_model().step_time(config, recipe, device, batch_size=4, slots=1300, moe_path=path)
    assert step.is_extrapolated
    assert words in step.basis
    assert step.half_width_frac > 2 * mixtral_step().half_width_frac


def test_a_code_with_few_points_is_still_extrapolated_and_replayed_ones_on_other_gpus() -> None:
    """From MIN_POINTS_OF_A_CODE on it is not, on the GPU where they were measured."""
    (one, *_) = [point for point in own_points() if point.model == "mixtral" and point.top_k == 2]
    replayed = replace(one, moe_path="grouped", graphs=True, host="a host")
    points = [
        replace(replayed, batch_size=size, slots=100.0 * size, step_s=0.1 + 0.02 * size)
        for size in range(1, MIN_POINTS_OF_A_CODE + 1)
    ]
    others = [point for point in own_points() if not point.graphs]
    asked: dict[str, Any] = {"batch_size": 2, "slots": 200.0, "moe_path": "grouped", "graphs": True}
    few, enough = (
        TimeModel((*paper_points(), *others, *points[:number])) for number in (MIN_POINTS_OF_A_CODE - 1, len(points))
    )
    h200 = find_device("H200")
    assert few.step_time(one.config, one.recipe, h200, **asked).is_extrapolated
    assert not enough.step_time(one.config, one.recipe, h200, **asked).is_extrapolated
    assert enough.step_time(one.config, one.recipe, find_device("H100", 80), **asked).is_extrapolated


def test_another_host_is_wider_and_not_extrapolated() -> None:
    other = mixtral_step(is_other_host=True)
    assert other.half_width_frac > 2 * mixtral_step().half_width_frac
    assert not other.is_extrapolated
    assert "the spread of" in other.basis


def test_the_table_iv_run_comes_out() -> None:
    """Mixtral, MATH, sparse, batch 4 on the A40: 1.005 queries/s."""
    (point,) = (
        point
        for point in paper_points()
        if (point.model, point.device, point.dataset, point.top_k, point.batch_size) == ("mixtral", A40, "math", 2, 4)
    )
    assert 4 / default_model().at_point(point).median_s == pytest.approx(1.005, rel=0.03)


def test_hours_of_a_run_keep_the_relative_interval_of_a_step() -> None:
    step = mixtral_step()
    one, many = run_time(step, 1), run_time(step, 10_000)
    assert many.median_h == pytest.approx(10_000 * step.median_s / 3600)
    assert many.high_h / many.low_h == pytest.approx(one.high_h / one.low_h) == pytest.approx(step.high_s / step.low_s)
    assert run_time(step, 0).median_h == 0
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="no duration"):
            run_time(step, wrong)


def test_errors_are_the_user_s() -> None:
    with pytest.raises(UserError, match="gpt2"):
        default_model().step_time({"model_type": "gpt2"}, LORA, A40, batch_size=1, slots=100)
    with pytest.raises(UserError, match="no measured step"):
        TimeModel(())
    with pytest.raises(UserError, match="no point to calibrate with"):
        calibrate(())


def test_the_gpu_s_part_is_what_traces_of_the_h200_show() -> None:
    """Steps were fitted, busy time was not. Rows of the table end in step s, profiled step s, ratio, busy s, ..."""
    table = (Path(__file__).parents[1] / "docs/results/h200/latency/latency.txt").read_text(encoding="utf-8")
    rows = table[table.index("us of step a launch") :].splitlines()[2:7]
    for row in rows:
        _, sparsity, batch, _, _, _, busy_s, *_ = re.split(r"\s{2,}", row)
        config = MIXTRAL_8X7B | {"num_experts_per_tok": 8 if sparsity == "dense" else 2}
        step = default_model().step_time(
            config, RECIPES["mixtral"], find_device("H200"), batch_size=int(batch), slots=128.0 * int(batch)
        )
        on_gpu_s = sum(seconds for name, seconds in step.terms if name not in (TERM_NAMES[0], OVERLAP_NAME))
        assert on_gpu_s == pytest.approx(float(busy_s), rel=0.3)


# --- calibration -----------------------------------------------------------------------------------------------------


def on_other_machine(factor: float, num_points: int) -> list[TimedPoint]:
    """The study's points of Mixtral, as an L4 would have run them that is slower than forecast by a factor."""
    model = default_model()
    points = [point for point in paper_points() if point.device == A40 and point.model == "mixtral"][:num_points]
    moved = [replace(point, device=L4, host="my L4", stack="mine", error_frac=0.01) for point in points]
    return [replace(point, step_s=factor * model.at_point(point).median_s) for point in moved]


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_own_points_move_and_narrow_forecasts_of_their_gpu(factor: float) -> None:
    points = on_other_machine(factor, 8)
    found = calibrate(points[:6])
    assert found.half_width_frac < found.half_width_before_frac / 2
    assert (found.shift_frac > 0) == (factor > 1)
    assert found.num_points == 6
    assert found.devices == ("NVIDIA L4",)
    for unseen in points[6:]:
        before, after = default_model().at_point(unseen), found.model.at_point(unseen)
        assert abs(after.median_s / unseen.step_s - 1) < 0.08 < abs(before.median_s / unseen.step_s - 1)
    for text in (f"{100 * found.error_before_frac:.0f} %", "6 points of NVIDIA L4"):
        assert text in str(found)


def test_one_s_own_host_answers_for_the_gpu() -> None:
    points = [replace(point, host="my A40") for point in paper_points() if point.device == A40 and point.top_k == 2]
    slower = [replace(point, step_s=1.4 * point.step_s) for point in points[:3]]
    model = calibrated(slower)
    step = model.step_time(MIXTRAL_8X7B, RECIPES["mixtral"], A40, batch_size=4, slots=1300)
    assert "my A40" in step.basis
    assert step.median_s > mixtral_step().median_s
    assert model.own == tuple(slower)


def test_an_l4_is_no_longer_extrapolated_once_measured() -> None:
    model = calibrated(on_other_machine(1.0, 3))
    step = model.step_time(MIXTRAL_8X7B, RECIPES["mixtral"], L4, batch_size=4, slots=1300)
    assert not step.is_extrapolated
    assert "3 measured points of mixtral QLoRA, stock on my L4" in step.basis


def test_points_that_the_base_has_already_count_once() -> None:
    """As read from their folders, where a package keeps six digits."""
    own = own_points()
    again = [replace(point, step_s=point.step_s * (1 + 1e-9), slots=point.slots * (1 + 1e-9)) for point in own]
    found = calibrate(again, default_model())
    assert found.num_known == len(own)
    assert len(found.model.points) + len(found.model.own) == len(default_model().points)
    ignorant = calibrate(again, TimeModel(paper_points()))
    assert ignorant.num_known == 0
    assert found.error_before_frac == pytest.approx(ignorant.error_before_frac)
    assert f"{len(own)} of them came with the package" in str(found)


def test_steps_far_larger_than_any_measured_say_so() -> None:
    largest = max(p.slots for p in paper_points() if p.device == A40 and p.code == "mixtral QLoRA, stock")
    step = mixtral_step(slots=5 * largest, batch_size=30)
    assert step.slots_over_measured == pytest.approx(5)
    assert mixtral_step(L4).slots_over_measured is None


def test_point_folders_calibrate() -> None:
    folder = Path(__file__).parents[1] / "docs" / "results" / "h200" / "throughput"
    found = calibrate_from(folder, TimeModel(paper_points()))
    assert found.devices == ("NVIDIA H200",)
    assert found.half_width_frac < found.half_width_before_frac


# --- start-up --------------------------------------------------------------------------------------------------------


def test_an_answer_needs_no_heavy_import() -> None:
    code = """
import json, sys, time
start = time.perf_counter()
from tunescope.cost.time_model import default_model
imported = time.perf_counter()
default_model()
heavy = [name for name in ("torch", "pandas", "scipy", "matplotlib") if name in sys.modules]
print(json.dumps([heavy, imported - start, time.perf_counter() - imported]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, _, fit_s = json.loads(done.stdout)
    assert heavy == []
    assert fit_s < 2  # 0.05 s on an idle core
