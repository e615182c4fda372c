"""What a recipe of one's own decides, what it may not, and numbers of any size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_estimate import ask, only
from helpers_points import recipe as launchers_recipe
from hypothesis import given
from hypothesis import strategies as st

from tunescope.cost.estimate_inputs import MAX_QUERIES, read_model, read_run, resized
from tunescope.cost.estimate_memory import gpu_memory_bytes, max_batch_size
from tunescope.cost.lengths import Lengths
from tunescope.cost.time_points import RECIPES, study_lengths
from tunescope.errors import UserError
from tunescope.families.blackmamba import BLACKMAMBA_2_8B
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.hardware import find_device

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def of_recipe(**changes: Any) -> dict[str, Any]:
    return RECIPES["mixtral"] | changes


# --- what it decides ---


def test_a_recipe_s_queries_epochs_and_batch_are_taken_where_no_flag_is_given() -> None:
    found = only(ask(recipe=launchers_recipe()))
    assert (found.run.lengths.num_queries, found.run.epochs, found.batch_size) == (1000, 1.0, 1)
    assert any("1,000 of 13,921 queries" in note for note in found.run.notes)
    flagged = only(ask(recipe=launchers_recipe(), queries=500, epochs=2.0, batch=4))
    assert (flagged.run.lengths.num_queries, flagged.run.epochs, flagged.batch_size) == (500, 2.0, 4)
    without = only(ask(recipe=of_recipe()))
    assert (without.run.lengths.num_queries, without.run.epochs) == (13_921, 1.0)
    assert without.batch_size == only(ask()).batch_size
    assert only(ask(recipe=of_recipe(num_train_epochs=3))).run.epochs == 3


@given(val_size=st.integers(0, 500) | st.floats(0, 0.9), max_samples=st.none() | st.integers(1000, 20_000))
def test_what_validation_holds_out_is_not_trained(val_size: float, max_samples: int | None) -> None:
    run = read_run("mixtral", "math", recipe=of_recipe(val_size=val_size, max_samples=max_samples))
    used = min(max_samples or 13_921, 13_921)
    held_out = val_size if val_size >= 1 else val_size * used
    assert run.lengths.num_queries == pytest.approx(used - held_out, abs=1)


@pytest.mark.parametrize("changes", [{"max_steps": 100}, {"group_by_length": True}, {"disable_shuffling": True}])
def test_keys_that_are_not_gone_by_are_named(changes: dict[str, Any]) -> None:
    (key,) = changes
    assert any(
        f"The recipe's {key} is not gone by" in note
        for note in read_run("mixtral", "cs", recipe=of_recipe(**changes)).notes
    )
    assert not any(key in note for note in read_run("mixtral", "cs", recipe=of_recipe()).notes)


def test_another_template_than_the_launchers_is_named() -> None:
    assert any(
        "template is qwen3_nothink" in n
        for n in read_run("mixtral", "cs", recipe=of_recipe(template="qwen3_nothink")).notes
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": True}, "packing"),
        ({"neat_packing": True}, "neat_packing"),
        ({"stage": "dpo"}, "stage is 'dpo'"),
        ({"gradient_accumulation_steps": "eight"}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps"),
        ({"lora_dropout": "abc"}, "lora_dropout"),
        ({"max_samples": "all"}, "max_samples"),
        ({"num_train_epochs": "three"}, "num_train_epochs"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"val_size": 20_000}, "val_size"),
    ],
)
def test_what_a_recipe_may_not_ask(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask(recipe=of_recipe(**changes))


# --- config.json ---


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (MIXTRAL_8X7B, {"num_hidden_layers": None}, "num_hidden_layers"),
        (MIXTRAL_8X7B, {"num_local_experts": "8"}, "num_local_experts"),
        (MIXTRAL_8X7B, {"num_local_experts": None}, "num_local_experts"),
        (LLAMA, {"num_key_value_heads": "8"}, "num_key_value_heads"),
        (LLAMA, {"num_key_value_heads": -8}, "num_key_value_heads"),
        (LLAMA, {"num_key_value_heads": 3}, "8 heads, 3 for keys"),
        (LLAMA, {"head_dim": "x"}, "head_dim"),
        (LLAMA, {"hidden_size": 10**30}, "hidden_size"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        (BLACKMAMBA_2_8B, {"expand": "2"}, "expand"),
        (BLACKMAMBA_2_8B, {"layers_block_type": None}, "layers_block_type"),
        (BLACKMAMBA_2_8B, {"layers_block_type": [["mamba"]]}, "layers_block_type"),
        (BLACKMAMBA_2_8B, {"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_a_config_that_no_model_has_is_refused(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    config = {key: value for key, value in (base | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        ask(model=str(tmp_path))


def test_names_in_any_case_and_of_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_model("Mixtral").config == read_model("mixtral").config
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path / "mine")
    assert read_model(".").name == "mine"
    (tmp_path / "L.CSV").write_text("length_tokens,count\n100,10\n")
    assert read_run("mixtral", str(tmp_path / "L.CSV")).lengths.num_queries == 10
    assert only(ask(batch="MAX")).batch_size == only(ask(batch="max")).batch_size


# --- numbers of any size ---


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), num_queries=st.integers(1, 200))
def test_resized_counts_are_the_quantiles_one_by_one(lengths: list[int], num_queries: int) -> None:
    whole = Lengths.of_queries(lengths, "a test")
    ordered = np.sort(lengths)
    # The place of quantile (i + 1/2) / num_queries, in whole numbers.
    places = [-(-(2 * i + 1) * len(lengths) // (2 * num_queries)) - 1 for i in range(num_queries)]
    assert resized(whole, num_queries).per_query().tolist() == ordered[places].tolist()


def test_a_thousand_million_queries_are_answered_and_more_than_any_refused() -> None:
    found = only(ask(queries=10**9, batch=4))
    assert found.run.lengths.num_queries == 10**9
    assert found.run.lengths.mean_tokens == pytest.approx(
        study_lengths("mixtral", "math").cut(1024).mean_tokens, rel=1e-6
    )
    assert only(ask(queries=MAX_QUERIES)).hours is not None
    for asked in ({"queries": MAX_QUERIES + 1}, {"queries": 10**22}, {"epochs": 1e308}, {"prices": ["a40=1e308"]}):
        with pytest.raises(UserError):
            ask(**asked)


def test_large_histograms_are_counted_exactly(tmp_path: Path) -> None:
    lengths = Lengths(np.array([10**6, 10**7]), np.array([10**15, 10**15]), "a test")
    assert lengths.total_tokens == 11 * 10**21
    (tmp_path / "extra.csv").write_text("length_tokens,count\n1,234,5\n")
    with pytest.raises(UserError, match="line 2: more cells"):
        ask(data=str(tmp_path / "extra.csv"))


# --- memory where lengths are estimated ---


def test_memory_is_sized_for_the_upper_end_of_estimated_lengths(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": "why " * n, "output": "so"} for n in range(300, 400)]))
    found = only(ask(data=str(file), batch="max"))
    bounds = found.run.lengths.bounds
    assert bounds is not None
    longest = bounds[1].longest_tokens
    assert found.run.longest_tokens == longest > found.run.lengths.longest_tokens
    have = gpu_memory_bytes(find_device("A40"))
    assert found.batch_size == max_batch_size(found.run.model.config, found.run.recipe, have, longest, 100)
    assert any(f"{longest} tokens in the longest query" in note for note in found.run.notes)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('[{"instruction": "\\ud83d", "output": "so"}]')
    with pytest.raises(UserError, match="half a character"):
        ask(data=str(tmp_path / "half.json"))
