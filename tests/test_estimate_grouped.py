"""Grouped experts in estimates: their memory, how many layers are recomputed, and what is replayed where."""

from typing import Any

import pytest
from helpers_estimate import FakeTimes, ask, only

from tunescope.accelerate import step_memory
from tunescope.cost import estimate, memory
from tunescope.cost.estimate_memory import fewest_recomputed, gpu_memory_bytes
from tunescope.cost.time_points import RECIPES
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.families.qwen3_moe import QWEN3_30B_A3B
from tunescope.hardware import GIB, find_device
from tunescope.models.fast_moe_recompute import choose_checkpointed_layers
from tunescope.report.estimate import estimate_text

MODELS = {"mixtral": MIXTRAL_8X7B | {"num_experts_per_tok": 2}, "qwen3_moe": QWEN3_30B_A3B}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("batch_size", "gib"), [(1, 24), (1, 44.4), (8, 44.4), (24, 44.4), (32, 79.2), (64, 139.7)])
def test_auto_is_what_accelerate_moe_would_choose(model: str, batch_size: int, gib: float) -> None:
    config, recipe, gpu_bytes = MODELS[model], RECIPES[model], int(gib * GIB)
    step = step_memory(config, recipe, batch_size, 512, gpu_bytes)
    chosen = choose_checkpointed_layers(config["num_hidden_layers"], step)
    # Rounded to whole bytes at either end, so one layer may tip.
    assert abs(fewest_recomputed(config, recipe, gpu_bytes, batch_size, 512) - len(chosen)) <= 1


@pytest.mark.parametrize("model", MODELS)
def test_fewer_recomputed_layers_take_more_memory_and_all_of_them_what_none_says(model: str) -> None:
    config, recipe = MODELS[model], RECIPES[model]
    num_layers = config["num_hidden_layers"]
    peaks = [
        memory.peak_bytes(config, recipe, 8, 512, moe_path="grouped", num_recomputed=number)
        for number in range(num_layers, -1, -8)
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] == memory.peak_bytes(config, recipe, 8, 512, moe_path="grouped")
    with pytest.raises(UserError, match="layers cannot be recomputed"):
        memory.peak_bytes(config, recipe, 8, 512, moe_path="grouped", num_recomputed=num_layers + 1)


def test_few_rows_need_no_decoded_weights() -> None:
    """1,152 rows of 8 experts are the last that products decode as they go: 576 tokens at top-2."""
    config, recipe = MODELS["mixtral"], RECIPES["mixtral"]
    few, many = (
        memory.memory_terms(config, recipe, 1, tokens, moe_path="grouped")[memory.BACKWARD]["working set"]
        for tokens in (576, 584)
    )
    decoded = 8 * 4096 * 14336 * 2
    assert decoded < many - few < 4 * decoded


def asked(**more: Any) -> list[dict[str, Any]]:
    times = FakeTimes()
    ask(step_times=times, **more)
    return times.asked


def test_steps_are_replayed_where_torch_has_one_grouped_matmul() -> None:
    of = {each["device"]: each["graphs"] for each in asked(gpus=["a40", "h100-sxm", "h200"], moe="grouped")}
    assert of == {"NVIDIA A40": False, "NVIDIA H100 80GB HBM3": True, "NVIDIA H200": True}
    assert not any(each["graphs"] for each in asked(gpus=["h200"], moe="grouped", graphs=False))
    assert not any(each["graphs"] for each in asked(gpus=["h200"]))
    assert not any(each["graphs"] for each in asked(gpus=["h200"], model="blackmamba"))
    text = estimate_text(ask(gpus=["a40"], moe="grouped"))
    assert "NVIDIA A40: steps cannot be replayed as CUDA graphs" in text


def test_recompute_reaches_time_and_memory() -> None:
    grouped = {"gpus": ["h200"], "moe": "grouped", "batch": 64}
    usual, auto = only(ask(**grouped)), only(ask(recompute="auto", **grouped))
    assert usual.num_recomputed is None
    assert auto.num_recomputed == fewest_recomputed(
        MODELS["mixtral"], auto.run.recipe, gpu_memory_bytes(find_device("H200")), 64, auto.run.longest_tokens
    )
    assert 0 < auto.num_recomputed < 32
    assert auto.needed_bytes is not None
    assert usual.needed_bytes is not None
    assert usual.needed_bytes < auto.needed_bytes <= gpu_memory_bytes(auto.device)
    assert {each["num_recomputed"] for each in asked(recompute="auto", **grouped)} == {auto.num_recomputed}
    assert f"{auto.num_recomputed} of 32 layers must be recomputed" in estimate_text(ask(recompute="auto", **grouped))
    none = only(ask(recompute="none", **{**grouped, "batch": 8}))
    assert none.run.recipe["disable_gradient_checkpointing"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"recompute": "auto"}, "--recompute auto is for grouped"),
        ({"recompute": "auto", "model": "blackmamba"}, "--recompute auto is for grouped"),
        ({"recompute": "some", "moe": "grouped"}, "'some' is unknown"),
        ({"graphs": True}, "--graphs is for grouped"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask(**more)


def test_grouped_experts_take_less_than_stock_ones_and_say_what_they_rest_on() -> None:
    table = estimate("mixtral", "cs", gpus=["h200"], batch=8, moe="grouped")
    stock = estimate("mixtral", "cs", gpus=["h200"], batch=8, moe="stock")
    assert 3 * table["hours"][0] < stock["hours"][0]
    assert table["moe_path"][0] == "grouped"
    assert bool(table["is_graph_replayed"][0])
    assert "mixtral QLoRA, grouped, graphs" in table["basis"][0]
