"""Recipes: what the study ran, read and checked before anything heavy starts."""

import hashlib
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope import paper
from tunescope.errors import UserError
from tunescope.results import digest
from tunescope.train.recipe import check_recipe, load_recipe, recipe_folder, with_overrides

MIXTRAL = recipe_folder() / "mixtral_qlora.yaml"

settings_dicts = st.dictionaries(
    st.text(string.ascii_lowercase + "_", min_size=1, max_size=8),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    max_size=6,
)


def launched() -> dict[str, str]:
    """The settings that all of the paper's Mixtral throughput launchers share."""
    rows = [
        row for row in paper.rows("experiment_grid") if row["model"] == "mixtral" and row["purpose"] == "throughput"
    ]
    return {key: value for key, value in rows[0].items() if all(row[key] == value for row in rows)}


def test_mixtral_recipe_is_what_the_papers_launchers_set() -> None:
    recipe, study = load_recipe(MIXTRAL), launched()
    assert recipe["learning_rate"] == float(study["learning_rate"])
    assert recipe["lr_scheduler_type"] == study["lr_scheduler"]
    assert study["optimizer"].startswith(recipe["optim"])
    assert recipe["gradient_accumulation_steps"] == int(study["gradient_accumulation_steps"])
    assert recipe["cutoff_len"] == int(study["cutoff_len_tokens"])
    assert recipe["template"] == study["template"]
    assert recipe["finetuning_type"] == study["effective_finetuning"]
    assert recipe["lora_rank"] == int(study["lora_rank_flag"])
    assert recipe["lora_target"].split(",") == study["lora_targets_flag"].split()
    assert study["lora_alpha_effective"].startswith(str(recipe["lora_alpha"]))
    assert study["lora_dropout_effective"].startswith(str(recipe["lora_dropout"]))
    assert recipe["quantization_bit"] == int(study["quantization_bit_flag"])
    assert recipe["max_samples"] == int(study["dataset_rows_selected"])
    assert recipe["num_train_epochs"] == float(study["epochs"])
    assert recipe["bf16"] is (study["compute_precision"] == "bf16")


def test_mixtral_recipe_checkpoints_and_waits_for_nothing() -> None:
    """Each of these, at its default, would change the step that is timed (FACTS.md)."""
    recipe = load_recipe(MIXTRAL)
    assert not recipe.get("disable_gradient_checkpointing", False)
    wanted = {
        "use_reentrant_gc": False,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "quantization_type": "nf4",
        "double_quantization": True,
        "stage": "sft",
        "do_train": True,
    }
    assert {key: recipe[key] for key in wanted} == wanted
    assert recipe["logging_steps"] >= 100_000


def test_numbers_are_read_as_numbers() -> None:
    """YAML 1.1 takes 5e-5 for text."""
    recipe = load_recipe(MIXTRAL)
    assert all(isinstance(recipe[key], float) for key in ("learning_rate", "lora_dropout", "num_train_epochs"))
    assert isinstance(recipe["lora_rank"], int)


@pytest.mark.parametrize(
    "content",
    ["", "- a\n- b\n", "just text", "1: 2\n", "key: [unclosed", "a: !!python/object/apply:os.system ['true']"],
)
def test_what_is_no_recipe_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_missing_or_binary_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "none.yaml", tmp_path / "recipe.yaml", tmp_path):
        with pytest.raises(UserError):
            load_recipe(path)


@pytest.mark.parametrize("value", [True, "true", 1])
def test_remote_code_is_refused_from_a_file_and_from_the_command_line(value: Any) -> None:
    with pytest.raises(UserError, match="trust_remote_code"):
        check_recipe({"trust_remote_code": value}, "recipe.yaml")
    with pytest.raises(UserError, match="trust_remote_code"):
        with_overrides({}, ["trust_remote_code=true"])
    assert check_recipe({"trust_remote_code": False}, "recipe.yaml") == {"trust_remote_code": False}


def test_overrides_are_read_as_yaml_and_change_no_original() -> None:
    original = {"lora_rank": 16, "bf16": True}
    changed = with_overrides(original, ["lora_rank=8", "bf16=false", "dataset_dir=a=b", "report_to="])
    assert changed == {"lora_rank": 8, "bf16": False, "dataset_dir": "a=b", "report_to": None}
    assert original == {"lora_rank": 16, "bf16": True}


@pytest.mark.parametrize("item", ["lora_rank", "=8", "", "lora_rank=[8"])
def test_an_override_that_is_none_is_refused(item: str) -> None:
    with pytest.raises(UserError):
        with_overrides({}, [item])


# --- the digest ---


@given(settings_dicts)
def test_digest_ignores_order(content: dict[str, Any]) -> None:
    assert digest(content) == digest(dict(reversed(content.items())))
    assert len(digest(content)) == 16


@given(settings_dicts, settings_dicts)
def test_digest_tells_contents_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    # repr: 1, 1.0 and True are equal in Python and different settings.
    same = sorted(map(repr, one.items())) == sorted(map(repr, other.items()))
    assert (digest(one) == digest(other)) == same


def test_digest_is_the_same_on_every_machine() -> None:
    canonical = rb'{"a":0.1,"b":[1,{"\u00e4":null}]}'
    assert digest({"b": [1, {"ä": None}], "a": 0.1}) == hashlib.sha256(canonical).hexdigest()[:16]
