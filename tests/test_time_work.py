"""Counts of a step's work: against traces, against the FLOP that MFU uses, and laws that hold for any size."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tunescope
from tunescope import flops
from tunescope.cost.time_counts import StepWork
from tunescope.cost.time_fit import TERMS
from tunescope.cost.time_points import RECIPES
from tunescope.cost.time_work import code_of, num_hit_experts, step_work
from tunescope.cost.time_work_grouped import MAX_ROWS_DECODED_INSIDE, TILE_ROWS, expected_tiles
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.families.blackmamba import BLACKMAMBA_2_8B
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.families.qwen3_moe import QWEN3_30B_A3B
from tunescope.hardware import find_device

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "h200"
SOURCE = Path(tunescope.__file__).parent
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all", "bf16": True, "optim": "adamw_torch"}
FULL = {"finetuning_type": "full", "bf16": True, "optim": "adamw_torch"}
CONFIGS = {"mixtral": MIXTRAL_8X7B, "qwen3_moe": QWEN3_30B_A3B, "blackmamba": BLACKMAMBA_2_8B}
# Any model with a recipe that fits it.
SETUPS = [(CONFIGS[name], RECIPES[name]) for name in CONFIGS] + [(LLAMA, LORA), (LLAMA, FULL)]


def traced_launches(table: Path) -> dict[tuple[str, int], int]:
    """(sparsity, batch) of the points of 128 random tokens -> launches of a step, out of a printed breakdown."""
    text = table.read_text(encoding="utf-8")
    rows = text[text.index("us of step a launch") :].splitlines()
    found = {}
    for row in rows:
        cells = re.split(r"\s{2,}", row.strip())
        if cells[0] == "random len 128":
            found[cells[1], int(cells[2])] = int(cells[9])
        elif found:
            break
    return found


@pytest.mark.parametrize(
    ("table", "name", "path", "tolerance_frac"),
    [
        ("latency/latency.txt", "mixtral", "stock", 0.06),
        ("blackmamba/latency.txt", "blackmamba", "grouped", 0.10),
    ],
)
def test_launches_are_those_of_the_traces(table: str, name: str, path: str, tolerance_frac: float) -> None:
    traced = traced_launches(RESULTS / table)
    assert len(traced) == 5
    for (sparsity, batch_size), launches in traced.items():
        config = CONFIGS[name] | {"num_experts_per_tok": 8 if sparsity == "dense" else 2}
        work = step_work(config, RECIPES[name], batch_size=batch_size, slots=128.0 * batch_size, moe_path=path)
        assert work.launches == pytest.approx(launches, rel=tolerance_frac)


@pytest.mark.parametrize("name", CONFIGS)
def test_flop_are_those_that_hfu_divides(name: str) -> None:
    family = find_family(name)
    recipe = RECIPES[name]
    forward = family.forward_flop(family.full, recipe)
    is_recomputed = not recipe.get("disable_gradient_checkpointing", False)
    work = step_work(family.full, recipe, batch_size=3, slots=600, key_slots=60_000)
    assert work.matmul_flop == pytest.approx(
        flops.train_flop(forward, 600, 60_000, recompute_frac=float(is_recomputed))
    )


def test_weight_bytes_of_mixtral_are_three_passes_over_packed_and_decoded_weights() -> None:
    work = step_work(MIXTRAL_8X7B, RECIPES["mixtral"], batch_size=1, slots=500)
    experts_and_attention = 32 * (8 * 3 * 4096 * 14336 + 2 * 4096 * (4096 + 1024))
    # 0.516 byte packed, 2 written and 2 read; router and head are the rest.
    assert work.weight_bytes == pytest.approx(3 * 4.516 * experts_and_attention, rel=0.005)


@pytest.mark.parametrize(("config", "recipe"), SETUPS)
@given(slots=st.floats(64, 1e5), factor=st.floats(1.01, 10), batch_size=st.integers(1, 64))
def test_more_slots_are_never_less_work(
    config: dict[str, Any], recipe: dict[str, Any], slots: float, factor: float, batch_size: int
) -> None:
    small = step_work(config, recipe, batch_size=batch_size, slots=slots, key_slots=slots)
    large = step_work(config, recipe, batch_size=batch_size, slots=slots * factor, key_slots=slots * factor)
    assert large.launches >= small.launches
    assert large.weight_bytes >= small.weight_bytes
    assert large.optimizer_bytes == small.optimizer_bytes
    assert large.matmul_flop == pytest.approx(factor * small.matmul_flop)
    assert large.activation_bytes == pytest.approx(factor * small.activation_bytes)
    assert large.scan_bytes == pytest.approx(factor * small.scan_bytes)


@pytest.mark.parametrize(("config", "recipe"), [setup for setup in SETUPS if setup[0] is not BLACKMAMBA_2_8B])
def test_work_is_affine_in_depth(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    device = find_device("A40")
    four, eight, twelve = (
        step_work(config | {"num_hidden_layers": depth}, recipe, batch_size=2, slots=400).seconds_at_peak(device)
        for depth in (4, 8, 12)
    )
    assert [b - a for a, b in zip(four, eight, strict=True)] == pytest.approx(
        [b - a for a, b in zip(eight, twelve, strict=True)]
    )


@pytest.mark.parametrize(("config", "recipe"), SETUPS)
def test_accumulation_repeats_all_but_the_update(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    one = step_work(config, recipe, batch_size=2, slots=400)
    four = step_work(config, {**recipe, "gradient_accumulation_steps": 4}, batch_size=2, slots=400)
    assert four.matmul_flop == pytest.approx(4 * one.matmul_flop)
    assert four.weight_bytes == pytest.approx(4 * one.weight_bytes)
    assert four.optimizer_bytes == one.optimizer_bytes
    assert 3 * one.launches < four.launches < 4 * one.launches


def test_checkpointing_costs_a_forward() -> None:
    recipe = RECIPES["mixtral"]
    without = {**recipe, "disable_gradient_checkpointing": True}
    kept, recomputed = (step_work(MIXTRAL_8X7B, each, batch_size=1, slots=128) for each in (without, recipe))
    layers = (3 * recomputed.weight_bytes, 3 * kept.weight_bytes)
    assert layers[1] == pytest.approx(layers[0] * 2 / 3, rel=0.01)
    assert kept.launches < recomputed.launches
    assert kept.matmul_flop < recomputed.matmul_flop


def test_a_fused_optimizer_moves_less_and_launches_less() -> None:
    plain, fused = (
        step_work(LLAMA, {**FULL, "optim": name}, batch_size=1, slots=128)
        for name in ("adamw_torch", "adamw_torch_fused")
    )
    assert fused.optimizer_bytes < plain.optimizer_bytes
    assert fused.launches < plain.launches


def test_fp32_products_are_timed_by_the_fp32_peak() -> None:
    device = find_device("A40")
    matmul = TERMS.index("matmul")
    bf16, fp32 = (
        step_work(LLAMA, {**FULL, "bf16": is_bf16}, batch_size=1, slots=128).seconds_at_peak(device)[matmul]
        for is_bf16 in (True, False)
    )
    assert fp32 / bf16 == pytest.approx(device.peak_bf16_flop_per_s / device.peak_fp32_flop_per_s)


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_experts_launch_less_and_compute_the_same(name: str) -> None:
    """Without the recompute of a product that nothing needs: of down, and half of its adapter's."""
    config = CONFIGS[name]
    stock, grouped = (
        step_work(config, RECIPES[name], batch_size=1, slots=128, moe_path=path) for path in ("stock", "grouped")
    )
    assert grouped.launches < stock.launches
    spared = 0.0
    if name != "blackmamba":
        width, inner = config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
        runs = 128 * config["num_hidden_layers"] * config["num_experts_per_tok"]
        spared = 2 * runs * (width * inner + 16 * (width + inner) / 2)
    assert grouped.matmul_flop == pytest.approx(stock.matmul_flop - spared, rel=1e-9)


DECODERS = ["mixtral", "qwen3_moe"]


def grouped_work(name: str, **changes: Any) -> StepWork:
    arguments: dict[str, Any] = {"batch_size": 1, "slots": 128.0, "moe_path": "grouped"} | changes
    return step_work(CONFIGS[name], RECIPES[name], **arguments)


@pytest.mark.parametrize("name", DECODERS)
def test_graphs_move_kernels_from_the_host_to_the_gpu(name: str) -> None:
    recipe = RECIPES[name] | {"optim": "adamw_torch_fused"}
    eager, replayed = (
        step_work(CONFIGS[name], recipe, batch_size=1, slots=128, moe_path="grouped", graphs=graphs)
        for graphs in (False, True)
    )
    assert eager.graph_kernels == 0
    # What one launch through Triton, or one gradient handed out, takes more of a host is gone, too.
    assert replayed.graph_kernels <= eager.launches - replayed.launches <= 2 * replayed.graph_kernels
    assert replace(replayed, launches=eager.launches, graph_kernels=0.0) == eager


@pytest.mark.parametrize("name", DECODERS)
@given(number=st.integers(0, 31))
def test_work_is_affine_in_the_layers_that_are_recomputed(name: str, number: int) -> None:
    device = find_device("H200")
    none, some, more = (
        np.array(grouped_work(name, num_recomputed=each, graphs=True).seconds_at_peak(device))
        for each in (0, number, number + 1)
    )
    assert (more >= some).all()
    assert more - some == pytest.approx((grouped_all(name) - none) / CONFIGS[name]["num_hidden_layers"], abs=1e-12)


def grouped_all(name: str) -> np.ndarray:
    return np.array(grouped_work(name, graphs=True).seconds_at_peak(find_device("H200")))


@pytest.mark.parametrize("name", DECODERS)
def test_no_checkpointing_is_no_layer_recomputed(name: str) -> None:
    recipe = RECIPES[name] | {"disable_gradient_checkpointing": True}
    off = step_work(CONFIGS[name], recipe, batch_size=1, slots=128, moe_path="grouped", num_recomputed=3)
    assert off == grouped_work(name, num_recomputed=0)


@pytest.mark.parametrize("name", DECODERS)
def test_few_rows_are_decoded_inside_products_and_many_once(name: str) -> None:
    experts, top_k = (CONFIGS[name][key] for key in ("num_experts" if name == "qwen3_moe" else "num_local_experts",
                                                     "num_experts_per_tok"))  # fmt: skip
    last = MAX_ROWS_DECODED_INSIDE * experts / top_k
    few, many, more = (grouped_work(name, slots=slots) for slots in (last, last + 1, 8 * last))
    assert few.decoded_weights > 0
    assert few.weight_bytes < many.weight_bytes
    assert many.decoded_weights == more.decoded_weights == 0
    assert many.weight_bytes == pytest.approx(more.weight_bytes, rel=1e-6)


def test_where_decoding_changes_over_is_what_the_kernels_do() -> None:
    """Only text is read: the kernels need torch, and this half of the project does without."""
    source = (SOURCE / "kernels" / "nf4.py").read_text(encoding="utf-8")
    found = re.findall(r"^MAX_ROWS_PER_EXPERT_TRITON(?:_DX)? = (\d+)$", source, re.MULTILINE)
    assert {int(rows) for rows in found} == {MAX_ROWS_DECODED_INSIDE}
    tuned = (SOURCE / "kernels" / "nf4_triton.py").read_text(encoding="utf-8")
    tiles = re.findall(r"(?:Forward|Dx)Config\((\d+),", tuned)
    assert max(int(rows) for rows in tiles) == TILE_ROWS


@given(mean_rows=st.floats(0.5, 150))
def test_tiles_of_an_expert_are_those_of_poisson_rows(mean_rows: float) -> None:
    exact = sum(stats.poisson.sf(np.array([0, 128, 256, 384]), mean_rows))
    assert expected_tiles(mean_rows, 128) == pytest.approx(exact, abs=0.02)


def test_grouped_experts_trained_in_full_are_refused() -> None:
    with pytest.raises(UserError, match="trained in full"):
        step_work(MIXTRAL_8X7B, FULL, batch_size=1, slots=128, moe_path="grouped")
    with pytest.raises(UserError, match="33 of 32 layers"):
        grouped_work("mixtral", num_recomputed=33)


def test_experts_without_a_token_are_not_run() -> None:
    usual, few = (
        step_work(QWEN3_30B_A3B, RECIPES["qwen3_moe"], batch_size=1, slots=128, hit_experts=hit) for hit in (None, 34)
    )
    assert few.launches / usual.launches == pytest.approx(34 / 128, rel=0.05)


def test_a_model_without_experts_ignores_the_path() -> None:
    stock, grouped = (step_work(LLAMA, LORA, batch_size=1, slots=128, moe_path=path) for path in ("stock", "grouped"))
    assert stock == grouped
    assert code_of(LLAMA, LORA, "grouped") == code_of(LLAMA, LORA) == "llama LoRA"
    assert code_of(MIXTRAL_8X7B, RECIPES["mixtral"]) == "mixtral QLoRA, stock"
    assert code_of(MIXTRAL_8X7B, RECIPES["mixtral"], "grouped", graphs=True) == "mixtral QLoRA, grouped, graphs"


@given(num_experts=st.integers(1, 256), slots=st.floats(1, 1e5), data=st.data())
def test_hit_experts_are_between_a_token_s_own_and_all(num_experts: int, slots: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    hit = num_hit_experts(num_experts, top_k, slots)
    assert top_k * (1 - 1e-9) <= hit <= num_experts
    assert num_hit_experts(num_experts, top_k, 1) == pytest.approx(top_k)


def test_few_slots_leave_experts_of_qwen3_out() -> None:
    few, many = (step_work(QWEN3_30B_A3B, RECIPES["qwen3_moe"], batch_size=1, slots=slots) for slots in (4, 4000))
    assert few.launches < many.launches / 3
    assert few.weight_bytes < many.weight_bytes / 2


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, {"moe_path": "fast"}, "MoE path 'fast'"),
        ({}, {"batch_size": 0}, "batch of 0"),
        ({}, {"slots": 0.0}, "0 token slots"),
        ({}, {"slots": float("nan")}, "nan token slots"),
        ({}, {"slots": float("inf")}, "inf token slots"),
        ({}, {"key_slots": -1.0}, "-1 keys"),
        ({"model_type": "gpt2"}, {}, "gpt2"),
        ({"hidden_size": None}, {}, "hidden_size"),
    ],
)
def test_what_cannot_be_counted_is_refused(changes: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "slots": 128.0} | arguments
    with pytest.raises(UserError, match=words):
        step_work(MIXTRAL_8X7B | changes, RECIPES["mixtral"], **settings)
